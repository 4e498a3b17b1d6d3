"""Estimates and what they are worth: nearest-rank percentiles, 95 % intervals, fairness.

Intervals are those of the bootstrap, but hardly anything is resampled, because for these estimates it is known what
resampling would give, at a cost that does not grow with the number of values:

- The k-th smallest of n values drawn from n has rank ⌈n U⌉, where U is the k-th smallest of n uniform numbers, which is
  Beta(k, n - k + 1) (A. Hutson and M. Ernst, "The exact bootstrap mean and variance of an L-estimator", 2000).
- The mean of n values drawn from n has the variance m₂ / n and the third cumulant m₃ / n², and its quantiles follow
  from these by a Cornish-Fisher expansion (P. Hall, "The Bootstrap and Edgeworth Expansion", 1992).
- A share gets Wilson's interval instead: resampling ten good requests of ten finds no doubt at all.

All take requests to be independent. Neighbours in a queue are not, so true intervals are rather wider than these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serverlesslora_loadgen.result import Distribution, Estimate, Histogram

Floats = NDArray[np.float64]

SHARES: Mapping[str, Fraction] = {
    "p50": Fraction(1, 2),
    "p90": Fraction(9, 10),
    "p95": Fraction(19, 20),
    "p99": Fraction(99, 100),
    "p99.9": Fraction(999, 1000),
    "max": Fraction(1),
}
BEYOND = 5  # values that must lie beyond a percentile before an interval around it means anything
FEW = 5  # below it, a mean has no interval
Z = 1.959964  # of the normal distribution, 97.5 %
DRAWS = 2000
SEED = 2049


def rank(n: int, share: Fraction) -> int:
    """Of a nearest-rank percentile, from 1: the smallest that at least `share` of n values do not exceed."""
    return max(1, math.ceil(share * n))


def is_enough(n: int, share: Fraction) -> bool:
    """Whether n values can tell where this percentile lies."""
    return n * (1 - share) >= BEYOND


@functools.lru_cache(maxsize=1 << 14)
def rank_interval(n: int, share: Fraction) -> tuple[int, int]:
    """Ranks between which 95 % of the bootstrap's percentiles lie; they hang on the number of values alone."""
    k = rank(n, share)
    ranks = np.sort(np.ceil(n * np.random.default_rng((SEED, n, k)).beta(k, n - k + 1, DRAWS)))
    low, high = middle(ranks)
    return max(1, int(low)), min(n, int(high))


def middle(ordered: Floats) -> tuple[float, float]:
    """The bounds of the middle 95 % of what ascends."""
    low, high = (rank(len(ordered), share) for share in (Fraction(1, 40), Fraction(39, 40)))
    return float(ordered[low - 1]), float(ordered[high - 1])


def percentile(ordered: Floats, share: Fraction) -> Estimate:
    """Of at least one value; they ascend."""
    n = len(ordered)
    value = float(ordered[rank(n, share) - 1])
    if not is_enough(n, share):
        return Estimate(value, n)
    low, high = rank_interval(n, share)
    return Estimate(value, n, float(ordered[low - 1]), float(ordered[high - 1]))


def mean(ordered: Floats) -> Estimate:
    """Of at least one value; they ascend."""
    n, value = len(ordered), float(ordered.mean())
    if n < FEW:
        return Estimate(value, n)
    off = ordered - value
    variance = float(np.dot(off, off)) / n
    if variance <= 0:
        return Estimate(value, n, value, value)
    error = math.sqrt(variance / n)
    skew = float(np.dot(off * off, off)) / n / variance**1.5 / math.sqrt(n)
    bend = (Z * Z - 1) * skew / 6  # at most a half in size, so the bounds never pass each other
    low, high = value + error * (bend - Z), value + error * (bend + Z)
    return Estimate(value, n, max(low, float(ordered[0])), min(high, float(ordered[-1])))


def distribution(values: Floats) -> Distribution:
    """NaN is no value. Of nothing, n is 0 and there are no percentiles."""
    ordered = np.sort(values[~np.isnan(values)])
    if not len(ordered):
        return Distribution(n=0, mean=Estimate(0.0, 0), percentiles={})
    return Distribution(
        n=len(ordered),
        mean=mean(ordered),
        percentiles={name: percentile(ordered, share) for name, share in SHARES.items()},
    )


def share(hits: int, n: int) -> Estimate:
    """With Wilson's interval (E. B. Wilson, 1927)."""
    if n == 0:
        return Estimate(0.0, 0)
    found, spread = hits / n, Z * Z / n
    centre = (found + spread / 2) / (1 + spread)
    half = math.sqrt(spread * found * (1 - found) + spread**2 / 4) / (1 + spread)
    return Estimate(found, n, min(found, max(0.0, centre - half)), max(found, min(1.0, centre + half)))


def jain(values: Sequence[float]) -> float | None:
    """(Σx)² / (n Σx²): 1 when all have the same, 1/n when one has all (R. Jain, 1984). None when nobody has any."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0 else None


def histogram(values: Floats, edges: Sequence[float]) -> Histogram:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(list(edges), counts.tolist())


def curve(values: ArrayLike) -> list[float]:
    """Values at 0, 1, … 100 %: seen ones, 0 % is the smallest. Empty when there are none. NaN is no value."""
    found = np.asarray(values, dtype=np.float64)
    ordered = np.sort(found[~np.isnan(found)])
    at = [rank(len(ordered), Fraction(percent, 100)) - 1 for percent in range(101)]
    return [float(value) for value in ordered[at]] if len(ordered) else []


def nice_step(seconds: float, most: int) -> float:
    """The shortest step that people count in of which at most `most` fill the time."""
    for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400):
        if seconds <= step * most:
            return float(step)
    return float(86400 * math.ceil(seconds / most / 86400))
