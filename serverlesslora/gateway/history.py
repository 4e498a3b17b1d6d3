"""The last hour, of the server in buckets of ten seconds and of each function in minutes: what the live page draws.

Memory is bounded: functions beyond a number share one series, one that was silent for an hour makes room for another,
and times are kept as counts on a logarithmic scale, so that a quantile is right within a few percent however many they
were. Sums over the hour are kept as buckets come and go; nothing is added up when somebody looks.

A function is its name and its tenant: what a name did for its former owner is not told to the next.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

BUCKET_S = 10
NUM_BUCKETS = 360
MINUTE = 6  # buckets that a function's series has in one
Who = tuple[str, str | None]  # a function's name and its tenant
OTHERS: Who = ("", None)  # the series of functions beyond the cap, and of what belongs to no function

_STEP = math.log(1.1)  # from one class of times to the next
_SHORTEST_S = 1e-4
_CLASSES = 170  # up to 1000 s


class Point(msgspec.Struct, frozen=True):
    """One bucket as it is drawn. Times in seconds; None: there was none."""

    at: int  # unix seconds of its beginning
    requests: int
    errors: int
    tokens: int  # of outputs
    cost: float
    ttft_p50: float | None
    ttft_p95: float | None
    colds: dict[str, int]


class Summary(msgspec.Struct, frozen=True):
    """The whole hour."""

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    cost: float = 0.0
    ttft_p50: float | None = None
    ttft_p95: float | None = None
    colds: dict[str, tuple[int, float | None]] = {}  # by rung: how many, and the median seconds the start took


class Times:
    """Counts of durations by class; can be added and taken away again."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0

    def observe(self, seconds: float) -> None:
        place = 0 if seconds <= _SHORTEST_S else min(_CLASSES, math.ceil(math.log(seconds / _SHORTEST_S) / _STEP))
        self._counts[place] = self._counts.get(place, 0) + 1
        self._total += 1

    def add(self, other: Times) -> None:
        for place, count in other._counts.items():
            self._counts[place] = self._counts.get(place, 0) + count
        self._total += other._total

    def subtract(self, other: Times) -> None:
        for place, count in other._counts.items():
            if rest := self._counts[place] - count:
                self._counts[place] = rest
            else:
                del self._counts[place]
        self._total -= other._total

    def quantile(self, q: float) -> float | None:
        """The middle of its class: at most 5 % off between 0.1 ms and 1000 s."""
        rank = max(1, math.ceil(q * self._total))
        for place in sorted(self._counts):
            rank -= self._counts[place]
            if rank <= 0:
                return round(_SHORTEST_S * math.exp((place - 0.5) * _STEP), 6)
        return None


class Bucket:
    __slots__ = ("colds", "cost", "errors", "number", "requests", "tokens", "ttft")

    def __init__(self, number: int) -> None:
        self.number = number  # since the clock's zero
        self.requests = 0
        self.errors = 0
        self.tokens = 0
        self.cost = 0.0
        self.ttft = Times()
        self.colds: dict[str, Times] = {}

    def add(self, other: Bucket) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.tokens += other.tokens
        self.cost += other.cost
        self.ttft.add(other.ttft)
        for rung, times in other.colds.items():
            self.colds.setdefault(rung, Times()).add(times)

    def subtract(self, other: Bucket) -> None:
        self.requests -= other.requests
        self.errors -= other.errors
        self.tokens -= other.tokens
        self.cost = max(0.0, self.cost - other.cost)
        self.ttft.subtract(other.ttft)
        for rung, times in other.colds.items():
            self.colds[rung].subtract(times)

    def point(self, at: int) -> Point:
        ttft = self.ttft
        colds = {rung: times._total for rung, times in self.colds.items()}
        return Point(
            at,
            self.requests,
            self.errors,
            self.tokens,
            round(self.cost, 12),
            ttft.quantile(0.5),
            ttft.quantile(0.95),
            colds,
        )

    def summary(self) -> Summary:
        colds = {rung: (times._total, times.quantile(0.5)) for rung, times in self.colds.items() if times._total}
        return Summary(
            self.requests,
            self.errors,
            self.tokens,
            round(self.cost, 12),
            self.ttft.quantile(0.5),
            self.ttft.quantile(0.95),
            colds,
        )


