"""Paged attention on the device: decode rows by split-KV, prefill chunks by query tiles, in one packed batch.

Decoding cuts a row's keys into chunks of at least MIN_CHUNK_KEYS; how depends on that row's context alone, so its bits
do not depend on the batch. How many programs share the chunks is a matter of filling the device only: for P pairs of
row and KV head, TARGET_PROGRAMS / P, at most one per chunk. (132 SMs with two programs each at a time, eight turns:
short turns even out rows of different lengths, and an unused program costs little.)
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serverlesslora_kernels.cuda.launch import launch
from serverlesslora_kernels.cuda.plan import QUERY_TILE, DevicePlan, StaticPlan
from serverlesslora_kernels.cuda.recorded import CompileCase, record, unique
from serverlesslora_kernels.cuda.triton_code import attention as programs

__all__ = [
    "DeviceKv",
    "DevicePlan",
    "StaticPlan",
    "compile_cases",
    "paged_attention",
    "varlen_attention",
    "write_kv",
]

MIN_CHUNK_KEYS = 256
TARGET_PROGRAMS = 8 * 2 * 132
# torch's own FlashAttention 2 wants pages of a multiple of this; version 3 takes any.
_FLASH2_PAGE = 256


class DeviceKv(NamedTuple):
    """One layer's cache: views into a pool of all layers, so strides are arbitrary; only the innermost is 1."""

    k: Tensor  # [num_blocks, block_size, kv_heads, dim_k]
    v: Tensor  # [num_blocks, block_size, kv_heads, dim_v]


