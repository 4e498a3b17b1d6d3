"""The highest rate at which enough requests are still good: the same trace, faster and faster.

Time is compressed, so every adapter keeps its share and its burstiness. First by doubling, then by halving the gap on a
logarithmic scale, as every trial costs minutes. One trial is one sample: near the limit, chance decides.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from serverlesslora_loadgen.result import KneePoint, Result
from serverlesslora_loadgen.trace import TraceRequest

ATTAINMENT = 0.95
MAX_DOUBLINGS = 10
Trial = Callable[[float], Awaitable[Result]]  # at this speedup, over the trace's own


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """`best` is None where not even the slowest trial was good enough."""

    points: list[KneePoint]  # in the order they were tried
    best: KneePoint | None
    last: Result  # of the best, else of the last trial


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


def is_good(point: KneePoint, attainment: float) -> bool:
    """A trial in which the client fell behind says nothing good about the server."""
    return point.valid and point.attainment.value >= attainment


async def sweep(
    trial: Trial,
    *,
    rate_rps: float,
    attainment: float = ATTAINMENT,
    precision: float = 1.1,
    max_trials: int = 12,
    on_point: Callable[[KneePoint], None] = lambda _: None,
) -> Found:
    """`rate_rps`: of the trace as it is. Ends when the best rate is known within `precision`, or after `max_trials`."""
    points: list[KneePoint] = []
    best: tuple[KneePoint, Result] | None = None
    low, high = 0.0, math.inf
    speedup = 1.0
    last: Result | None = None
    while len(points) < max_trials and not (low and high / low <= precision):
        last = await trial(speedup)
        point = point_of(last, speedup, rate_rps * speedup)
        points.append(point)
        on_point(point)
        if is_good(point, attainment):
            low, best = speedup, (point, last)
        else:
            high = speedup
        if math.isinf(high):
            speedup *= 2
        elif low:
            speedup = math.sqrt(low * high)
        else:
            speedup = high / 2
        if not 2.0**-MAX_DOUBLINGS <= speedup <= 2.0**MAX_DOUBLINGS:
            break
    assert last is not None
    return Found(points=points, best=best[0] if best else None, last=best[1] if best else last)
