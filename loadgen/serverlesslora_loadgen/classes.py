"""How regularly each adapter is asked: the coefficient of variation of its gaps, and the class that follows from it.

The three classes are those of ServerlessLoRA's evaluation (arXiv 2505.14468): Predictable, Normal, Bursty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from serverlesslora_loadgen.trace import TraceRequest

Class = Literal["Predictable", "Normal", "Bursty"]

CLASSES: tuple[Class, ...] = ("Predictable", "Normal", "Bursty")
PREDICTABLE_MAX, NORMAL_MAX = 1.0, 4.0  # of the coefficient of variation, both inclusive
MIN_ARRIVALS = 15  # with fewer the coefficient says more about chance than about the adapter

# The class of most functions hangs on how the coefficient is taken, so every claim about classes goes with this.
DEFINITION = (
    "The class of an adapter is that of its CV, the standard deviation of the gaps between its requests over their mean"
    " (population values, each request at its own time in the trace, over the part of the trace that is used, at least"
    f" {MIN_ARRIVALS} requests): Predictable up to {PREDICTABLE_MAX:g}, Normal up to {NORMAL_MAX:g}, Bursty above."
)


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True, rename={"class_": "class"}):
    """How one adapter is asked in a trace."""

    model: str
    n: int  # requests
    rate_rps: float  # over the whole trace
    share: float  # of all requests
    cv: float | None  # of the gaps; None: too few requests to say
    class_: Class | None
    silence_max_s: float  # longest time without a request of it, from the start of the trace to its last request


def cv(times_s: ArrayLike) -> float | None:
    """Standard deviation of the gaps over their mean, whatever the unit; `times_s` ascends.

    None below MIN_ARRIVALS, or when all come at once. For m gaps it is at most √(m - 1), when all but one are 0.
    """
    times = np.asarray(times_s, dtype=np.float64)
    if len(times) < MIN_ARRIVALS:
        return None
    gaps = np.diff(times)
    mean = float(gaps.mean())
    return float(gaps.std()) / mean if mean > 0 else None


def class_of(cv: float) -> Class:
    return "Predictable" if cv <= PREDICTABLE_MAX else "Normal" if cv <= NORMAL_MAX else "Bursty"


def adapter_facts(requests: Sequence[TraceRequest]) -> list[AdapterFacts]:
    """The most asked first; equally asked by name. `requests` in the order of time, as in every trace."""
    times: dict[str, list[float]] = defaultdict(list)
    for request in requests:
        times[request.model].append(request.timestamp / 1000)
    end_s = requests[-1].timestamp / 1000 if requests else 0.0
    facts = [_facts(model, each, end_s, len(requests)) for model, each in times.items()]
    return sorted(facts, key=lambda each: (-each.n, each.model))


def _facts(model: str, times_s: list[float], end_s: float, total: int) -> AdapterFacts:
    found = cv(times_s)
    return AdapterFacts(
        model=model,
        n=len(times_s),
        rate_rps=len(times_s) / end_s if end_s > 0 else 0.0,
        share=len(times_s) / total,
        cv=found,
        class_=None if found is None else class_of(found),
        silence_max_s=float(np.diff([0.0, *times_s, end_s]).max()),
    )
