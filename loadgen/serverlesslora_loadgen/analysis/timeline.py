"""What happened when: per second for the whole run, and per adapter and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from serverlesslora_loadgen.analysis import statistics
from serverlesslora_loadgen.analysis.columns import Bools, Columns, Floats, Ints
from serverlesslora_loadgen.result import Heat, Timeline

if TYPE_CHECKING:
    from serverlesslora_loadgen.observe import Sample

MOST_STEPS = 7200  # two hours by the second; what is longer gets longer steps
MOST_COLUMNS = 60


def timeline(columns: Columns, seconds: float, samples: Sequence[Sample] = ()) -> Timeline:
    table = columns.table
    if not len(table):
        return Timeline(step_s=1.0, offered=[], sent=[], done=[], shed=[], failed=[], in_flight=[], cold={})
    # What never left keeps its time in the trace, also where a run was interrupted long before.
    due = ~table.unsent | (table.intended <= seconds)
    last_s = float(table.intended[due].max()) if due.any() else 0.0
    step_s = statistics.nice_step(max(seconds, last_s), MOST_STEPS)
    steps = max(math.ceil(seconds / step_s), int(last_s // step_s) + 1, 1)

    def per_step(times: Floats, where: Bools | None = None) -> Ints:
        chosen = times if where is None else times[where]
        chosen = chosen[~np.isnan(chosen)]
        return np.bincount(np.clip(chosen // step_s, 0, steps - 1).astype(np.int64), minlength=steps)

    has_left = ~np.isnan(table.written)
    in_flight = np.cumsum(per_step(table.written)) - np.cumsum(per_step(table.done, has_left))
    return Timeline(
        step_s=step_s,
        offered=per_step(table.intended, due).tolist(),
        sent=per_step(table.written).tolist(),
        done=per_step(table.done, table.ok).tolist(),
        shed=per_step(table.done, table.shed).tolist(),
        failed=per_step(table.done, table.failed).tolist(),
        in_flight=in_flight.tolist(),
        cold={
            kind: per_step(table.intended, mask).tolist()
            for code, kind in enumerate(columns.colds)
            if (mask := (table.cold == code) & due).any()
        },
        workers=_most(samples, lambda sample: sample.workers, step_s, steps),
        held_bytes=_most(samples, lambda sample: sample.held_bytes, step_s, steps),
    )


def _most(
    samples: Sequence[Sample], get: Callable[[Sample], int | None], step_s: float, steps: int
) -> list[int | None]:
    """The most that was seen in each step; empty when it was never seen."""
    found: list[int | None] = [None] * steps
    for sample in samples:
        step, value = math.floor(sample.at_s / step_s), get(sample)
        if value is not None and 0 <= step < steps:
            seen = found[step]
            found[step] = value if seen is None else max(seen, value)
    return found if any(value is not None for value in found) else []


def heat(columns: Columns) -> Heat:
    """Medians are nearest-rank, of those that were answered."""
    table, models = columns.table, columns.models
    if not len(table):
        return Heat(adapters=[], step_s=1.0, ttft_s=[])
    left = ~table.unsent
    end_s = float(table.intended[left].max() if left.any() else 0.0) + 1e-9
    wide = min(MOST_COLUMNS, max(1, math.ceil(end_s)))  # a column is not less than a second
    step_s = end_s / wide
    row: list[list[float | None]] = [[None] * wide for _ in models]
    answered = ~np.isnan(table.ttft)
    column = np.clip(table.intended[answered] // step_s, 0, wide - 1).astype(np.int64)
    cell, ttft = table.model[answered] * wide + column, table.ttft[answered]
    order = np.lexsort((ttft, cell))
    cells, starts, sizes = np.unique(cell[order], return_index=True, return_counts=True)
    medians = ttft[order][starts + (sizes + 1) // 2 - 1]
    for at, value in zip(cells.tolist(), medians.tolist(), strict=True):
        row[at // wide][at % wide] = value
    return Heat(adapters=list(models), step_s=step_s, ttft_s=row)
