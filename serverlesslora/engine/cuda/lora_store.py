"""Adapters on a device: pinned host memory behind them, a slot in the pointer tables while they are loaded.

An adapter's weights are one buffer, copied on a stream of its own so that running steps are not held up. The copy on
the device may be dropped when memory is short and comes back from host memory when a step needs it; its slot stays
its own until it is unloaded, so whatever refers to slots stays right.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from serverlesslora.engine.device import LoadedLora, Update
from serverlesslora.errors import AdapterInvalid
from serverlesslora_kernels.cuda.lora_table import LoraTables, PackedAdapter, ProjectionLayout
from serverlesslora_kernels.cuda.sgmv import BLOCK_ROWS, Scratch, Tiles, sgmv_rows, sgmv_tiles
from serverlesslora_kernels.segments import LoraPiece

if TYPE_CHECKING:
    from serverlesslora.engine.lora.batch import Batch
    from serverlesslora.engine.lora.projection import Projection

NUM_SLOTS = 512  # adapters one worker can hold; a slot costs some 30 KB of pointers on an 8B model
TOTAL_RANKS = (16, 32, 64)  # one of each kind that the tiles form is compiled for
MAX_ROWS_RANK = 1024  # sum of ranks over the sites of one projection that the decode kernels' scratch has room for


class DeviceLora:
    """One adapter. `weights` is None while it lives in host memory only."""

    def __init__(self, packed: PackedAdapter, slot: int) -> None:
        self.packed = packed
        self.slot = slot
        self.weights: Tensor | None = None  # uint8, on the device
        self.ready: Any = None  # event of the copy, until the first step that uses it

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


class Copies:
    """Host to device on a stream of their own; on host memory they happen at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, source: Tensor) -> tuple[Tensor, Any]:
        """The copy, and the event after which it is there. Raises torch.OutOfMemoryError."""
        if self._stream is None:
            return source.to(self._device, copy=True), None
        with torch.cuda.stream(self._stream):
            copy = torch.empty_like(source, device=self._device)
            copy.copy_(source, non_blocking=True)
            return copy, self._stream.record_event()

    def await_on_main(self, copy: Tensor, event: Any) -> None:
        """The main stream goes on after the copy; nobody else waits."""
        if event is not None:
            main = torch.cuda.current_stream(self._device)
            main.wait_event(event)
            copy.record_stream(main)