class Shapes(NamedTuple):
    """Tile sizes for one head size and type, within the shared memory of an A100 (163 KB for one program).

    Tiles are found through the block table, which Triton counts as a load of its own: of five stages two are tiles on
    their way, of three or four only one.
    """

    keys: int  # per tile
    rows: int  # of queries per program, a divisor of QUERY_TILE
    decode_warps: int
    decode_stages: int
    chunk_warps: int
    chunk_stages: int

    @classmethod
    def of(cls, dim_k: int, dim_v: int, dtype: torch.dtype) -> Shapes:
        dim = max(_pad(dim_k), _pad(dim_v))
        if dtype.itemsize == 4:  # no tensor cores: float32 stays exact, and is slow
            return cls(max(16, min(32, 4096 // dim)), 32, 4, 3, 4 if dim <= 128 else 8, 3)
        if dim <= 128:
            return cls(64, 128, 4, 5, 8, 5)
        return cls(max(16, 8192 // dim), 64, 4, 5, 8, 5 if dim == 256 else 3)


def write_kv(kv: DeviceKv, k: Tensor, v: Tensor, plan: DevicePlan) -> None:
    """Store k [T, kv_heads, dim_k] and v [T, kv_heads, dim_v], strided views welcome, at `plan.slots`, in place."""
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    tokens, heads, dim_k = k.shape
    dim = max(_pad(dim_k), _pad(v.shape[2]))
    pairs = pairs_of(dim)
    launch(
        programs.write_kv,
        (-(-tokens * heads // pairs),),
        kv.k,
        kv.v,
        k,
        v,
        plan.slots,
        tokens,
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *k.stride()[:2],
        *v.stride()[:2],
        HEADS=heads,
        DIM_K=dim_k,
        DIM_V=v.shape[2],
        BLOCK_SIZE=plan.block_size,
        PAIRS=pairs,
        DIM_PAD=dim,
        num_warps=4,
    )


def paged_attention(
    q: Tensor,
    kv: DeviceKv,
    plan: DevicePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """out[r] = Σ_j softmax_j(cap(scale · q[r]·k[j])) v[j] over the keys j that row r sees, its own included.

    q [T, q_heads, dim_k], strided views welcome -> [T, q_heads, dim_v]. Row r at position p sees keys in
    (p - sliding_window, p]; cap(s) = softcap · tanh(s / softcap); `sinks` [q_heads] adds e^sink to each denominator.
    Head h reads KV head h // (q_heads / kv_heads). The new tokens' keys and values must be written already.
    Sums are float32; weights are rounded to the cache's type before they meet the values.
    """
    if q.dtype != kv.k.dtype or q.dtype != kv.v.dtype:
        raise ValueError(f"queries {q.dtype} and cache {kv.k.dtype}, {kv.v.dtype} must be of one type")
    q = q if q.stride(2) == 1 else q.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    out = q.new_empty((q.shape[0], q.shape[1], kv.v.shape[3]))
    if plan.decode.shape[0]:
        _decode(out, q, kv, plan, scale, sliding_window or 0, softcap, sinks)
    if plan.tiles.shape[0]:
        _chunks(out, q, kv, plan, scale, sliding_window or 0, softcap, sinks)
    return out


def _decode(
    out: Tensor,
    q: Tensor,
    kv: DeviceKv,
    plan: DevicePlan,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    rows, q_heads, kv_heads = plan.decode.shape[0], q.shape[1], kv.k.shape[2]
    dim_k, dim_v = q.shape[2], kv.v.shape[3]
    shapes = Shapes.of(dim_k, dim_v, q.dtype)
    cut = _cut(kv_heads, shapes, window)
    capacity = max_chunks(plan.max_decode_context, kv_heads, shapes, window)
    single = capacity == 1
    splits = min(capacity, -(-TARGET_PROGRAMS // (rows * kv_heads)))
    # A single chunk needs no scratch; the program then only wants some address.
    places = 0 if single else rows * q_heads * capacity
    part = torch.empty(max(1, places * dim_v), dtype=torch.float32, device=q.device)
    stats = torch.empty(max(1, places * 2), dtype=torch.float32, device=q.device)
    launch(
        programs.decode_split,
        (rows, kv_heads, splits),
        out,
        part,
        stats,
        q,
        kv.k,
        kv.v,
        out if sinks is None else sinks,
        plan.decode,
        plan.block_table,
        *q.stride()[:2],
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *plan.block_table.stride(),
        splits,
        capacity,
        float(scale),
        float(softcap or 0.0),
        GROUP=q_heads // kv_heads,
        GROUP_PAD=_pad(q_heads // kv_heads),
        DIM_K=dim_k,
        DIM_K_PAD=_pad(dim_k),
        DIM_V=dim_v,
        DIM_V_PAD=_pad(dim_v),
        BLOCK_SIZE=plan.block_size,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        SINGLE=single,
        num_warps=shapes.decode_warps,
        num_stages=shapes.decode_stages,
        **cut,
    )
    if not single:
        launch(
            programs.decode_combine,
            (rows, q_heads),
            out,
            part,
            stats,
            out if sinks is None else sinks,
            plan.decode,
            capacity,
            DIM_V=dim_v,
            DIM_V_PAD=_pad(dim_v),
            SINKS=sinks is not None,
            num_warps=4,
            **cut,
        )


def _chunks(
    out: Tensor,
    q: Tensor,
    kv: DeviceKv,
    plan: DevicePlan,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    q_heads, kv_heads = q.shape[1], kv.k.shape[2]
    dim_k, dim_v = q.shape[2], kv.v.shape[3]
    shapes = Shapes.of(dim_k, dim_v, q.dtype)
    parts = QUERY_TILE // shapes.rows
    launch(
        programs.attend_chunk,
        (q_heads, plan.tiles.shape[0] * parts),
        out,
        q,
        kv.k,
        kv.v,
        out if sinks is None else sinks,
        plan.tiles,
        plan.block_table,
        *q.stride()[:2],
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *plan.block_table.stride(),
        float(scale),
        float(softcap or 0.0),
        GROUP=q_heads // kv_heads,
        DIM_K=dim_k,
        DIM_K_PAD=_pad(dim_k),
        DIM_V=dim_v,
        DIM_V_PAD=_pad(dim_v),
        BLOCK_SIZE=plan.block_size,
        ROWS=shapes.rows,
        PARTS=parts,
        TILE=shapes.keys,
        WINDOW=window,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        num_warps=shapes.chunk_warps,
        num_stages=shapes.chunk_stages,
    )


def max_chunks(context: int, kv_heads: int, shapes: Shapes, window: int) -> int:
    """The most chunks any row of at most `context` tokens is cut into: what scratch must hold."""
    cut = _cut(kv_heads, shapes, window)
    seen = min(context, window + shapes.keys - 1) if window else context  # a window may start inside a tile
    return max(1, min(-(-seen // (cut["MIN_TILES"] * shapes.keys)), cut["MAX_CHUNKS"]))


def pairs_of(dim_pad: int) -> int:
    """How many heads of `dim_pad` values one program copies."""
    return max(1, 2048 // dim_pad)


def _cut(kv_heads: int, shapes: Shapes, window: int) -> dict[str, int]:
    """Few KV heads need more chunks of one row to fill the device; more chunks would only cost scratch."""
    most = max(16, min(128, 256 // _pow2(kv_heads)))
    return {"TILE": shapes.keys, "MIN_TILES": MIN_CHUNK_KEYS // shapes.keys, "MAX_CHUNKS": most, "WINDOW": window}


def _pow2(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _pad(count: int) -> int:
    """The side of a matrix operand: a power of two, at least 16."""
    return max(16, _pow2(count))


def varlen_attention(
    q: Tensor, kv: DeviceKv, plan: DevicePlan, *, scale: float, sliding_window: int | None = None
) -> Tensor | None:
    """`paged_attention` by torch's FlashAttention; None where torch has no paged one for these shapes and types.

    Its FlashAttention 2 needs blocks of a multiple of 256 tokens; FlashAttention 3 (a package of its own, activated
    with `torch.nn.attention.activate_flash_attention_impl("FA3")`) takes any. Rows without context are not for it.
    """
    try:
        from torch.nn.attention import current_flash_attention_impl, varlen
    except ImportError:
        return None
    taken = inspect.signature(varlen.varlen_attn).parameters
    if not {"block_table", "seqused_k", "enable_gqa", "window_size", "scale"} <= taken.keys():
        return None
    paged = plan.block_size % _FLASH2_PAGE == 0 or current_flash_attention_impl() == "FA3"
    half = q.dtype in (torch.bfloat16, torch.float16)
    if not (paged and half and q.shape[2] == kv.v.shape[3] and q.shape[2] <= 256 and q.shape[2] % 8 == 0):
        return None
    out: Any = varlen.varlen_attn(
        q,
        kv.k,
        kv.v,
        plan.q_start,
        None,
        plan.max_q_len,
        plan.max_context,
        scale=scale,
        # Its window counts the keys before a row's own.
        window_size=(-1, 0) if sliding_window is None else (sliding_window - 1, 0),
        enable_gqa=True,
        seqused_k=plan.context_len.contiguous(),
        block_table=plan.block_table.contiguous(),
    )
    return out if isinstance(out, Tensor) else None


def compile_cases() -> list[CompileCase]:
    """Every program in the shapes of the families we know: head sizes, types, and each option once."""
    cases: list[CompileCase] = []
    half, single = torch.bfloat16, torch.float32
    for dtype, heads, dims, block_size, context, options in (
        (half, (32, 8), (128, 128), 16, 8192, {}),  # Llama 3.1
        (half, (14, 2), (64, 64), 16, 8192, {}),  # Qwen2 0.5B
        (half, (32, 32), (80, 80), 8, 8192, {}),
        (half, (32, 32), (96, 96), 16, 8192, {"sliding_window": 2047}),  # Phi-3
        (half, (8, 4), (256, 256), 16, 8192, {"sliding_window": 4096, "softcap": 50.0}),  # Gemma 2
        (half, (64, 8), (64, 64), 16, 8192, {"sliding_window": 128, "sinks": True}),  # gpt-oss
        (half, (16, 16), (192, 128), 32, 8192, {}),  # DeepSeek, expanded
        (torch.float16, (32, 8), (128, 128), 16, 8192, {"sinks": True}),
        (torch.float16, (16, 2), (256, 256), 16, 100, {}),
        (single, (14, 2), (64, 64), 16, 8192, {}),
        (single, (32, 8), (128, 128), 16, 8192, {"softcap": 50.0}),
        (single, (8, 4), (256, 256), 16, 8192, {"sliding_window": 4096}),
    ):
        cases += record(functools.partial(_attend_blank, dtype, heads, dims, block_size, context, **options))
    return unique(cases)


def _attend_blank(
    dtype: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    context: int,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    tables = [range(-(-context // block_size))] * 2
    plan = DevicePlan.build((1, 2), (context, context), tables, block_size, "meta", pin=False)
    blank = functools.partial(torch.empty, dtype=dtype, device="meta")
    kv = DeviceKv(*(blank(4, block_size, heads[1], dim) for dim in dims))
    new = [blank(3, heads[1], dim) for dim in dims]
    q = blank(3, heads[0], dims[0])
    write_kv(kv, new[0], new[1], plan)
    paged_attention(
        q,
        kv,
        plan,
        scale=1.0,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=q.new_empty(heads[0]) if sinks else None,
    )
