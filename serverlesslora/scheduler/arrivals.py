"""When a function will be asked again: its recent rate, its gaps and its hours of the day, from arrivals alone.

Four guesses, each right for another kind of function:

- **recent**: arrivals in the last minutes, weighted 2^(-age/half-life). Right for load that comes and stays.
- **daily**: the same with a half-life of a day. Right on average.
- **hour**: arrivals in this hour of earlier days, once two days and two dozen arrivals were seen.
- **gaps**: of the earlier silences as long as the present one, how many ended within the next minute. Right for what is
  periodic, and for knowing that what has stopped has stopped ("Serverless in the Wild", ATC'20, looks at the same).

The first three give the *base* rate: the largest of them, but while a function is silent for `age` no more than
4/age, since a Poisson process of a higher rate would be that silent less than once in fifty times. A function never
seen has one arrival in `prior_gap_s`. Gaps then say what the base rate cannot: with S gaps seen that were longer than
the present silence, their word counts S/(S+2), the base rate the rest.

More arrivals never give a lower base rate, whenever they come: it is made of sums over arrivals, and of the age of the
last. More arrivals in the same bursts never give a lower rate either. Arrivals that break up the gaps may, because a
function then no longer does what it was expected to.
"""

from __future__ import annotations

import math
from array import array

import msgspec

from serverlesslora.scheduler.gaps import BURST_S, Gaps, GapsSnapshot

HORIZON_S = 60.0  # the near future: long enough to load something, short enough to mean now
DAY_S = 86400.0
HOUR_S = 3600.0
HOURS_MEMORY_D = 3.0  # days after which an hour of the day counts half
HOURS_TRUST_D = 2.0
HOURS_TRUST_ARRIVALS = 24.0
SURPRISE = 4.0  # arrivals missed until a rate is no longer believed
DOUBT = 2.0  # gaps that the base rate is worth
FIRST_SECOND_S = 1.0  # of a burst; who comes later finds everything loaded by the first
MAX_EXPONENT = 256.0  # of two; then weights are counted anew
SNAPSHOT_VERSION = 1

_LN2 = math.log(2)
_HOURS_TOTAL_D = 1 / (1 - math.exp2(-1 / HOURS_MEMORY_D))  # what for ever counts for


class FunctionArrivals(msgspec.Struct, frozen=True):
    name: str
    age_s: float  # since the last arrival
    recent: float
    daily: float
    together: float
    gaps: GapsSnapshot | None = None
    hours: tuple[float, ...] = ()  # of the local day, as weights at the time of the snapshot


class ArrivalSnapshot(msgspec.Struct, frozen=True):
    """Ages instead of times: a monotonic clock starts anew with the machine."""

    age_s: float  # of the model
    functions: tuple[FunctionArrivals, ...]
    unix_s: float | None = None  # when it was taken
    version: int = SNAPSHOT_VERSION


class _Function:
    __slots__ = ("burst_at", "daily", "gaps", "hours", "last", "recent", "together")

    def __init__(self, now: float) -> None:
        self.last = now
        self.recent = 1.0  # decayed number of arrivals, as of the last
        self.daily = 1.0
        self.burst_at = now  # start of the present burst
        self.together = 1.0  # arrivals in the first second of their burst; forgotten along with the gaps
        self.gaps: Gaps | None = None  # from the second burst on, as `hours`
        self.hours: array[float] | None = None