class DeviceLoraStore:
    def __init__(self, projections: Sequence[Projection], device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._index = {projection: index for index, projection in enumerate(projections)}
        self._layouts = [
            ProjectionLayout(projection.in_features, tuple(projection.columns)) for projection in projections
        ]
        self._tables = LoraTables(self._layouts, NUM_SLOTS, dtype, device)
        self._free = list(range(NUM_SLOTS - 1, -1, -1))
        self._resident: OrderedDict[DeviceLora, None] = OrderedDict()  # least recently used first
        self._copies = Copies(device)
        self.num_evictions = 0

    def load(self, pieces: Mapping[Projection, Sequence[LoraPiece]], dtype: torch.dtype) -> DeviceLora:
        """Packs into host memory and starts the copy. Raises AdapterInvalid when all slots are taken."""
        if not self._free:
            raise AdapterInvalid(f"this worker holds {NUM_SLOTS} adapters already: unload one first")
        by_index: list[Sequence[LoraPiece]] = [()] * len(self._layouts)
        for projection, group in pieces.items():
            by_index[self._index[projection]] = group
        try:
            packed = PackedAdapter.pack(by_index, self._layouts, dtype, pin=self._device.type == "cuda")
        except ValueError as error:
            raise AdapterInvalid(f"its factors do not fit this backbone: {error}") from error
        lora = DeviceLora(packed, self._free.pop())
        if packed.nbytes:
            with contextlib.suppress(torch.OutOfMemoryError):  # then it comes when it is used, in somebody's place
                lora.weights, lora.ready = self._copies.start(packed.host)
        return lora

    def unload(self, lora: LoadedLora) -> None:
        lora = cast(DeviceLora, lora)
        self._evict(lora)
        self._free.append(lora.slot)
        lora.slot = -1

    def require(self, loras: Sequence[LoadedLora]) -> None:
        wanted = cast(Sequence[DeviceLora], loras)
        for lora in wanted:
            if lora in self._resident:
                self._resident.move_to_end(lora)
            elif lora.packed.nbytes:
                self._make_resident(lora, wanted)

    def update(self, projection: Projection, entries: Sequence[tuple[int, int, LoadedLora]], batch: Batch) -> Update:
        index = self._index[projection]
        tiles: Tiles | None = batch.plans.get(self)
        if tiles is None:
            segments = [
                (start, end, cast(DeviceLora, adapter.lora).slot)
                for start, end, adapter in batch.adapted
                if adapter is not None
            ]
            tiles = batch.plans[self] = Tiles.build(segments, self._device)
        rank = max(cast(DeviceLora, lora).packed.total_rank(index) for _, _, lora in entries)
        return TilesUpdate(self._tables.table(index), self._layouts[index], tiles, rank)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Have every form that prompts may need compiled and loaded now: an empty slot, so nothing is computed."""
        blank = torch.zeros(1, 3, dtype=torch.int32, device=self._device)
        for layout, index in {layout: index for index, layout in enumerate(self._layouts)}.items():
            x = torch.zeros(16, layout.in_features, dtype=dtype, device=self._device)
            y = torch.zeros(16, layout.width, dtype=dtype, device=self._device)
            for block_rows in BLOCK_ROWS:
                for total_rank in TOTAL_RANKS:
                    tiles = Tiles(blank, block_rows, rows=0)
                    sgmv_tiles(y, x, self._tables.table(index), layout, tiles, total_rank)

    def rows_update(self, projection: Projection, row_slots: Tensor, scratch: Scratch) -> Update:
        index = self._index[projection]
        return RowsUpdate(self._tables.table(index), self._layouts[index], row_slots, scratch)

    def create_scratch(self, rows: int) -> Scratch:
        widest = max(layout.in_features for layout in self._layouts)
        return Scratch.allocate(rows, widest, MAX_ROWS_RANK, self._device)

    @property
    def resident_bytes(self) -> int:
        return sum(lora.nbytes for lora in self._resident)

    def drop_unused(self, keep: Iterable[LoadedLora] = ()) -> int:
        """Leave only host copies of all but `keep`; returns the bytes freed on the device."""
        kept = {id(lora) for lora in keep}
        return sum(self._evict(lora) for lora in list(self._resident) if id(lora) not in kept)

    def _make_resident(self, lora: DeviceLora, wanted: Sequence[DeviceLora]) -> None:
        while lora.weights is None:
            try:
                lora.weights, lora.ready = self._copies.start(lora.packed.host)
            except torch.OutOfMemoryError:
                victim = next((other for other in self._resident if other not in wanted), None)
                if victim is None:
                    raise
                self._evict(victim)
                self.num_evictions += 1
        self._copies.await_on_main(lora.weights, lora.ready)
        lora.ready = None
        self._tables.assign(lora.slot, lora.packed.fields(lora.weights.data_ptr()))
        self._resident[lora] = None

    def _evict(self, lora: DeviceLora) -> int:
        if lora in self._resident:
            del self._resident[lora]
            self._tables.clear(lora.slot)
        freed = 0 if lora.weights is None else lora.nbytes
        if lora.ready is not None:  # copied but never used: the copy must have ended before its memory is reused
            lora.ready.synchronize()
        lora.weights = lora.ready = None
        return freed


class TilesUpdate:
    """For packed segments of any length."""

    def __init__(self, table: Tensor, layout: ProjectionLayout, tiles: Tiles, max_total_rank: int) -> None:
        self._table = table
        self._layout = layout
        self._tiles = tiles
        self._max_total_rank = max_total_rank

    def apply(self, y: Tensor, x: Tensor) -> None:
        sgmv_tiles(y, x, self._table, self._layout, self._tiles, self._max_total_rank)


class RowsUpdate:
    """For decode: every row names its slot in memory, so the launch itself never changes."""

    def __init__(self, table: Tensor, layout: ProjectionLayout, row_slots: Tensor, scratch: Scratch) -> None:
        self._table = table
        self._layout = layout
        self._row_slots = row_slots
        self._scratch = scratch

    def apply(self, y: Tensor, x: Tensor) -> None:
        sgmv_rows(y, x, self._table, self._layout, self._row_slots, self._scratch)
