"""The highest rate at which enough requests are still good: the same trace, faster and faster.

Time is compressed, so every adapter keeps its share and its burstiness. First by doubling, then by halving the gap on a
logarithmic scale, as every trial costs minutes. One trial is one sample: near the limit, chance decides.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from serverlesslora_loadgen.analysis.objectives import INCORRECT
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.result import KneePoint, Result
from serverlesslora_loadgen.trace import TraceRequest

ATTAINMENT = 0.95
MAX_DOUBLINGS = 10
Trial = Callable[[float], Awaitable[Result]]  # at this speedup, over the trace's own


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """`best` is None where not even the slowest trial was good enough, `bound` where not even the fastest was not."""

    points: list[KneePoint]  # in the order they were tried
    best: KneePoint | None
    bound: KneePoint | None  # the lowest rate that was not good: the highest good one is below
    last: Result  # of the best, else of the last trial

    @property
    def ratio(self) -> float:
        """Within which the highest good rate is known; infinite without a bound or a best."""
        return self.bound.rate_rps / self.best.rate_rps if self.bound and self.best else math.inf


def compressed(requests: Sequence[TraceRequest], speedup: float) -> list[TraceRequest]:
    return [msgspec.structs.replace(each, timestamp=each.timestamp / speedup) for each in requests]


def point_of(result: Result, speedup: float, rate_rps: float) -> KneePoint:
    ttft = result.whole.latency.get("ttft")
    return KneePoint(
        rate_rps=rate_rps,
        speedup=speedup,
        attainment=result.whole.attainment,
        ttft_p50_s=ttft.percentiles["p50"].value if ttft is not None else None,
        ttft_p99_s=ttft.percentiles["p99"].value if ttft is not None else None,
        goodput_rps=result.whole.goodput_rps,
        valid=result.verdict.valid,
    )


def incorrect(result: Result) -> int:
    """Answers that are wrong whatever the rate; no share of good ones makes up for them."""
    return sum(result.whole.counts.failures.get(name, 0) for name in INCORRECT)


def is_good(result: Result, attainment: float) -> bool:
    """A trial in which the client fell behind says nothing good about the server."""
    return result.verdict.valid and result.whole.attainment.value >= attainment and not incorrect(result)


async def sweep(
    trial: Trial,
    *,
    rate_rps: float,
    attainment: float = ATTAINMENT,
    precision: float = 1.1,
    max_trials: int = 12,
    on_point: Callable[[KneePoint, Result], None] = lambda *_: None,
) -> Found:
    """`rate_rps`: of the trace as it is. Ends when the best rate is known within `precision`, or after `max_trials`.

    Raises LoadgenError when there is nothing to try.
    """
    if max_trials < 1:
        raise LoadgenError(f"a search of {max_trials} trials finds nothing; give 1 or more")
    points: list[KneePoint] = []
    best: tuple[KneePoint, Result] | None = None
    bound: KneePoint | None = None
    low, high, speedup = 0.0, math.inf, 1.0
    while True:
        result = await trial(speedup)
        point = point_of(result, speedup, rate_rps * speedup)
        points.append(point)
        on_point(point, result)
        if is_good(result, attainment):
            low, best = speedup, (point, result)
        else:
            high, bound = speedup, point
        if math.isinf(high):
            speedup *= 2
        elif low:
            speedup = math.sqrt(low * high)
        else:
            speedup = high / 2
        is_known = low > 0 and high / low <= precision
        if is_known or len(points) >= max_trials or not 2.0**-MAX_DOUBLINGS <= speedup <= 2.0**MAX_DOUBLINGS:
            found, last = best if best is not None else (None, result)
            return Found(points=points, best=found, bound=bound, last=last)
