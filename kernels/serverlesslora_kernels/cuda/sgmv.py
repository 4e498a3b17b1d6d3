"""Segmented LoRA on the device: adds every row's own low-rank update to the output of a shared linear, in two launches.

Semantics: for every row i with slot s and every site p of the projection that s has factors for
    y[i, first_p : first_p + width_p] += scale · (x[i] Aᵀ) Bᵀ
x [rows, in] and y [rows, >= width] may have any row stride, the inner one is 1; y is written in place; rows without a
slot are left alone. Products are summed in float32 and t = x Aᵀ stays float32 between the two.

Two forms. *Rows*: every row looks up its own slot in memory, the grid depends on shapes only, so a CUDA graph can hold
it; for decoding. *Tiles*: neighbours of one adapter share tensor-core products; for steps with prompts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serverlesslora_kernels.cuda.launch import launch
from serverlesslora_kernels.cuda.lora_table import FIELDS, MAX_SITES, ProjectionLayout
from serverlesslora_kernels.cuda.recorded import CompileCase, record, unique
from serverlesslora_kernels.cuda.triton_code import sgmv as programs

# One row's share of the inner dimension per program, independent of the batch, so that a row's sums always have the
# same order: 8 programs per row for 4096 inputs, each with 16 KB of A for 16 ranks.
ROWS_SPLIT_K = 512
# Fewer, longer parts for tiles: they fill the device by their number, and every part costs a pass over t.
TILES_SPLIT_K = 1024
_BLOCK_R = 16
BLOCK_ROWS = (16, 32, 64)  # of the tiles form


@dataclass(frozen=True)
class Scratch:
    """Where partial t of the rows form goes: float32 [splits, rows, width], shared by all projections of a step."""

    memory: Tensor
    rows: int
    width: int  # the largest sum of ranks it has room for

    @classmethod
    def allocate(cls, rows: int, max_in_features: int, width: int, device: torch.device) -> Scratch:
        splits = -(-max_in_features // ROWS_SPLIT_K)
        return cls(torch.empty(splits * rows * width, dtype=torch.float32, device=device), rows, width)


@dataclass(frozen=True)
class Tiles:
    """Which rows belong to which slot in one packed step; built once, used by all projections."""

    entries: Tensor  # int32 [num_tiles, 3]: first row, end row of the segment, slot
    block_rows: int  # rows a program takes from the first on
    rows: int  # of the packed batch, at least up to the last segment's end

    @classmethod
    def build(
        cls, segments: Sequence[tuple[int, int, int]], device: torch.device, *, block_rows: int | None = None
    ) -> Tiles:
        """From sorted (start, end, slot) row ranges; slot -1 gets no tile. One small asynchronous copy."""
        adapted = [segment for segment in segments if segment[2] >= 0]
        if block_rows is None:
            mean = sum(end - start for start, end, _ in adapted) / max(1, len(adapted))
            block_rows = BLOCK_ROWS[(mean > 24) + (mean > 64)]
        entries = array("i")
        for start, end, slot in adapted:
            for first in range(start, end, block_rows):
                entries.extend((first, end, slot))
        host = torch.empty(len(entries), dtype=torch.int32, pin_memory=device.type == "cuda" and len(entries) > 0)
        host.numpy()[:] = entries
        rows = segments[-1][1] if segments else 0
        return cls(host.to(device, non_blocking=True).view(-1, 3), block_rows, rows)


def sgmv_rows(
    y: Tensor, x: Tensor, table: Tensor, layout: ProjectionLayout, row_slots: Tensor, scratch: Scratch
) -> None:
    """`row_slots` int32 [rows] names every row's slot in `table` [num_slots, FIELDS], -1 for the bare backbone.

    No sum of ranks may exceed `scratch.width`: whoever fills the slots sees to that.
    """
    rows, k = x.shape
    assert rows == row_slots.shape[0] <= scratch.rows
    assert k == layout.in_features
    splits = -(-k // ROWS_SPLIT_K)
    launch(
        programs.shrink_rows,
        (rows, splits, _rank_programs(rows * splits)),
        scratch.memory,
        x,
        table,
        row_slots,
        x.stride(0),
        rows,
        K=k,
        T_WIDTH=scratch.width,
        # The whole part at once: all its loads are under way before the first is needed.
        BLOCK_K=min(ROWS_SPLIT_K, _power_of_two(k)),
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )
    block_n = 256 if layout.width >= 8192 else 128
    launch(
        programs.expand_rows,
        (rows, _column_blocks(layout, block_n)),
        y,
        scratch.memory,
        table,
        row_slots,
        y.stride(0),
        rows,
        **_sites(layout),
        T_WIDTH=scratch.width,
        SPLITS=splits,
        SPLITS_PAD=_power_of_two(splits),
        BLOCK_N=block_n,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )


def sgmv_tiles(
    y: Tensor, x: Tensor, table: Tensor, layout: ProjectionLayout, tiles: Tiles, max_total_rank: int
) -> None:
    """`max_total_rank` bounds the sum of ranks over the sites for all slots that `tiles` name."""
    rows, k = x.shape
    if not len(tiles.entries) or not max_total_rank:
        return
    assert tiles.rows <= rows
    assert k == layout.in_features
    splits = -(-k // TILES_SPLIT_K)
    block_r = 16 if max_total_rank <= 16 else 32 if max_total_rank <= 32 else 64
    # Whole tiles: Triton compiles another program for a width that 16 does not divide.
    t_width = -(-max_total_rank // _BLOCK_R) * _BLOCK_R
    t = torch.empty(splits * rows * t_width, dtype=torch.float32, device=x.device)
    exact = x.dtype == torch.float32
    block_k = max(16, min(32 if exact else 128, _power_of_two(k)))
    launch(
        programs.shrink_tiles,
        (len(tiles.entries), splits, -(-max_total_rank // block_r)),
        t,
        x,
        table,
        tiles.entries,
        x.stride(0),
        rows,
        t_width,
        K=k,
        SPLIT_K=min(TILES_SPLIT_K, -(-k // block_k) * block_k),
        BLOCK_M=tiles.block_rows,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=4,
        num_stages=2 if exact else 4 if block_r < 64 else 3,  # up to 96 KB: two programs per SM
    )
    wide = _widened(layout, y.shape[1])
    launch(
        programs.expand_tiles,
        (len(tiles.entries), _column_blocks(wide, 64)),
        y,
        t,
        table,
        tiles.entries,
        y.stride(0),
        rows,
        t_width,
        **_sites(wide),
        SITES=len(layout.sites),
        SPLITS=splits,
        BLOCK_M=tiles.block_rows,
        BLOCK_N=64,
        BLOCK_R=16 if exact else min(block_r, 32),
        TALL=wide.width > layout.width,
        num_warps=4,
        num_stages=2,
    )


def compile_cases() -> list[CompileCase]:
    """Every program as it is launched for 8B- and 1B-shaped projections."""
    cases: list[CompileCase] = []
    meta = torch.device("meta")
    qkv = ProjectionLayout(4096, ((0, 4096), (4096, 1024), (5120, 1024)))
    down = ProjectionLayout(14336, ((0, 4096),))
    gate_up = ProjectionLayout(2048, ((0, 8192), (8192, 8192)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in (qkv, down, gate_up):
            table = torch.empty(8, FIELDS, dtype=torch.long, device=meta)
            x = torch.empty(32, layout.in_features, dtype=dtype, device=meta)
            y = torch.empty(32, layout.width, dtype=dtype, device=meta)
            slots = torch.empty(32, dtype=torch.int32, device=meta)
            scratch = Scratch.allocate(32, layout.in_features, 1024, meta)
            cases += record(lambda: sgmv_rows(y, x, table, layout, slots, scratch))  # noqa: B023
            for block_rows, rank in ((16, 16), (32, 48), (64, 256)):
                tiles = Tiles(torch.empty(2, 3, dtype=torch.int32, device=meta), block_rows, 32)
                cases += record(lambda: sgmv_tiles(y, x, table, layout, tiles, rank))  # noqa: B023
        tall = torch.empty(32, layout.width + 64, dtype=dtype, device=meta)  # of the last layout: new tokens
        cases += record(lambda: sgmv_tiles(tall, x, table, layout, tiles, 16))  # noqa: B023
    return unique(cases)


def _rank_programs(programs: int) -> int:
    """How many share one row's tiles of ranks; no sum depends on it. Few rows need many, to use the whole device.

    At least 4: q, k and v of rank 16 in one turn. Those beyond the rank of a row end at once.
    """
    return max(4, min(16, 8 * 132 // max(1, programs)))


def _widened(layout: ProjectionLayout, columns: int) -> ProjectionLayout:
    """With the last site taking all columns of a y that has more of them than the backbone."""
    *sites, (first, width) = layout.sites
    return ProjectionLayout(layout.in_features, (*sites, (first, max(width, columns - first))))


def _sites(layout: ProjectionLayout) -> dict[str, int]:
    padded = [*layout.sites, *[(0, 0)] * (MAX_SITES - len(layout.sites))]
    return {f"O{i}": first for i, (first, _) in enumerate(padded)} | {f"W{i}": w for i, (_, w) in enumerate(padded)}


def _column_blocks(layout: ProjectionLayout, block_n: int) -> int:
    return sum(-(-width // block_n) for _, width in layout.sites)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
