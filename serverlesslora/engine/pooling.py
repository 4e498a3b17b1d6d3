"""A prompt as one vector: the hidden states behind the model's last norm, of the last token or the mean over all.

A prompt may come in several chunks, and after a preemption some of them again: each position counts once. The sum is
kept in float64, so that the mean does not depend on the chunks by more than the model's own rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from serverlesslora.engine.scheduler import Work
from serverlesslora.engine.sequence import Sequence


class HiddenStates(NamedTuple):
    """Row i of `rows` is prompt position `first` + i."""

    sequence: Sequence
    first: int
    rows: Tensor  # [n, hidden] in the model's dtype


class Pool:
    """What one request has collected so far."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, states: HiddenStates) -> bool:
        """False: there is a number among them that is not finite."""
        total = states.rows.sum(0, dtype=torch.float64 if states.rows.device.type == "cpu" else torch.float32)
        total = total.to("cpu", torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += states.rows.shape[0]
        return bool(torch.isfinite(total).all())

    def vector(self) -> bytes:
        """[hidden] float32, little endian, of length 1."""
        assert self._sum is not None
        mean = self._sum / self._count
        length = float(mean.norm())
        return (mean / length if length else mean).numpy().astype(np.dtype("<f4")).tobytes()


def wanted_positions(item: Work) -> range:
    """The positions of this work whose hidden states its request wants and has not had."""
    sequence = item.sequence
    if sequence.pooling is None:
        return range(0)
    first = sequence.num_prompt - 1 if sequence.pooling == "last" else sequence.num_pooled
    return range(max(item.start, first), max(item.end, first))


def hidden_states(work: list[Work], hidden: Tensor) -> list[HiddenStates]:
    """Of the packed batch `hidden` [rows, hidden], for those who pool."""
    found = []
    start = 0
    for item in work:
        positions = wanted_positions(item)
        if positions and positions.start < item.end:
            begin = start + positions.start - item.start
            found.append(HiddenStates(item.sequence, positions.start, hidden[begin : begin + len(positions)]))
            item.sequence.num_pooled = positions.stop
        start += item.num_tokens
    return found
