"""What differs between two sets of requests, how sure that is, and `no difference` where nothing is.

Differences are resampled in blocks of neighbours in time, because requests that wait in one queue are late together
(circular block bootstrap: D. Politis and J. Romano, 1992). When both sets are the same requests the same blocks are
drawn from both, so that what the trace does to both falls out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from serverlesslora_loadgen.analysis import statistics
from serverlesslora_loadgen.analysis.columns import Floats

Verdict = Literal[
    "A faster",
    "B faster",
    "A better",  # of shares
    "B better",
    "no difference",
    "n too small",
    "no verdict",  # a run is not valid, or the one ahead gave answers that were not correct
]

PERCENTILES = ("p50", "p99")
MIN_SHARE = 0.01  # of a time: less is not worth a name, two runs of one server differ by as much
MOST_RESAMPLES, LEAST_RESAMPLES = 2000, 200
WORK = 20_000_000  # values drawn for one latency, about; more requests, fewer resamples
CHUNK = 1_000_000  # values at a time
SEED = 2049


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, or shares. None: without bounds, as so many were not answered."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None  # b - a
    low: float | None  # of the difference, 95 %
    high: float | None
    n_a: int
    n_b: int
    verdict: Verdict


class Pair(NamedTuple):
    """One value per request, in the order of time. ∞: not answered; NaN: nothing to measure."""

    a: Floats
    b: Floats


def times(
    latency: str, values: Pair, *, paired: bool, least_s: float, withheld: Collection[Verdict]
) -> Iterator[Difference]:
    """Of percentiles. Less than `least_s` is no difference. `withheld`: verdicts that may not be given."""
    if paired:
        both = ~np.isnan(values.a) & ~np.isnan(values.b)
        values = Pair(values.a[both], values.b[both])
    else:
        values = Pair(*(each[~np.isnan(each)] for each in values))
    shares = [statistics.SHARES[name] for name in PERCENTILES]
    sizes = len(values.a), len(values.b)
    if not min(sizes):
        for name in PERCENTILES:
            yield _difference(
                f"{latency} {name}", math.inf, math.inf, (-math.inf, math.inf), sizes, "n too small", withheld
            )
        return
    drawn = resampled(values, lambda chosen: _percentiles(chosen, shares), paired=paired)
    for number, (name, share) in enumerate(zip(PERCENTILES, shares, strict=True)):
        a, b = (float(_percentiles(each[None, :], [share])[0, 0]) for each in values)
        low, high = statistics.middle(np.sort(drawn[:, number]))
        found: Verdict = "no difference"
        if not all(statistics.is_enough(n, share) for n in sizes):
            found = "n too small"
        elif max(low, -high) > 0 and abs(_minus(b, a)) > max(least_s, MIN_SHARE * min(a, b)):
            found = "A faster" if low > 0 else "B faster"
        yield _difference(f"{latency} {name}", a, b, (low, high), sizes, found, withheld)


def share(metric: str, values: Pair, *, paired: bool, withheld: Collection[Verdict]) -> Difference:
    """Of zeros and ones; more is better."""
    sizes = len(values.a), len(values.b)
    a, b = (float(each.mean()) if len(each) else 0.0 for each in values)
    if not all(statistics.is_enough(n, Fraction(1, 2)) for n in sizes):
        return _difference(metric, a, b, (-math.inf, math.inf), sizes, "n too small", withheld)
    drawn = resampled(values, _mean, paired=paired)
    low, high = statistics.middle(np.sort(drawn[:, 0]))
    found: Verdict = "B better" if low > 0 else "A better" if high < 0 else "no difference"
    return _difference(metric, a, b, (low, high), sizes, found, withheld)


def _mean(rows: Floats) -> Floats:
    means: Floats = rows.mean(axis=1, keepdims=True)
    return means


def _difference(
    metric: str,
    a: float,
    b: float,
    bounds: tuple[float, float],
    sizes: tuple[int, int],
    found: Verdict,
    withheld: Collection[Verdict],
) -> Difference:
    def bounded(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return Difference(
        metric=metric,
        a=bounded(a),
        b=bounded(b),
        difference=bounded(b - a) if math.isfinite(a) and math.isfinite(b) else None,
        low=bounded(bounds[0]),
        high=bounded(bounds[1]),
        n_a=sizes[0],
        n_b=sizes[1],
        verdict="no verdict" if found in withheld else found,
    )


def _minus(b: float, a: float) -> float:
    """Two that were never reached do not differ."""
    return 0.0 if b == a else b - a


def _percentiles(values: Floats, shares: Sequence[Fraction]) -> Floats:
    """Of each row, nearest-rank."""
    at = [statistics.rank(values.shape[1], share) - 1 for share in shares]
    found: Floats = np.partition(values, sorted(set(at)), axis=1)[:, at]
    return found


def resampled(values: Pair, estimate: Callable[[Floats], Floats], *, paired: bool) -> Floats:
    """Differences b - a of an estimate, one resample a row. `estimate` takes resamples as rows."""
    n = max(len(values.a), len(values.b))
    count = max(LEAST_RESAMPLES, min(MOST_RESAMPLES, WORK // n))
    rng = np.random.default_rng(SEED)
    rows, drawn = max(1, CHUNK // n), []
    for begin in range(0, count, rows):
        size = min(rows, count - begin)
        at_a = _blocks(rng, len(values.a), size)
        at_b = at_a if paired else _blocks(rng, len(values.b), size)
        of_a, of_b = estimate(values.a[at_a]), estimate(values.b[at_b])
        with np.errstate(invalid="ignore"):  # ∞ - ∞, which is not looked at
            drawn.append(np.where(of_a == of_b, 0.0, of_b - of_a))
    return np.concatenate(drawn)


def _blocks(rng: np.random.Generator, n: int, rows: int) -> NDArray[np.intp]:
    """Places among n: runs of √n neighbours from anywhere, the first following the last. [rows, n]"""
    length = max(1, math.isqrt(n))
    starts = rng.integers(0, n, (rows, math.ceil(n / length)))
    places = (starts[:, :, None] + np.arange(length)) % n
    return places.reshape(rows, -1)[:, :n]
