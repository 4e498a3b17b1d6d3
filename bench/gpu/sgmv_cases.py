"""Random adapters in device memory, as the SGMV kernels address them, and what they should compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serverlesslora_kernels.cuda.lora_table import LoraTables, PackedAdapter, ProjectionLayout
from serverlesslora_kernels.cuda.sgmv import Scratch, Tiles, sgmv_rows, sgmv_tiles
from serverlesslora_kernels.segments import LoraPiece

SCRATCH_RANK = 1024  # as the engine has it: one compiled kernel for all ranks
POPULARITY = ("distinct", "uniform", "skewed", "identical")


def layouts(hidden: int) -> dict[str, ProjectionLayout]:
    """The projections of a Llama of this hidden size; inner size as in the 8B."""
    kv, inner = hidden // 4, hidden * 7 // 2
    return {
        "qkv": ProjectionLayout(hidden, ((0, hidden), (hidden, kv), (hidden + kv, kv))),
        "gate_up": ProjectionLayout(hidden, ((0, inner), (inner, inner))),
        "down": ProjectionLayout(inner, ((0, hidden),)),
    }


def row_slots(num_adapters: int, *, small: bool) -> dict[str, list[int]]:
    """Which adapter each row has, sorted as a step packs them; -1 is the bare backbone."""
    several = [slot for slot in range(num_adapters) for _ in range(1 if small else 5)]
    return {
        "one row": [num_adapters - 1],
        "distinct": list(range(num_adapters)),
        "with bare rows": [-1, *several[:6], -1, *several[6:]],
        "long segments": [0] * (7 if small else 300) + [-1] * 3 + [1] * (5 if small else 129),
    }


def popular(name: str, rows: int, num_adapters: int) -> list[int]:
    """An adapter per row, grouped."""
    rng = random.Random(rows)
    match name:
        case "distinct":
            return sorted(row % num_adapters for row in range(rows))
        case "uniform":
            return sorted(rng.randrange(num_adapters) for _ in range(rows))
        case "skewed":  # Zipf with exponent 1.5
            weights = [1.0 / (slot + 1) ** 1.5 for slot in range(num_adapters)]
            return sorted(rng.choices(range(num_adapters), weights, k=rows))
        case _:
            return [0] * rows


class Adapters:
    """One adapter per entry of `ranks`, each on every layout (as if they were layers), each in its own slot.

    With `real` the weights are known on the host too, for the oracle, and the adapters lack some sites. Without, only
    the device's copies hold numbers, which is all that a time needs.
    """

    def __init__(
        self,
        projections: Sequence[ProjectionLayout],
        ranks: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        real: bool,
    ) -> None:
        self.layouts = list(projections)
        self.ranks = list(ranks)
        self.dtype = dtype
        self.device = device
        self._pieces: list[list[list[LoraPiece]]] = []  # by slot and layout
        self._packed: list[PackedAdapter] = []
        self._buffers: list[Tensor] = []  # the device's copies
        self._tables = LoraTables(self.layouts, len(ranks), dtype, device)
        self._scratch: dict[int, Scratch] = {}
        for slot, rank in enumerate(ranks):
            pieces = [self._pieces_of(layout, rank, slot, real) for layout in self.layouts]
            packed = PackedAdapter.pack(pieces, self.layouts, dtype, pin=False)
            buffer = packed.host.to(device)
            if not real:
                values = buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
                values.normal_(0.0, 0.02)
            self._tables.assign(slot, packed.fields(buffer.data_ptr()))
            self._packed.append(packed)
            self._buffers.append(buffer)
            if real:
                self._pieces.append(pieces)

    def _pieces_of(self, layout: ProjectionLayout, rank: int, slot: int, real: bool) -> list[LoraPiece]:
        pieces = []
        for index, (offset, width) in enumerate(layout.sites):
            if real and slot % 3 == 2 and len(layout.sites) > 1 and index == slot % len(layout.sites):
                continue  # this adapter leaves the site alone
            own = rank if not real or index == 0 else max(1, rank // 2)  # sites may differ in rank
            if real:
                a = torch.randn(own, layout.in_features) / layout.in_features**0.5
                b = torch.randn(width, own) / own**0.5
            else:
                a, b = torch.zeros(own, layout.in_features, dtype=self.dtype), torch.zeros(width, own, dtype=self.dtype)
            pieces.append(LoraPiece(a.to(self.dtype), b.to(self.dtype), 0.5 + slot % 3, offset))
        return pieces

    def width(self, index: int) -> int:
        return sum(width for _, width in self.layouts[index].sites)

    def traffic(self, index: int, slots: Sequence[int]) -> int:
        """Bytes that must move once: the weights of every adapter in use, x read, y read and written."""
        layout = self.layouts[index]
        used = sorted(set(slots) - {-1})
        weights = sum(
            self.ranks[slot] * (layout.in_features + width) * self.dtype.itemsize
            for slot in used
            for _, width in layout.sites
        )
        return weights + len(slots) * (layout.in_features + 2 * self.width(index)) * self.dtype.itemsize

    def flops(self, index: int, slots: Sequence[int]) -> int:
        layout = self.layouts[index]
        per_rank = sum(layout.in_features + width for _, width in layout.sites)
        return 2 * sum(self.ranks[slot] * per_rank for slot in slots if slot >= 0)

    def call(self, variant: str, index: int, y: Tensor, x: Tensor, slots: Sequence[int]) -> Callable[[], None]:
        """A launch that adds to y; everything it needs beside is made now, as a step makes it."""
        layout, table = self.layouts[index], self._tables.table(index)
        if variant == "rows":
            scratch = self._scratch.get(len(slots))
            if scratch is None:
                widest = max(each.in_features for each in self.layouts)
                scratch = self._scratch[len(slots)] = Scratch.allocate(len(slots), widest, SCRATCH_RANK, self.device)
            on_device = torch.tensor(slots, dtype=torch.int32, device=self.device)
            return lambda: sgmv_rows(y, x, table, layout, on_device, scratch)
        tiles = Tiles.build(segments_of(slots), self.device)
        rank = max(self._packed[slot].total_rank(index) for slot in set(slots) if slot >= 0)
        return lambda: sgmv_tiles(y, x, table, layout, tiles, rank)

    def oracle(self, index: int, y: Tensor, x: Tensor, slots: Sequence[int]) -> Tensor:
        result = y.double()
        for start, end, slot in segments_of(slots):
            for a, b, scale, offset in self._pieces[slot][index]:
                wide_a, wide_b = a.to(self.device).double(), b.to(self.device).double()
                update = (x[start:end].double() @ wide_a.T) @ wide_b.T
                result[start:end, offset : offset + len(b)] += scale * update
        return result


def segments_of(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, end, slot) of the runs of equal slots that have an adapter."""
    segments: list[tuple[int, int, int]] = []
    for row, slot in enumerate(slots):
        if segments and segments[-1][1] == row and segments[-1][2] == slot:
            segments[-1] = (segments[-1][0], row + 1, slot)
        else:
            segments.append((row, row + 1, slot))
    return [segment for segment in segments if segment[2] >= 0]
