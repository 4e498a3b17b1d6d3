"""Segmented LoRA: adds each row segment's own low-rank update to the output of a shared linear, in one call.

Semantics: for every (start, end, weights) of the table and every piece p of weights
    y[start:end, offset_p : offset_p + n_p] += scale_p · (x[start:end] A_pᵀ) B_pᵀ
x [rows, k] and y [rows, n] have unit inner strides; y is written in place; rows of no segment are left alone.
"""

import torch
from torch import Tensor

from .segments import SegmentTable, sgmv_kernels

# SegmentTable.work below which waking the pool costs more than it saves: one row of a few dozen kilobytes of weights.
SINGLE_THREAD_WORK = 5 * 48 * 1024


def sgmv(y: Tensor, x: Tensor, table: SegmentTable) -> None:
    """Apply `table` in place on y. Native: float32 between the two products; plain torch: the dtype's own rounding."""
    if not table.entries:
        return
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != table.in_features or y.shape[1] < table.out_features:
        raise ValueError(
            f"x {[*x.shape]} and y {[*y.shape]} do not fit weights of {table.in_features} -> {table.out_features}"
        )
    if min(x.shape[0], y.shape[0]) < table.rows:
        raise ValueError(f"segments reach row {table.rows}, x {tuple(x.shape)} and y {tuple(y.shape)} end before")
    if table.packed:
        _native(y, x, table)
    else:
        _plain(y, x, table)


def _native(y: Tensor, x: Tensor, table: SegmentTable) -> None:
    if not (x.dtype is y.dtype is torch.bfloat16) or not (x.is_cpu and y.is_cpu) or y.stride(1) != 1:
        raise ValueError(
            f"packed weights need bf16 x and y in host memory, got {x.dtype} and {y.dtype} with strides {y.stride()}"
        )
    if x.stride(1) != 1:
        x = x.contiguous()
    kernels = sgmv_kernels()
    assert kernels is not None, "packed weights exist only where the kernels do"
    threads = 1 if table.work <= SINGLE_THREAD_WORK else torch.get_num_threads()
    status = kernels.run(
        y.data_ptr(),
        x.data_ptr(),
        y.stride(0),
        x.stride(0),
        table.in_features,
        table.address,
        len(table.entries),
        threads,
    )
    if status:
        raise MemoryError(f"no memory for the intermediate of {table.rows} rows")


def _plain(y: Tensor, x: Tensor, table: SegmentTable) -> None:
    for start, end, weights in table.entries:
        assert weights.a is not None
        t = x[start:end] @ weights.a.T
        for piece in weights.plain:
            n, rank = piece.b.shape
            t_piece = t[:, piece.first_rank : piece.first_rank + rank]
            y[start:end, piece.offset : piece.offset + n].addmm_(t_piece, piece.b.T, alpha=piece.scale)
