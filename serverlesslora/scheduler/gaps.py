"""How long a function is usually silent: its gaps between arrivals, in a histogram with logarithmic bins.

Arrivals less than `BURST_S` apart are one burst: nothing can be started or stopped in between, so what is kept are the
gaps between bursts. A histogram rather than a fitted distribution, as in "Serverless in the Wild" (Shahrad et al.,
USENIX ATC'20, section 4.2); logarithmic bins make 48 numbers reach from half a second to 36 hours.
"""

from __future__ import annotations

import itertools
import math
from array import array
from operator import mul
from typing import NamedTuple

import msgspec

BURST_S = 0.5
BINS_PER_OCTAVE = 8 / 3  # a bin is 30 % wide
NUM_BINS = 48
MIN_GAPS = 4  # with fewer seen, a histogram says nothing

# Half of everything is forgotten when this much was counted: shares stay what they were, and new habits show.
FORGET_AT = 512.0

EDGES: tuple[float, ...] = tuple(BURST_S * 2.0 ** (i / BINS_PER_OCTAVE) for i in range(NUM_BINS + 1))
_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(EDGES))
_SCALE = BINS_PER_OCTAVE / math.log(2)


class Ahead(NamedTuple):
    """What the gaps say of the next seconds of a silence that has lasted for some time."""

    survivors: float  # weight of the gaps that were at least as long: how much this is worth
    share: float  # of these, those that end within the horizon
    quiet_s: float  # expected silence within the horizon


class GapsSnapshot(msgspec.Struct, frozen=True):
    bins: tuple[tuple[int, float], ...]  # (index, weight) of those that are not empty
    count: int
    mean_s: float
    jitter_s: float


