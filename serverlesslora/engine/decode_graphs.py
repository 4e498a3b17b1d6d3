"""Decode steps as graphs: one per number of rows and with or without adapters, over memory that stays where it is.

What differs from one step to the next (tokens, positions, block tables, each row's adapter slot) is written into fixed
tensors before a replay. Adapters come and go without another capture, because a row only carries the number of a slot
in the pointer table. A step that does not fit any graph is computed eagerly: the answer is the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serverlesslora.engine.attention import PagedAttention
from serverlesslora.engine.graphs import Capture, Captured, NotCapturable
from serverlesslora.engine.lora import Adapter, LoraModel
from serverlesslora.engine.lora.projection import NOTHING, Projection, ProjectionPlan
from serverlesslora.engine.scheduler import Work

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows; a step is padded to the next of them


class FixedRows(Protocol):
    """The inputs of one bucket, at addresses that never change."""

    plan: Any  # for PagedAttention
    token_ids: Tensor  # int64 [1, rows]
    positions: Tensor  # int64 [1, rows]
    row_slots: Tensor  # int32 [rows], -1 is the bare backbone

    def fill(
        self,
        token_ids: Sequence[int],
        contexts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        slots: Sequence[int],
        tokens: Tensor | None = None,
    ) -> None:
        """Write the values of the next step; rows beyond them are idle. `tokens`, on the device, win over the ids."""


class GraphDevice(Protocol):
    """What a device with graphs offers besides `Device`."""

    def create_capture(self) -> Capture: ...

    def create_rows(self, rows: int, max_blocks: int, block_size: int) -> FixedRows: ...

    def fixed_plans(self, projections: Sequence[Projection], row_slots: Tensor) -> dict[Projection, ProjectionPlan]:
        """Plans that look up each row's slot in the pointer tables."""

    def slot_of(self, adapter: Adapter) -> int | None:
        """Its slot if the fixed plans can compute all it changes among projections; None otherwise."""


class _Key(NamedTuple):
    rows: int
    adapted: bool


class DecodeGraphs:
    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraModel,
        attention: PagedAttention,
        device: GraphDevice,
        *,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        self._model: Any = model
        self._lora = lora
        self._attention = attention
        self._device = device
        self._max_blocks = max_blocks
        last = next((size for size in BUCKETS if size >= max_rows), BUCKETS[-1])
        self.buckets = [size for size in BUCKETS if size <= last]
        self._rows: dict[int, FixedRows] = {}
        self._graphs: dict[_Key, Captured] = {}
        # A graph keeps no memory alive: what the plans point to must outlive it.
        self._plans: dict[_Key, dict[Projection, ProjectionPlan]] = {}
        # All graphs leave their logits here: each with an output of its own would keep a hundred megabytes.
        self._logits: Tensor | None = None
        self.refusal: str | None = None  # why this model cannot be captured

    @property
    def state(self) -> str:
        """For people: what decode steps run on."""
        if self.refusal is not None:
            return f"off: {self.refusal}"
        return f"on, up to {self.buckets[-1]} rows" if self._graphs else "not captured yet"

    def capture(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """All of them, the largest first: the smaller find their memory in its pool."""
        capture = self._device.create_capture()
        keys = [_Key(rows, adapted) for rows in reversed(self.buckets) for adapted in (True, False)]
        for done, key in enumerate(keys):
            try:
                self._graphs[key] = self._capture(key, capture)
            except NotCapturable as error:
                self.refusal = str(error)
                self._graphs.clear()
                self._plans.clear()
                self._rows.clear()
                return
            on_progress(done + 1, len(keys))

    def fits(self, work: Sequence[Work], adapters: Mapping[str, Adapter]) -> bool:
        if not self._graphs or len(work) > self.buckets[-1]:
            return False
        if not all(item.samples and item.end - item.start == 1 for item in work):
            return False
        digests = {item.sequence.adapter for item in work} - {""}
        return all(self._device.slot_of(adapters[digest]) is not None for digest in digests)

    def run(self, work: Sequence[Work], adapters: Mapping[str, Adapter], *, tokens: Tensor | None = None) -> Tensor:
        """[len(work), vocab], valid until the next step. `tokens` [len(work)] are the inputs the host does not know."""
        used = {item.sequence.adapter for item in work} - {""}
        self._lora.store.require([adapters[digest].lora for digest in used])
        slots = {digest: self._device.slot_of(adapters[digest]) for digest in used}
        bucket = self.buckets[bisect.bisect_left(self.buckets, len(work))]
        self._rows[bucket].fill(
            [item.sequence.token_ids[item.start] for item in work],
            [item.end for item in work],
            [item.sequence.block_ids for item in work],
            [-1 if (slot := slots.get(item.sequence.adapter)) is None else slot for item in work],
            tokens,
        )
        graph, logits = self._graphs[_Key(bucket, bool(used))]
        graph.replay()
        return logits[: len(work)]

    def _capture(self, key: _Key, capture: Capture) -> Captured:
        rows = self._rows.get(key.rows)
        if rows is None:
            rows = self._rows[key.rows] = self._device.create_rows(
                key.rows, self._max_blocks, self._attention.kv.block_size
            )
        plans = self._plans[key] = {}
        if key.adapted:
            plans.update(dict.fromkeys(self._lora.projections, NOTHING))
            inner = [projection for projection in self._lora.projections if not projection.is_output]
            plans |= self._device.fixed_plans(inner, rows.row_slots)

        @torch.inference_mode()
        def forward() -> Tensor:
            self._lora.batch.set_fixed(key.rows, plans)
            self._attention.begin(rows.plan)
            inputs = {"input_ids": rows.token_ids, "position_ids": rows.positions, "use_cache": False}
            logits: Tensor = self._model(**inputs).logits[0]
            self._attention.end()
            if self._logits is None:
                self._logits = logits.new_empty(self.buckets[-1], logits.shape[1])
            shared = self._logits[: key.rows]
            shared.copy_(logits)
            return shared

        return capture(forward)