class ArrivalModel:
    """`day_offset_s` makes times of day of the injected clock: now + offset = seconds since a local midnight."""

    def __init__(self, *, half_life_s: float = 300.0, prior_gap_s: float = 600.0, day_offset_s: float = 0.0) -> None:
        assert half_life_s > 0 and prior_gap_s > 0
        self.prior_gap_s = prior_gap_s
        self._half_life_s = half_life_s
        self._recent_rate = _LN2 / half_life_s  # of one arrival
        self._day_offset_s = day_offset_s
        self._functions: dict[str, _Function] = {}
        self._since: float | None = None  # the first arrival of all
        # Weights grow with time instead of old ones shrinking (forward decay, Cormode et al., ICDE'09); they are
        # counted from `_epoch` and looked up once an hour.
        self._epoch = 0.0
        self._hour = 0
        self._hour_weight = 0.0
        self._hour_start = self._hour_end = math.inf

    def observe(self, name: str, now: float) -> None:
        """One arrival. Times that run backwards count as the last one seen."""
        function = self._functions.get(name)
        if function is None:
            self._functions[name] = _Function(now)
            if self._since is None:
                self._since = self._epoch = now
            return
        gap_s = now - function.last
        if gap_s > 0:
            function.recent = function.recent * math.exp2(-gap_s / self._half_life_s) + 1.0
            function.daily = function.daily * math.exp2(-gap_s / DAY_S) + 1.0
            function.last = now
        else:
            now = function.last
            function.recent += 1.0
            function.daily += 1.0
        if gap_s >= BURST_S:
            if function.gaps is None:
                function.gaps = Gaps()
                function.hours = array("d", bytes(8 * 24))
            function.burst_at = now
            function.together += 1.0
            if function.gaps.add(gap_s):
                function.together /= 2
        elif now - function.burst_at < FIRST_SECOND_S:
            function.together += 1.0
        if function.hours is not None:
            if not self._hour_start <= now < self._hour_end:
                self._turn_hour(now)
            function.hours[self._hour] += self._hour_weight

    def rate(self, name: str, now: float) -> float:
        """Expected arrivals per second in the next minute.

        By the gaps: the next burst, if it comes within the minute, and the base rate from then on.
        """
        function = self._functions.get(name)
        if function is None:
            return 1 / self.prior_gap_s
        base = self._base(function, now)
        age_s = now - function.last
        gaps = function.gaps
        if gaps is None or age_s < BURST_S or not gaps.is_telling:
            return base
        survivors, share, quiet_s = gaps.ahead(age_s, HORIZON_S)
        burst = max(1.0, function.together / (gaps.weight + 1))
        trust = survivors / (survivors + DOUBT)
        return trust * (share * burst / HORIZON_S + base * (1 - quiet_s / HORIZON_S)) + (1 - trust) * base

    def expects(self, name: str, now: float, horizon_s: float) -> float:
        """Probability of an arrival within (now, now + horizon_s], given none since the last one."""
        function = self._functions.get(name)
        if function is None:
            return -math.expm1(-horizon_s / self.prior_gap_s)
        by_base = -math.expm1(-self._base(function, now) * horizon_s)
        age_s = now - function.last
        if function.gaps is None or age_s < BURST_S or not function.gaps.is_telling:
            return by_base
        survivors, share, _ = function.gaps.ahead(age_s, horizon_s)
        trust = survivors / (survivors + DOUBT)
        return trust * share + (1 - trust) * by_base

    def gaps(self, name: str) -> Gaps | None:
        """None until it fell silent once. For looking only."""
        function = self._functions.get(name)
        return function.gaps if function is not None else None

    def gap_quantile(self, name: str, q: float) -> float | None:
        """Of the gaps between bursts, seconds; None with fewer than 4 seen."""
        gaps = self.gaps(name)
        return gaps.quantile(q) if gaps is not None else None

    def cv(self, name: str) -> float | None:
        """Coefficient of variation of the gaps: 0 regular, 1 as by chance; None with fewer than 4 seen."""
        gaps = self.gaps(name)
        return gaps.cv() if gaps is not None else None

    def last_seen(self, name: str) -> float | None:
        function = self._functions.get(name)
        return function.last if function is not None else None

    def forget(self, name: str) -> None:
        self._functions.pop(name, None)

    def snapshot(self, now: float, *, unix_s: float | None = None) -> ArrivalSnapshot:
        scale = self._scale(now)
        functions = tuple(
            FunctionArrivals(
                name=name,
                age_s=now - function.last,
                recent=function.recent,
                daily=function.daily,
                together=function.together,
                gaps=function.gaps.snapshot() if function.gaps is not None else None,
                hours=tuple(weight * scale for weight in function.hours) if function.hours is not None else (),
            )
            for name, function in self._functions.items()
        )
        return ArrivalSnapshot(now - self._since if self._since is not None else 0.0, functions, unix_s)

    @classmethod
    def restore(
        cls,
        snapshot: ArrivalSnapshot,
        now: float,
        *,
        unix_s: float | None = None,
        half_life_s: float = 300.0,
        prior_gap_s: float = 600.0,
        day_offset_s: float = 0.0,
    ) -> ArrivalModel:
        """What was taken earlier, maybe by a process with another clock.

        With wall times at both ends, the time in between counts as silence; without, it counts as none. A snapshot
        of another version gives an empty model: habits are learned again.
        """
        model = cls(half_life_s=half_life_s, prior_gap_s=prior_gap_s, day_offset_s=day_offset_s)
        if snapshot.version != SNAPSHOT_VERSION or not snapshot.functions:
            return model
        away_s = max(0.0, unix_s - snapshot.unix_s) if unix_s is not None and snapshot.unix_s is not None else 0.0
        model._epoch = now - away_s
        model._since = model._epoch - snapshot.age_s
        for saved in snapshot.functions:
            function = model._functions[saved.name] = _Function(model._epoch - saved.age_s)
            function.recent, function.daily, function.together = saved.recent, saved.daily, saved.together
            if saved.gaps is not None:
                function.gaps = Gaps.restore(saved.gaps)
                function.hours = array("d", saved.hours)
        return model

    def _base(self, function: _Function, now: float) -> float:
        age_s = max(0.0, now - function.last)
        assert self._since is not None
        rate = function.recent * math.exp2(-age_s / self._half_life_s) * self._recent_rate
        # What was seen for a short time only is spread over the prior's gap at least: two arrivals are no rate yet.
        days = max(0.0, now - self._since) / DAY_S
        seen_s = max(self.prior_gap_s, DAY_S / _LN2 * (1 - math.exp2(-days)))
        rate = max(rate, function.daily * math.exp2(-age_s / DAY_S) / seen_s)
        if rate * age_s > SURPRISE:
            rate = SURPRISE / age_s
        rate = max(rate, 1 / (self.prior_gap_s + age_s))
        return max(rate, self._by_hour(function, now, age_s, days)) if days >= HOURS_TRUST_D else rate

    def _by_hour(self, function: _Function, now: float, age_s: float, days: float) -> float:
        """Mean rate in this hour of earlier days; what is usual once a day may be missing for a day."""
        if function.hours is None:
            return 0.0
        scale = self._scale(now)
        if sum(function.hours) * scale < HOURS_TRUST_ARRIVALS:
            return 0.0
        seen_d = (1 - math.exp2(-days / HOURS_MEMORY_D)) * _HOURS_TOTAL_D
        rate: float = function.hours[self._hour_of(now)] * scale / (seen_d * HOUR_S)
        missing_s = age_s - DAY_S
        return SURPRISE / missing_s if rate * missing_s > SURPRISE else rate

    def _scale(self, now: float) -> float:
        """What a weight of `_epoch` is worth by now."""
        return math.exp2(-max(0.0, now - self._epoch) / (HOURS_MEMORY_D * DAY_S))

    def _hour_of(self, now: float) -> int:
        return int((now + self._day_offset_s) // HOUR_S) % 24

    def _turn_hour(self, now: float) -> None:
        self._hour = self._hour_of(now)
        self._hour_start = (now + self._day_offset_s) // HOUR_S * HOUR_S - self._day_offset_s
        self._hour_end = self._hour_start + HOUR_S
        age = (self._hour_start - self._epoch) / (HOURS_MEMORY_D * DAY_S)
        if age > MAX_EXPONENT:
            for function in self._functions.values():
                if function.hours is not None:
                    function.hours = array("d", [weight * math.exp2(-age) for weight in function.hours])
            self._epoch, age = self._hour_start, 0.0
        self._hour_weight = math.exp2(age)