class Series:
    """The buckets in which something happened, oldest first, and their sum without the newest."""

    def __init__(self) -> None:
        self._buckets: deque[Bucket] = deque()
        self._past = Bucket(-1)

    def expire(self, number: int) -> bool:
        """Let go of what is older than an hour before bucket `number`; whether anything is left."""
        while self._buckets and self._buckets[0].number <= number - NUM_BUCKETS:
            old = self._buckets.popleft()
            if self._buckets:  # the newest is not part of the sum
                self._past.subtract(old)
        if len(self._buckets) <= 1:
            self._past = Bucket(-1)  # what rounding left of the money
        return bool(self._buckets)

    def now(self, number: int) -> Bucket:
        if self._buckets and self._buckets[-1].number >= number:
            return self._buckets[-1]
        self.expire(number)
        if self._buckets:
            self._past.add(self._buckets[-1])
        self._buckets.append(Bucket(number))
        return self._buckets[-1]

    def buckets(self) -> Iterable[Bucket]:
        return self._buckets

    def sum(self) -> Bucket:
        total = Bucket(-1)
        total.add(self._past)
        if self._buckets:
            total.add(self._buckets[-1])
        return total


class History:
    """`clock` is monotonic; `wall_clock` only dates what is drawn."""

    def __init__(
        self,
        max_functions: int = 384,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_functions = max_functions
        self._clock = clock
        self._wall_clock = wall_clock
        self._all = Series()
        self._functions: dict[Who, Series] = {}

    # --- telling

    def first_token(self, function: Who, seconds: float) -> None:
        for bucket in self._now(function):
            bucket.ttft.observe(seconds)

    def cold(self, function: Who, rung: str, seconds: float) -> None:
        for bucket in self._now(function):
            bucket.colds.setdefault(rung, Times()).observe(seconds)

    def ended(self, function: Who, *, tokens: int, failed: bool) -> None:
        for bucket in self._now(function):
            bucket.requests += 1
            bucket.errors += failed
            bucket.tokens += tokens

    def cost(self, function: Who, money: float) -> None:
        for bucket in self._now(function):
            bucket.cost += money

    # --- asking

    def summary(self, function: Who) -> Summary | None:
        """None: what it did is not known, because it is counted among others."""
        number = self._number()
        series = self._functions.get(function)
        if series is not None:
            return series.sum().summary() if series.expire(number) else Summary()
        others = self._functions.get(OTHERS)
        is_among_others = others is not None and others.expire(number) and others.sum().requests
        return None if is_among_others else Summary()

    def total(self, functions: Iterable[Who] | None = None) -> tuple[Summary, list[Point]]:
        """Of everything, or of these functions as far as they have a series: the hour, and its buckets."""
        chosen = [self._all] if functions is None else [self._functions[f] for f in functions if f in self._functions]
        number = self._number()
        by_number: dict[int, Bucket] = {}
        hour = Bucket(-1)
        for series in chosen:
            if series.expire(number):
                hour.add(series.sum())
                for bucket in series.buckets():
                    by_number.setdefault(bucket.number, Bucket(bucket.number)).add(bucket)
        began = int(self._wall_clock()) - int(self._clock())
        return hour.summary(), [by_number[n].point(began + n * BUCKET_S) for n in sorted(by_number)]

    def _number(self) -> int:
        return int(self._clock() / BUCKET_S)

    def _now(self, function: Who) -> tuple[Bucket, Bucket]:
        number = self._number()
        return self._all.now(number), self._series(function, number).now(number - number % MINUTE)

    def _series(self, function: Who, number: int) -> Series:
        if (series := self._functions.get(function)) is not None:
            return series
        if function != OTHERS and len(self._functions) >= self._max_functions:
            self._functions = {name: each for name, each in self._functions.items() if each.expire(number)}
            if len(self._functions) >= self._max_functions:
                return self._series(OTHERS, number)
        return self._functions.setdefault(function, Series())
