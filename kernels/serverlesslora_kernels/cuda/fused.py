"""What a decoder layer does between its matrix products, in Triton: one launch each, rounded where transformers rounds.

The twins of `serverlesslora_kernels.fused`, and two functions that join more of a layer into one launch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from serverlesslora_kernels import fused as host
from serverlesslora_kernels.cuda.attention import DeviceKv, DevicePlan, pairs_of, write_kv
from serverlesslora_kernels.cuda.launch import launch
from serverlesslora_kernels.cuda.recorded import CompileCase, record, unique
from serverlesslora_kernels.cuda.triton_code import fused as programs

MAX_COLUMNS = 1 << 16  # of a norm: a row is held in registers
_NORM_ELEMENTS = 1024  # of one program, where rows are short
_GATE_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, normalised in float32.

    Plain (Llama, Qwen): rounded to x's type, then weighed; a weight of a wider type widens the result, as in torch.
    `offset` (Gemma): times 1 + weight in float32, then rounded. Strided views of two levels of rows are read in place.
    """
    return _norm(x, None, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """residual += x, in place and rounded to its type, and the norm of that sum; both of one shape and type."""
    if x.shape != residual.shape or x.dtype != residual.dtype or not residual.is_contiguous():
        raise ValueError("x and a contiguous residual of the same shape and type are added")
    return _norm(x, residual, weight, eps, offset)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate_up [..., 2 · intermediate], gate first."""
    return _gated_mul(gate_up, gelu=False)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, gelu in its tanh approximation, for gate_up [..., 2 · intermediate], gate first."""
    return _gated_mul(gate_up, gelu=True)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + rotate_half(x) · sin for q [T, q_heads, dim] and k [T, kv_heads, dim], strided views welcome.

    cos and sin [T, rotary] may be narrower than dim; the columns beyond pass through. Results are contiguous.
    """
    if not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return host.rope(q, k, cos, sin)  # torch's own promotion, operation by operation
    q, k, cos, sin = map(_dense_last, (q, k, cos, sin))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens, q_heads, dim = q.shape
    shape = _rope_shape(q_heads, k.shape[1], dim, cos.shape[1])
    launch(
        programs.rope,
        (_rope_programs(tokens, shape),),
        q_out,
        k_out,
        q,
        k,
        cos,
        sin,
        tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        num_warps=4,
        **shape,
    )
    return q_out, k_out


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: DeviceKv, plan: DevicePlan) -> Tensor:
    """`rope` of q, returned, and of k [T, kv_heads, dim], written with v [T, kv_heads, dim_v] to the cache at once."""
    if not q.dtype == k.dtype == v.dtype == cos.dtype == sin.dtype == kv.k.dtype == kv.v.dtype:
        q, k = rope(q, k, cos, sin)
        write_kv(kv, k.to(kv.k.dtype), v.to(kv.v.dtype), plan)
        return q
    q, k, v, cos, sin = map(_dense_last, (q, k, v, cos, sin))
    q_out = q.new_empty(q.shape)
    tokens, q_heads, dim = q.shape
    shape = _rope_shape(q_heads, k.shape[1], dim, cos.shape[1])
    launch(
        programs.rope_and_store,
        (_rope_programs(tokens, shape),),
        q_out,
        kv.k,
        kv.v,
        q,
        k,
        v,
        cos,
        sin,
        plan.slots,
        tokens,
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        DIM_V=v.shape[2],
        DIM_V_PAD=_pow2(v.shape[2]),
        BLOCK_SIZE=plan.block_size,
        num_warps=4,
        **shape,
    )
    return q_out


def compile_cases() -> list[CompileCase]:
    """Every program for the widths of the families we know."""
    cases: list[CompileCase] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        blank = functools.partial(torch.empty, dtype=dtype, device="meta")
        for columns in (64, 128, 896, 4096, 16384):
            x, weight = blank(2, columns), blank(columns)
            cases += record(functools.partial(rms_norm, x, weight, 1e-6, offset=columns < 4096))
            cases += record(functools.partial(add_rms_norm, x, blank(2, columns), weight, 1e-6))
        for gate_up in (blank(2, 2 * 4864), blank(2, 2 * 14336)):
            cases += record(functools.partial(silu_mul, gate_up)) + record(functools.partial(gelu_tanh_mul, gate_up))
        plan = DevicePlan.build((2,), (2,), ([0],), 16, "meta", pin=False)
        for q_heads, kv_heads, dim, rotary in ((32, 8, 128, 128), (14, 2, 64, 64), (32, 32, 80, 32), (8, 4, 256, 256)):
            q, k, cos = blank(2, q_heads, dim), blank(2, kv_heads, dim), blank(2, rotary)
            kv = DeviceKv(blank(4, 16, kv_heads, dim), blank(4, 16, kv_heads, dim))
            cases += record(functools.partial(rope, q, k, cos, cos))
            cases += record(functools.partial(rope_and_store, q, k, k, cos, cos, kv, plan))
    return unique(cases)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: bool) -> Tensor:
    columns = x.shape[-1]
    if columns > MAX_COLUMNS:
        raise ValueError(f"a norm over {columns} values does not fit one program ({MAX_COLUMNS})")
    rows = x.numel() // columns
    levels = _row_levels(x)
    if levels is None:
        x, levels = x.contiguous(), (1, columns, 0)
    dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = _pow2(columns)
    rows_tile = max(1, _NORM_ELEMENTS // block)
    launch(
        programs.rms_norm,
        (-(-rows // rows_tile),),
        out,
        x,
        x if residual is None else residual,
        weight.contiguous(),
        rows,
        *levels,
        float(eps),
        COLUMNS=columns,
        BLOCK=block,
        ROWS=rows_tile,
        OFFSET=offset,
        ADD=residual is not None,
        num_warps=max(4, min(16, block // 512)),
    )
    return out


def _gated_mul(gate_up: Tensor, *, gelu: bool) -> Tensor:
    columns = gate_up.shape[-1] // 2
    levels = _row_levels(gate_up)
    if levels is None or levels[0] != 1:
        gate_up, levels = gate_up.contiguous(), (1, 2 * columns, 0)
    out = gate_up.new_empty((*gate_up.shape[:-1], columns))
    launch(
        programs.gated_mul,
        (gate_up.numel() // (2 * columns), -(-columns // _GATE_BLOCK)),
        out,
        gate_up,
        levels[1],
        COLUMNS=columns,
        BLOCK=_GATE_BLOCK,
        GELU=gelu,
        num_warps=4,
    )
    return out


def _row_levels(x: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride): where row r of the flattened leading axes starts; None if not so simple."""
    if x.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), outermost first, adjacent ones merged where memory allows
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    match axes:
        case []:
            return 1, x.shape[-1], 0
        case [(_, stride)]:
            return 1, stride, 0
        case [(_, outer), (inner, stride)]:
            return inner, outer, stride
        case _:
            return None


def _rope_shape(q_heads: int, kv_heads: int, dim: int, rotary: int) -> dict[str, int]:
    return {
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "ROTARY": rotary,
        "HALF_PAD": _pow2(rotary // 2),
        "REST_PAD": _pow2(max(1, dim - rotary)),
        "PAIRS": pairs_of(_pow2(dim)),
    }


def _rope_programs(tokens: int, shape: dict[str, int]) -> int:
    """Some for query heads, then some for key heads."""
    return -(-tokens * shape["Q_HEADS"] // shape["PAIRS"]) - (-tokens * shape["KV_HEADS"] // shape["PAIRS"])


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pow2(count: int) -> int:
    return 1 << (count - 1).bit_length()
