"""Stretches of time: their union, and sums over them of what was seen only now and then."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """[begin, end), seconds after the start of the run."""

    begin: float
    end: float


def union(spans: Iterable[Span], *, within: Span) -> list[Span]:
    """What at least one of them covers, in order, apart from each other."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        begin, end = max(begin, within.begin), min(end, within.end)
        if end <= begin:
            continue
        if merged and begin <= merged[-1].end:
            merged[-1] = Span(merged[-1].begin, max(end, merged[-1].end))
        else:
            merged.append(Span(begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Seconds, of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


class Level:
    """A quantity seen at some moments: straight lines between them, level before the first and after the last."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """`points`: (time, value), in order, at least one."""
        self._times = [at for at, _ in points]
        self._values = [float(value) for _, value in points]
        areas = ((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        self._areas = list(itertools.accumulate(areas, initial=0.0))  # from the first point to each

    def at(self, time: float) -> float:
        after = bisect.bisect_right(self._times, time)
        if after == 0:
            return self._values[0]
        if after == len(self._times):
            return self._values[-1]
        begin, end = self._times[after - 1], self._times[after]
        low, high = self._values[after - 1], self._values[after]
        return low + (high - low) * (time - begin) / (end - begin)

    def sum_over(self, spans: Iterable[Span]) -> float:
        """∫ value dt over spans that do not overlap."""
        return sum(self._area_until(end) - self._area_until(begin) for begin, end in spans)

    def _area_until(self, time: float) -> float:
        """∫ from the first point, negative before it."""
        before = max(0, bisect.bisect_right(self._times, time) - 1)
        return self._areas[before] + (time - self._times[before]) * (self._values[before] + self.at(time)) / 2
