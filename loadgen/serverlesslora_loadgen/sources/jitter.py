"""Times of a coarse clock, spread over its steps.

A log that keeps whole seconds, or one line of every three seconds, shows requests in piles that never arrived so; sent
as they stand, they would measure how a server stands volleys.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from serverlesslora_loadgen.sources.options import to_ms
from serverlesslora_loadgen.trace import TraceRequest

COARSE_MS = 1000.0  # finer steps are not told from a real clock's
PILE = 2.0  # requests at the same time, on average, from which a clock counts as coarse
FEWEST = 50  # requests; less show nothing


def clock_step_ms(times_ms: Sequence[float]) -> float | None:
    """Of a clock so coarse that requests pile up; None when it is not. `times_ms` in any order.

    The median gap between different times: Mooncake's conversation trace has steps of 3 s, some of them 1 ms off.
    """
    different = np.unique(np.asarray(times_ms, dtype=np.float64))
    if len(times_ms) < max(FEWEST, PILE * len(different)) or len(different) < 2:
        return None
    step = float(np.median(np.diff(different)))
    return step if step >= COARSE_MS else None


def spread(requests: Sequence[TraceRequest], step_ms: float, seed: int) -> list[TraceRequest]:
    """Each later by up to a step, uniformly; in the new order of time."""
    offsets = np.random.default_rng([seed, 0]).random(len(requests)) * step_ms
    later = [
        msgspec.structs.replace(request, timestamp=to_ms((request.timestamp + offset) / 1000))
        for request, offset in zip(requests, offsets.tolist(), strict=True)
    ]
    return sorted(later, key=lambda request: request.timestamp)


def note(step_ms: float, seed: int, chosen: bool) -> str:
    """What a report has to say of it. `chosen`: by a person, not found in the file."""
    why = "as asked" if chosen else f"since the times of the source are whole steps of {step_ms / 1000:g} s"
    return f"every request was put off by up to {step_ms:g} ms at random (uniform, seed {seed}), {why}"
