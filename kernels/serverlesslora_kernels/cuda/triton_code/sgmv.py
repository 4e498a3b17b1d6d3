"""Segmented LoRA: shrink (t = x Aᵀ) and expand (y += scale · t Bᵀ), for single rows and for tiles of rows.

Both read the rank from the pointer table and stop there: nobody pays for a larger rank of somebody else. The inner
dimension is split at fixed places and the parts are added in a fixed order, so a row's bits do not depend on its
neighbours.
"""

import triton
import triton.language as tl

from serverlesslora_kernels.cuda.triton_code.precision import dot, rounded

FIELDS = tl.constexpr(19)  # lora_table.FIELDS
HEIGHT = tl.constexpr(18)  # lora_table.HEIGHT


@triton.jit
def address(entry, dtype: tl.constexpr):
    """The pointer stored at `entry`; matrices start at multiples of 128 bytes.

    The hint must be on the pointer: on the integer it is lost in the cast, and loads become two bytes wide.
    """
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 128)


@triton.jit(do_not_specialize=["rows"])
def shrink_rows(
    t,
    x,
    table,
    row_slots,
    x_row,
    rows,
    K: tl.constexpr,
    T_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One row, one part of K, and of the tiles of ranks every so many-th as there are programs for them."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        entry = table + slot.to(tl.int64) * FIELDS
        rank = tl.load(entry + 1).to(tl.int32)
        first = tl.program_id(2) * BLOCK_R
        if first < rank:
            a = address(entry, x.dtype.element_ty)
            x_at = x + row.to(tl.int64) * x_row
            t_at = t + (split * rows + row).to(tl.int64) * T_WIDTH
            k = split * BLOCK_K + tl.arange(0, BLOCK_K)
            here = k < K
            values = tl.load(x_at + k, mask=here, other=0.0).to(tl.float32)
            for start in range(first, rank, tl.num_programs(2) * BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                weights = tl.load(
                    a + r[:, None].to(tl.int64) * K + k[None, :],
                    mask=(r < rank)[:, None] & here[None, :],
                    other=0.0,
                )
                tl.store(t_at + r, tl.sum(weights.to(tl.float32) * values[None, :], axis=1), mask=r < rank)


@triton.jit
def locate(block, BLOCK_N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr):
    """Which site the block of output columns lies in, its number inside, and the site's width."""
    end_0 = tl.cdiv(W0, BLOCK_N)
    end_1 = end_0 + tl.cdiv(W1, BLOCK_N)
    end_2 = end_1 + tl.cdiv(W2, BLOCK_N)
    site = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32) + (block >= end_2).to(tl.int32)
    before = tl.where(site == 0, 0, tl.where(site == 1, end_0, tl.where(site == 2, end_1, end_2)))
    width = tl.where(site == 0, W0, tl.where(site == 1, W1, tl.where(site == 2, W2, W3)))
    return site, block - before, width


@triton.jit(do_not_specialize=["rows"])
def expand_rows(
    y,
    t,
    table,
    row_slots,
    y_row,
    rows,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    T_WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One row, one block of columns of one site."""
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        site, block, width = locate(tl.program_id(1), BLOCK_N, W0, W1, W2, W3)
        entry = table + slot.to(tl.int64) * FIELDS + 2 + 4 * site
        rank = tl.load(entry + 1).to(tl.int32)
        if rank > 0:
            b = address(entry, y.dtype.element_ty)
            t_first = tl.load(entry + 2).to(tl.int32)
            scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
            offset = tl.where(site == 0, O0, tl.where(site == 1, O1, tl.where(site == 2, O2, O3)))
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            split = tl.arange(0, SPLITS_PAD)
            stride = (rank + 7) // 8 * 8
            t_rows = t + (split[:, None] * rows + row).to(tl.int64) * T_WIDTH + t_first
            acc = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(0, rank, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                parts = tl.load(t_rows + r[None, :], mask=(split < SPLITS)[:, None] & (r < rank)[None, :], other=0.0)
                weights = tl.load(
                    b + n[:, None].to(tl.int64) * stride + r[None, :],
                    mask=(n < width)[:, None] & (r < stride)[None, :],
                    other=0.0,
                )
                acc += tl.sum(weights.to(tl.float32) * tl.sum(parts, axis=0)[None, :], axis=1)
            y_at = y + row.to(tl.int64) * y_row + offset + n
            before = tl.load(y_at, mask=n < width, other=0.0).to(tl.float32)
            tl.store(y_at, rounded(before + scale * acc, y.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["rows"])
def shrink_tiles(
    t,
    x,
    table,
    tiles,
    x_row,
    rows,
    t_width,
    K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of one segment's rows, one part of K, one tile of ranks."""
    tile, split = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    entry = table + tl.load(tiles + 3 * tile + 2).to(tl.int64) * FIELDS
    rank = tl.load(entry + 1).to(tl.int32)
    first = tl.program_id(2) * BLOCK_R
    if first < rank:
        a = address(entry, x.dtype.element_ty)
        m = start + tl.arange(0, BLOCK_M)
        r = first + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for step in range(0, SPLIT_K, BLOCK_K):
            k = split * SPLIT_K + step + tl.arange(0, BLOCK_K)
            here = k < K
            values = tl.load(
                x + m[:, None].to(tl.int64) * x_row + k[None, :], mask=(m < end)[:, None] & here[None, :], other=0.0
            )
            weights = tl.load(
                a + r[None, :].to(tl.int64) * K + k[:, None], mask=(r < rank)[None, :] & here[:, None], other=0.0
            )
            acc += dot(values, weights)
        t_at = t + (split * rows + m[:, None]).to(tl.int64) * t_width + r[None, :]
        tl.store(t_at, acc, mask=(m < end)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["rows"])
def expand_tiles(
    y,
    t,
    table,
    tiles,
    y_row,
    rows,
    t_width,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    SITES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TALL: tl.constexpr,
):
    """A tile of one segment's rows, one block of columns of one site.

    The product takes 16-bit factors: t enters as the sum of two, which is 2**-16 (bfloat16) from what float32 holds.
    TALL: y has columns beyond the layout, and the last site's B as many rows as the table says.
    """
    tile = tl.program_id(0)
    start, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    slot = tl.load(tiles + 3 * tile + 2).to(tl.int64)
    site, block, width = locate(tl.program_id(1), BLOCK_N, W0, W1, W2, W3)
    entry = table + slot * FIELDS + 2 + 4 * site
    rank = tl.load(entry + 1).to(tl.int32)
    if rank > 0:
        b = address(entry, y.dtype.element_ty)
        t_first = tl.load(entry + 2).to(tl.int32)
        scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
        offset = tl.where(site == 0, O0, tl.where(site == 1, O1, tl.where(site == 2, O2, O3)))
        m = start + tl.arange(0, BLOCK_M)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        stride = (rank + 7) // 8 * 8
        if TALL:
            height = tl.load(table + slot * FIELDS + HEIGHT).to(tl.int32)
            width = tl.where(site == SITES - 1, tl.minimum(width, height), width)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r_start in range(0, rank, BLOCK_R):
            r = r_start + tl.arange(0, BLOCK_R)
            held = (m < end)[:, None] & (r < rank)[None, :]
            values = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for split in range(0, SPLITS):
                t_at = t + (split * rows + m[:, None]).to(tl.int64) * t_width + t_first + r[None, :]
                values += tl.load(t_at, mask=held, other=0.0)
            weights = tl.load(
                b + n[None, :].to(tl.int64) * stride + r[:, None],
                mask=(n < width)[None, :] & (r < stride)[:, None],
                other=0.0,
            )
            leading = rounded(values, weights.dtype)
            acc += dot(leading, weights)
            if weights.dtype != tl.float32:
                acc += dot(rounded(values - leading.to(tl.float32), weights.dtype), weights)
        y_at = y + m[:, None].to(tl.int64) * y_row + offset + n[None, :]
        held = (m < end)[:, None] & (n < width)[None, :]
        before = tl.load(y_at, mask=held, other=0.0).to(tl.float32)
        tl.store(y_at, rounded(before + scale * acc, y.dtype.element_ty), mask=held)
