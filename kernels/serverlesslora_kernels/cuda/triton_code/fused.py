"""Norms, gated activations and rotary embeddings, one launch each, rounded where transformers rounds."""

import triton
import triton.language as tl

from serverlesslora_kernels.cuda.triton_code.precision import rounded

LOG2_E = tl.constexpr(1.4426950408889634)
GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)


@triton.jit(do_not_specialize=["rows", "inner"])
def rms_norm(
    out,
    x,
    residual,
    weight,
    rows,
    inner,
    x_outer,
    x_inner,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ADD: tl.constexpr,
):
    """Row r of x starts at (r // inner) · x_outer + (r % inner) · x_inner; out is contiguous."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    value = tl.load(x + (row // inner) * x_outer + (row % inner) * x_inner + column, mask=mask, other=0.0)
    if ADD:
        place = residual + row * COLUMNS + column
        total = tl.load(place, mask=mask, other=0.0).to(tl.float32) + value.to(tl.float32)
        value = rounded(total, residual.dtype.element_ty)
        tl.store(place, value, mask=mask)
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, 1) / COLUMNS
    normed = wide * (1.0 / tl.sqrt_rn(mean + eps))[:, None]
    scale = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if OFFSET:  # noqa: SIM108
        normed = normed * (1.0 + scale)
    else:
        normed = rounded(normed, x.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + row * COLUMNS + column, rounded(normed, out.dtype.element_ty), mask=mask)


@triton.jit
def gated_mul(out, gate_up, row_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    gate = tl.load(gate_up + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + COLUMNS + column, mask=mask, other=0.0).to(tl.float32)
    # Both are gate · sigmoid: (1 + tanh(a)) / 2 = sigmoid(2a), without the cancellation for negative gates. Written so
    # that no exponential overflows.
    inner = gate
    if GELU:
        inner = 2.0 * GELU_SCALE * (gate + 0.044715 * gate * gate * gate)
    small = tl.exp(-tl.abs(inner))
    active = gate * tl.where(inner < 0, small, 1.0) / (1.0 + small)
    active = rounded(active, out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * COLUMNS + column, rounded(active * up, out.dtype.element_ty), mask=mask)


@triton.jit
def turn(
    out,  # [PAIRS, 1], where the heads start, as x
    x,
    cos,  # [PAIRS, 1], where the cosines of their tokens start, as sin
    sin,
    mask,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
):
    """x · cos + rotate_half(x) · sin, the products and their sum rounded; columns beyond the rotary are copied."""
    dtype = x.dtype.element_ty
    half = tl.arange(0, HALF_PAD)[None, :]
    inside = mask & (half < ROTARY // 2)
    low = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + ROTARY // 2 + half, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + half, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + ROTARY // 2 + half, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + half, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + ROTARY // 2 + half, mask=inside, other=0.0).to(tl.float32)
    first = rounded(low * cos_low, dtype).to(tl.float32) - rounded(high * sin_low, dtype).to(tl.float32)
    second = rounded(high * cos_high, dtype).to(tl.float32) + rounded(low * sin_high, dtype).to(tl.float32)
    tl.store(out + half, rounded(first, dtype), mask=inside)
    tl.store(out + ROTARY // 2 + half, rounded(second, dtype), mask=inside)
    if ROTARY < DIM:
        rest = ROTARY + tl.arange(0, REST_PAD)[None, :]
        beyond = mask & (rest < DIM)
        tl.store(out + rest, tl.load(x + rest, mask=beyond, other=0.0), mask=beyond)


@triton.jit(do_not_specialize=["tokens"])
def rope(
    q_out,
    k_out,
    q,
    k,
    cos,
    sin,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    cos_token,
    sin_token,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """PAIRS of a token and a head; the first programs take query heads, the others key heads."""
    q_programs = tl.cdiv(tokens * Q_HEADS, PAIRS)
    program = tl.program_id(0)
    lane = tl.arange(0, PAIRS)[:, None]
    if program < q_programs:
        pair = program * PAIRS + lane
        token, head = (pair // Q_HEADS).to(tl.int64), pair % Q_HEADS
        turn(
            q_out + pair.to(tl.int64) * DIM, q + token * q_token + head * q_head,
            cos + token * cos_token, sin + token * sin_token, token < tokens, DIM, ROTARY, HALF_PAD, REST_PAD,
        )  # fmt: skip
    else:
        pair = (program - q_programs) * PAIRS + lane
        token, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
        turn(
            k_out + pair.to(tl.int64) * DIM, k + token * k_token + head * k_head,
            cos + token * cos_token, sin + token * sin_token, token < tokens, DIM, ROTARY, HALF_PAD, REST_PAD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def rope_and_store(
    q_out,
    k_cache,
    v_cache,
    q,
    k,
    v,
    cos,
    sin,
    slots,
    tokens,
    k_block,
    k_slot,
    k_cache_head,
    v_block,
    v_slot,
    v_cache_head,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    cos_token,
    sin_token,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    DIM_V_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """As `rope`, but the programs of key heads put keys and values straight into the cache."""
    q_programs = tl.cdiv(tokens * Q_HEADS, PAIRS)
    program = tl.program_id(0)
    lane = tl.arange(0, PAIRS)[:, None]
    if program < q_programs:
        pair = program * PAIRS + lane
        token, head = (pair // Q_HEADS).to(tl.int64), pair % Q_HEADS
        turn(
            q_out + pair.to(tl.int64) * DIM, q + token * q_token + head * q_head,
            cos + token * cos_token, sin + token * sin_token, token < tokens, DIM, ROTARY, HALF_PAD, REST_PAD,
        )  # fmt: skip
    else:
        pair = (program - q_programs) * PAIRS + lane
        token, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
        slot = tl.load(slots + token, mask=token < tokens, other=-1)
        block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
        held = slot >= 0
        turn(
            k_cache + block * k_block + offset * k_slot + head * k_cache_head, k + token * k_token + head * k_head,
            cos + token * cos_token, sin + token * sin_token, held, DIM, ROTARY, HALF_PAD, REST_PAD,
        )  # fmt: skip
        dim = tl.arange(0, DIM_V_PAD)[None, :]
        values = tl.load(v + token * v_token + head * v_head + dim, mask=held & (dim < DIM_V), other=0.0)
        target = v_cache + block * v_block + offset * v_slot + head * v_cache_head + dim
        tl.store(target, values, mask=held & (dim < DIM_V))