class Gaps:
    """About 500 bytes, whatever happens."""

    __slots__ = ("_bins", "_weight", "count", "jitter_s", "mean_s")

    def __init__(self) -> None:
        self._bins = array("f", bytes(4 * NUM_BINS))
        self._weight = 0.0
        self.count = 0  # ever
        # The usual gap and how far gaps stray from it, smoothed as TCP does for round trips (Jacobson, SIGCOMM'88,
        # gains 1/8 and 1/4): for regular gaps far finer than a bin.
        self.mean_s = 0.0
        self.jitter_s = 0.0

    def add(self, gap_s: float) -> bool:
        """`gap_s` is at least BURST_S. True when half of everything was forgotten."""
        self._bins[min(NUM_BINS - 1, max(0, int(math.log(gap_s / BURST_S) * _SCALE)))] += 1.0
        self.count = count = self.count + 1
        error = gap_s - self.mean_s
        self.mean_s += error / (count if count < 8 else 8)
        if count > 1:
            self.jitter_s += (abs(error) - self.jitter_s) / (count - 1 if count < 5 else 4)
        self._weight += 1.0
        if self._weight < FORGET_AT:
            return False
        self._bins = array("f", [weight / 2 for weight in self._bins])
        self._weight /= 2
        return True

    @property
    def is_telling(self) -> bool:
        return self.count >= MIN_GAPS

    @property
    def weight(self) -> float:
        return self._weight

    def ahead(self, age_s: float, horizon_s: float) -> Ahead:
        """From the bins, within which gaps are taken to be spread evenly over the logarithm of their length; while the
        last gaps were so regular that a bin is too coarse, from their mean and jitter, until the time is over."""
        spread_s = 2 * self.jitter_s + 0.02 * self.mean_s
        if spread_s < self.mean_s / 8 and age_s < self.mean_s + spread_s and self.is_telling:
            return self._ahead_of_regular(age_s, age_s + horizon_s, spread_s)
        bins = self._bins
        end_s = age_s + horizon_s
        i, beyond_age = _locate(age_s)
        if i == NUM_BINS:
            return Ahead(0.0, 0.0, horizon_s)
        j, beyond_end = _locate(end_s)
        if i == j:
            within = bins[i] * max(0.0, beyond_age - beyond_end)
            quiet = within * horizon_s / 2
            tail = bins[i] * beyond_end + sum(bins[i + 1 :])
        else:
            first = bins[i] * beyond_age
            middle = bins[i + 1 : j]
            within = sum(middle)
            quiet = first * ((max(age_s, EDGES[i]) + EDGES[i + 1]) / 2 - age_s)
            quiet += sum(map(mul, middle, _MIDDLES[i + 1 : j])) - within * age_s
            within += first
            tail = 0.0
            if j < NUM_BINS:
                last = bins[j] * (1 - beyond_end)
                within += last
                quiet += last * ((EDGES[j] + end_s) / 2 - age_s)
                tail = bins[j] * beyond_end + sum(bins[j + 1 :])
        survivors = within + tail
        if survivors <= 0:
            return Ahead(0.0, 0.0, horizon_s)
        return Ahead(survivors, within / survivors, min(horizon_s, (quiet + tail * horizon_s) / survivors))

    def _ahead_of_regular(self, age_s: float, end_s: float, spread_s: float) -> Ahead:
        """The gap ends at any time within `spread_s` of the mean with the same probability."""
        low, high = self.mean_s - spread_s, self.mean_s + spread_s
        start, stop = max(age_s, low), min(max(end_s, low), high)
        silent_start, silent_stop = (high - start) / (2 * spread_s), (high - stop) / (2 * spread_s)
        quiet_s = min(end_s, start) - age_s + (1 + silent_stop / silent_start) / 2 * max(0.0, stop - start)
        return Ahead(self._weight * silent_start, 1 - silent_stop / silent_start, min(end_s - age_s, quiet_s))

    def beyond(self, gap_s: float) -> float:
        """Weight of the gaps longer than this."""
        i, share = _locate(gap_s)
        return float(self._bins[i] * share + sum(self._bins[i + 1 :])) if i < NUM_BINS else 0.0

    def quantile(self, q: float, *, longer_than_s: float = 0.0, up_to_s: float = math.inf) -> float | None:
        """Of the gaps between the two bounds; None with fewer than MIN_GAPS seen, or next to none between them."""
        top = self.beyond(longer_than_s)
        bottom = self.beyond(up_to_s)
        if not self.is_telling or top - bottom < 1e-3 * self._weight:
            return None
        wanted = top - q * (top - bottom)  # weight that lies beyond the quantile
        beyond = 0.0
        for i in range(NUM_BINS - 1, -1, -1):
            if self._bins[i] and beyond + self._bins[i] >= wanted:
                share = (wanted - beyond) / self._bins[i]
                value: float = EDGES[i + 1] * (EDGES[i] / EDGES[i + 1]) ** share
                return min(max(value, longer_than_s), up_to_s)
            beyond += self._bins[i]
        return max(EDGES[0], longer_than_s)  # rounding ate the last of it

    def cv(self) -> float | None:
        """Coefficient of variation; 0 for gaps that all lie in one bin. None with fewer than MIN_GAPS seen."""
        if not self.is_telling:
            return None
        total = sum(self._bins)
        mean = sum(map(mul, self._bins, _MIDDLES)) / total
        variance = sum(weight * (middle - mean) ** 2 for weight, middle in zip(self._bins, _MIDDLES, strict=True))
        return float(math.sqrt(variance / total) / mean)

    def snapshot(self) -> GapsSnapshot:
        filled = tuple((i, weight) for i, weight in enumerate(self._bins) if weight)
        return GapsSnapshot(filled, self.count, self.mean_s, self.jitter_s)

    @classmethod
    def restore(cls, snapshot: GapsSnapshot) -> Gaps:
        gaps = cls()
        for index, weight in snapshot.bins:
            gaps._bins[index] = weight
        gaps._weight = sum(gaps._bins)
        gaps.count, gaps.mean_s, gaps.jitter_s = snapshot.count, snapshot.mean_s, snapshot.jitter_s
        return gaps


def _locate(gap_s: float) -> tuple[int, float]:
    """The bin a length falls into, and the share of that bin that is longer."""
    if gap_s <= BURST_S:
        return 0, 1.0
    position = math.log(gap_s / BURST_S) * _SCALE if gap_s < EDGES[-1] else NUM_BINS
    index = int(position)
    return (index, 1 - (position - index)) if index < NUM_BINS else (NUM_BINS, 0.0)
