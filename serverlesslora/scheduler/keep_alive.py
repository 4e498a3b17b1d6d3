"""For how long an idle domain stays, and when it is started again before anybody asks.

The hybrid histogram policy of "Serverless in the Wild" (Shahrad et al., USENIX ATC'20, section 4.2), changed in three
places:

- Gaps are looked at as they matter: longer than the shortest keep-alive (nothing is let go before) and short enough
  for the longest (what cannot be bridged is not waited for). A function stays until the 99th percentile of *those*,
  plus 10 %. When next to none of its gaps can be bridged it goes at once.
- Long regular gaps are not bridged but met: the domain goes at once and is started 10 % ahead of the 5th percentile,
  nearer when the jitter of the gaps allows it.
- Holding costs money: given a size and what a cold start costs, a domain stays only for as long as the waiting it is
  expected to save is worth the memory (`min_gain_per_gb`).

A domain serves several functions: it stays while any of them would stay by itself, and is started for the first of
them that is due. So sharing a domain never makes a function colder than having one of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from serverlesslora.scheduler.arrivals import ArrivalModel
from serverlesslora.scheduler.artifacts import Wait
from serverlesslora.scheduler.gaps import MIN_GAPS, Gaps
from serverlesslora.scheduler.settings import PolicySettings

HEAD, TAIL, MARGIN = 0.05, 0.99, 0.1  # as in the paper
MIN_SHARE = 0.05  # of gaps that can be bridged; with fewer it is not tried
ENOUGH_GAPS = 1 / (1 - TAIL)  # to say that what was not among them is rare
REGULAR_CV = 0.3  # twice what two neighbouring bins alone can make of a regular function
JITTERS = 4.0  # how many of them a gap may be off, as TCP's timer allows
MIN_SAVED_S = 60.0  # a domain is not let go to be started again for less
STEPS = 8  # ends of the window that are weighed against each other


class KeepAlivePolicy(Protocol):
    def idle_timeout(
        self,
        names: Collection[str],
        now: float,
        *,
        idle_since: float | None = None,
        size_bytes: int | None = None,
        delay_s: float | None = None,
    ) -> Wait: ...

    def wake_in(
        self, names: Collection[str], now: float, *, size_bytes: int | None = None, delay_s: float | None = None
    ) -> Wait | None: ...


class Due(NamedTuple):
    """When a regular function is expected, as silence since its last arrival."""

    from_s: float
    to_s: float


class KeepAlive:
    def __init__(self, settings: PolicySettings, arrivals: ArrivalModel) -> None:
        self._arrivals = arrivals
        self._min_s = settings.keep_alive_min_s
        self._max_s = max(settings.keep_alive_min_s, settings.keep_alive_max_s)
        self._min_gain_per_gb = settings.min_gain_per_gb

    def idle_timeout(
        self,
        names: Collection[str],
        now: float,
        *,
        idle_since: float | None = None,
        size_bytes: int | None = None,
        delay_s: float | None = None,
    ) -> Wait:
        """How long a domain may be idle in all, from `idle_since` on, before it is let go.

        `idle_since` is when it was last used or, not used yet, started; without it, the last arrival at any of its
        functions, if that is no longer ago than a domain may be idle, else the start of the time it is due. The answer
        lies between keep_alive_min_s and keep_alive_max_s. It changes with `now`: ask again before acting on it.

        `size_bytes` is what letting go would free, `delay_s` what the next request would then wait longer.
        """
        seen = [last for name in names if (last := self._arrivals.last_seen(name)) is not None]
        if not seen:
            wait_s = min(max(self._min_s, self._arrivals.prior_gap_s), self._max_s)
            return Wait(wait_s, f"its functions were never asked: the usual {wait_s:.0f} s")
        end, reason, due_from = self._end(names, now)
        if idle_since is None:
            idle_since = max(seen)
            if due_from is not None and now - idle_since > self._max_s:
                idle_since = due_from
        earliest, latest = idle_since + self._min_s, idle_since + self._max_s
        end = min(max(end, earliest), latest)
        if size_bytes is not None and delay_s is not None and end > max(now, earliest):
            worth = self._worth(names, max(now, earliest), end, size_bytes, delay_s)
            if worth < end:
                end, reason = worth, "waiting longer would cost more memory than it is expected to save time"
        return Wait(min(max(end - idle_since, self._min_s), self._max_s), reason)

    def wake_in(
        self, names: Collection[str], now: float, *, size_bytes: int | None = None, delay_s: float | None = None
    ) -> Wait | None:
        """How long to wait before a domain that was let go is started again; None: until somebody asks.

        Zero while one of its functions is due already. To be given the same `size_bytes` and `delay_s` as
        `idle_timeout`, lest one starts what the other stops.
        """
        soonest: Wait | None = None
        for name in names:
            due = self._due(name)
            last = self._arrivals.last_seen(name)
            if due is None or last is None or now >= last + due.to_s:
                continue
            start = max(now, last + due.from_s)
            if size_bytes is not None and delay_s is not None:
                end = last + due.to_s
                if self._worth(names, start, end, size_bytes, delay_s) <= start:
                    continue
            if soonest is None or start - now < soonest.seconds:
                reason = f"{name} is regular and due {due.from_s:.0f} to {due.to_s:.0f} s after its last request"
                soonest = Wait(start - now, reason)
        return soonest

    def _end(self, names: Collection[str], now: float) -> tuple[float, str, float | None]:
        """Until when the functions together want the domain, why, and since when one that is due now is due."""
        end, reason, due_from = float("-inf"), "", None
        for name in names:
            last = self._arrivals.last_seen(name)
            if last is None:
                continue
            due = self._due(name)
            if due is None:
                wait_s, why = self._bridge(name)
            elif now - last < due.from_s:
                wait_s, why = self._min_s, f"not due before {due.from_s:.0f} s: started again then"
            else:
                wait_s, why = due.to_s, f"due until {due.to_s:.0f} s after the last request"
                if now < last + due.to_s:
                    due_from = max(due_from or 0.0, last + due.from_s)
            if last + wait_s > end:
                end, reason = last + wait_s, f"{name}: {why}"
        return end, reason, due_from

    def _bridge(self, name: str) -> tuple[float, str]:
        """How long a function that is not met in time stays after its last arrival."""
        gaps = self._arrivals.gaps(name)
        if gaps is None or not gaps.is_telling:
            return self._arrivals.prior_gap_s, "too few gaps seen to know better"
        # Gaps shorter than this are served whatever is decided here.
        longer = gaps.beyond(self._min_s)
        if longer < MIN_GAPS:
            if gaps.weight < ENOUGH_GAPS:
                return self._arrivals.prior_gap_s, "too few gaps seen to know better"
            return self._min_s, f"next to none of its gaps were longer than {self._min_s:.0f} s"
        share = 1 - gaps.beyond(self._max_s) / longer
        tail = gaps.quantile(TAIL, longer_than_s=self._min_s, up_to_s=self._max_s)
        if share < MIN_SHARE or tail is None:
            return self._min_s, f"{1 - share:.0%} of its gaps are longer than anything is kept"
        wait_s = tail * (1 + MARGIN)
        return wait_s, f"{TAIL:.0%} of the gaps that can be bridged are shorter than {tail:.0f} s"

    def _due(self, name: str) -> Due | None:
        """None unless its gaps are regular, and so long that starting it anew is worth it."""
        gaps = self._arrivals.gaps(name)
        if gaps is None or not _is_regular(gaps):
            return None
        head, tail = gaps.quantile(HEAD), gaps.quantile(TAIL)
        assert head is not None and tail is not None
        slack = JITTERS * gaps.jitter_s + self._min_s
        from_s = max(head * (1 - MARGIN), gaps.mean_s - slack)
        to_s = min(tail * (1 + MARGIN), gaps.mean_s + slack)
        if from_s < self._min_s + MIN_SAVED_S or not from_s < gaps.mean_s < to_s or to_s - from_s > self._max_s:
            return None
        return Due(from_s, to_s)

    def _worth(self, names: Collection[str], start: float, end: float, size_bytes: int, delay_s: float) -> float:
        """The time in [start, end] until which holding gains most; `start` when it never gains.

        Gain until u, given silence until `start`: delay·P(arrival until u) - price·GB·E[time held until u], seconds of
        waiting. The price is `min_gain_per_gb`. More delay or fewer bytes never make the best u earlier.
        """
        price = self._min_gain_per_gb * size_bytes / 1e9  # seconds of waiting per second held
        step_s = (end - start) / STEPS
        best, best_gain = start, 0.0
        held_s, silent = 0.0, 1.0
        for i in range(1, STEPS + 1):
            before, silent = silent, 1.0
            for name in names:
                silent *= 1 - self._arrivals.expects(name, start, i * step_s)
            held_s += (before + silent) / 2 * step_s
            gain = delay_s * (1 - silent) - price * held_s
            if gain >= best_gain:
                best, best_gain = start + i * step_s, gain
        return best


class FixedKeepAlive:
    """The same time for everything, and nothing is started ahead: keep_alive_max_s unless told otherwise."""

    def __init__(self, settings: PolicySettings, idle_s: float | None = None) -> None:
        self._idle_s = settings.keep_alive_max_s if idle_s is None else idle_s

    def idle_timeout(
        self,
        names: Collection[str],
        now: float,
        *,
        idle_since: float | None = None,
        size_bytes: int | None = None,
        delay_s: float | None = None,
    ) -> Wait:
        return Wait(self._idle_s, f"everything stays for {self._idle_s:.0f} s")

    def wake_in(
        self, names: Collection[str], now: float, *, size_bytes: int | None = None, delay_s: float | None = None
    ) -> Wait | None:
        return None


def _is_regular(gaps: Gaps) -> bool:
    cv = gaps.cv()
    return cv is not None and cv <= REGULAR_CV
