"""Matrix products of few rows: the weights pass through once, in order, and everything else is small beside them.

No result depends on timing: sums are made in one program's loop or, where K is split, in the order of the splits.
"""

import triton
import triton.language as tl

from serverlesslora_kernels.cuda.triton_code.precision import dot, rounded


@triton.jit
def product_of_row(
    y,
    x,
    weight,
    bias,
    n,
    k,
    weight_row,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """N_TILE outputs of one row; every lane keeps its own sum until the end, so a step of the loop has no reduction."""
    output = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    held = output < n
    lane = tl.arange(0, K_TILE)
    base = weight + output.to(tl.int64)[:, None] * weight_row
    acc = tl.zeros([N_TILE, K_TILE], tl.float32)
    for start in tl.range(0, k, K_TILE, num_stages=STAGES):
        at = start + lane
        values = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        # Each weight is read once: it should not push out what others will read again.
        weights = tl.load(
            base + at[None, :], mask=held[:, None] & (at < k)[None, :], other=0.0, eviction_policy="evict_first"
        )
        acc += weights.to(tl.float32) * values[None, :]
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias + output, mask=held, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(y + output, mask=held, other=0.0).to(tl.float32)
    tl.store(y + output, rounded(total, y.dtype.element_ty), mask=held)


@triton.jit
def product_of_rows(
    y,
    part,
    x,
    weight,
    bias,
    rows,
    n,
    k,
    k_per_split,
    y_row,
    x_row,
    weight_row,
    ROWS: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """N_TILE outputs of up to ROWS rows; with SPLIT of one stretch of K, and the sums go to part [splits, rows, n]."""
    output = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, K_TILE)
    first = tl.program_id(1) * k_per_split
    end = tl.minimum(first + k_per_split, k)
    held = output < n
    real = row < rows
    x_base = x + row.to(tl.int64)[:, None] * x_row
    # Indexed [K, N] from the start: a transposed view of what lies row by row.
    w_base = weight + output.to(tl.int64)[None, :] * weight_row
    acc = tl.zeros([ROWS, N_TILE], tl.float32)
    for start in tl.range(first, end, K_TILE, num_stages=STAGES):
        at = start + lane
        values = tl.load(x_base + at[None, :], mask=real[:, None] & (at < end)[None, :], other=0.0)
        weights = tl.load(
            w_base + at[:, None], mask=(at < end)[:, None] & held[None, :], other=0.0, eviction_policy="evict_first"
        )
        acc += dot(values, weights)
    mask = real[:, None] & held[None, :]
    if SPLIT:
        place = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * n + output[None, :]
        tl.store(part + place, acc, mask=mask)
    else:
        if BIAS:
            acc += tl.load(bias + output, mask=held, other=0.0).to(tl.float32)[None, :]
        place = y + row.to(tl.int64)[:, None] * y_row + output[None, :]
        if ADD:
            acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, rounded(acc, y.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_splits(
    y,
    part,
    bias,
    rows,
    n,
    y_row,
    splits,
    N_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    held = output < n
    total = tl.zeros([N_TILE], tl.float32)
    for split in range(splits):
        total += tl.load(part + (split * rows + row) * n + output, mask=held, other=0.0)
    if BIAS:
        total += tl.load(bias + output, mask=held, other=0.0).to(tl.float32)
    place = y + row * y_row + output
    if ADD:
        total += tl.load(place, mask=held, other=0.0).to(tl.float32)
    tl.store(place, rounded(total, y.dtype.element_ty), mask=held)
