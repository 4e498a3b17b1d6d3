"""Paged attention over packed batches: decode rows and prefill chunks of many sequences in one call, no padding.

The cache is stored the way the native kernel reads it. A *unit* is four bytes: one float32, or `pair` = 2 values of a
16-bit type. Block first, so that copying `cache[i]` copies a block whatever the layout inside:

    k_cache [num_blocks, kv_heads, dim_k / pair, block_size, pair]
    v_cache [num_blocks, kv_heads, block_size / pair, dim_v, pair]
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from serverlesslora_kernels import native

MAX_NATIVE_DIM = 512
# The native kernel reads whole registers and may read this far past the last row of a cache.
READ_SLACK_BYTES = 64


class KvCache(NamedTuple):
    k: Tensor  # [num_blocks, kv_heads, dim_k / pair, block_size, pair]
    v: Tensor  # [num_blocks, kv_heads, block_size / pair, dim_v, pair]


def allocate_kv(
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    dim_k: int,
    dim_v: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> KvCache:
    """One layer's cache, not initialised: pages nobody wrote to cost no memory."""
    pair = _pair(dtype)
    if dim_k % pair or block_size % pair:
        raise ValueError(f"dim_k {dim_k} and block_size {block_size} must be multiples of {pair} for {dtype}")
    return KvCache(
        _empty_with_slack((num_blocks, kv_heads, dim_k // pair, block_size, pair), dtype, device),
        _empty_with_slack((num_blocks, kv_heads, block_size // pair, dim_v, pair), dtype, device),
    )


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the rows of one engine step sit; built once per step and shared by all layers."""

    num_seqs: int
    num_tokens: int
    block_size: int
    q_start: Tensor  # int32 [num_seqs + 1], first packed row of each sequence
    context_len: Tensor  # int32 [num_seqs], tokens including the new ones
    block_table: Tensor  # int32 [num_seqs, max_blocks]; entries beyond a sequence's context are never read
    slots: Tensor  # int64 [num_tokens], block * block_size + offset of each new token
    spans: tuple[tuple[int, int, int], ...]  # (first row, end row, context) per sequence, for code that loops in Python
    addresses: tuple[int, int, int, int]  # of q_start, context_len, block_table, slots

    @classmethod
    def build(
        cls,
        q_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """`block_tables[s]` may be longer than needed; `array("i")` rows are copied faster than lists."""
        width = max((context + block_size - 1) // block_size for context in context_lens)
        q_start, table, slots = array("i", [0]), array("i"), array("q")
        spans, row = [], 0
        for q_len, context, blocks in zip(q_lens, context_lens, block_tables, strict=True):
            needed = (context + block_size - 1) // block_size
            if not 0 < q_len <= context or len(blocks) < needed:
                raise ValueError(f"{q_len} new tokens of {context} do not fit {len(blocks)} blocks of {block_size}")
            if q_len == 1:
                slots.append(blocks[needed - 1] * block_size + (context - 1) % block_size)
            else:
                _extend_slots(slots, blocks, context - q_len, context, block_size)
            table.extend(blocks if len(blocks) == needed else blocks[:needed])
            if needed < width:
                table.extend([0] * (width - needed))
            spans.append((row, row + q_len, context))
            row += q_len
            q_start.append(row)
        tensors = (
            torch.frombuffer(q_start, dtype=torch.int32).to(device),
            torch.frombuffer(array("i", context_lens), dtype=torch.int32).to(device),
            torch.frombuffer(table, dtype=torch.int32).view(len(spans), width).to(device),
            torch.frombuffer(slots, dtype=torch.int64).to(device),
        )
        a, b, c, d = (tensor.data_ptr() for tensor in tensors)
        return cls(len(spans), row, block_size, *tensors, tuple(spans), (a, b, c, d))


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    """Store k [T, kv_heads, dim_k] and v [T, kv_heads, dim_v], strided views welcome, at `plan.slots`, in place.

    Tokens of a block must be written in ascending order: the first half of a unit clears the second, so that a freed
    block's leftovers never meet a weight of zero as NaN.
    """
    library = _library() if _fits(k_cache, v_cache, plan) else None
    if library is None or k.dtype != k_cache.dtype or v.dtype != k_cache.dtype:
        _write_torch(k_cache, v_cache, k, v, plan)
        return
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    tokens, heads, dim_k = k.shape
    k_token, k_head, _ = k.stride()
    v_token, v_head, _ = v.stride()
    library.write_kv(
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        plan.addresses[3],
        tokens,
        heads,
        dim_k,
        v.shape[2],
        plan.block_size,
        k_token,
        k_head,
        v_token,
        v_head,
        k.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
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
    """
    library = _library() if _fits(k_cache, v_cache, plan) else None
    if library is None or q.dtype != k_cache.dtype:
        return attend_torch(q, k_cache, v_cache, plan, scale, sliding_window, softcap, sinks)
    if q.stride(2) != 1:
        q = q.contiguous()
    if sinks is not None and (sinks.dtype is not torch.float32 or not sinks.is_contiguous()):
        sinks = sinks.to(torch.float32).contiguous()
    tokens, q_heads, dim_k = q.shape
    kv_heads, dim_v = k_cache.shape[1], v_cache.shape[3]
    q_token, q_head, _ = q.stride()
    out = q.new_empty((tokens, q_heads, dim_v))
    q_start, context_len, block_table, _ = plan.addresses
    failed = library.paged_attention(
        out.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        q_start,
        context_len,
        block_table,
        0 if sinks is None else sinks.data_ptr(),
        plan.num_seqs,
        plan.block_table.shape[1],
        q_heads,
        kv_heads,
        dim_k,
        dim_v,
        plan.block_size,
        q_token,
        q_head,
        sliding_window or 0,
        scale,
        softcap or 0.0,
        q.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the work list of paged attention")
    return out


def attend_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`paged_attention` in plain torch, one sequence at a time: any device and dtype, no compiler needed."""
    group = q.shape[1] // k_cache.shape[1]
    out = q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3]))
    for seq, (start, end, context) in enumerate(plan.spans):
        first_position = context - (end - start)
        first_block = max(0, first_position + 1 - sliding_window) // plan.block_size if sliding_window else 0
        blocks = plan.block_table[seq, first_block : (context + plan.block_size - 1) // plan.block_size]
        first_key = first_block * plan.block_size
        k = k_cache[blocks].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)[:, : context - first_key]
        v = v_cache[blocks].permute(1, 0, 2, 4, 3).flatten(1, 3)[:, : context - first_key]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        queries = q[start:end].transpose(0, 1)
        mask = None
        causal = first_position == 0 and sliding_window is None
        if not causal and (end - start > 1 or sliding_window):
            position = torch.arange(first_position, context, device=q.device)[:, None]
            key = torch.arange(first_key, context, device=q.device)
            mask = key <= position
            if sliding_window:
                mask &= key > position - sliding_window
        if softcap is None and sinks is None:
            heads = F.scaled_dot_product_attention(
                queries[None], k[None], v[None], attn_mask=mask, is_causal=causal and end - start > 1, scale=scale
            )[0]
        else:
            if causal:
                mask = torch.ones(context, context, dtype=torch.bool, device=q.device).tril()
            heads = _softmax_attention(queries, k, v, mask, scale, softcap, sinks)
        out[start:end] = heads.transpose(0, 1)
    return out


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)), dim=2)
    return torch.matmul(scores.softmax(dim=2)[..., : k.shape[1]], v.float()).to(q.dtype)


def _write_torch(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    block, offset = plan.slots // plan.block_size, plan.slots % plan.block_size
    pair = k_cache.shape[4]
    k_cache[block, :, :, offset, :] = k.reshape(*k.shape[:2], -1, pair).to(k_cache.dtype)
    for lane in range(pair):  # ascending: see write_kv
        here = offset % pair == lane
        target = (block[here], slice(None), offset[here] // pair)
        if lane == 0 and pair > 1:
            v_cache[target] = 0
        v_cache[(*target, slice(None), lane)] = v[here].to(v_cache.dtype)


def _extend_slots(slots: "array[int]", blocks: Sequence[int], start: int, end: int, block_size: int) -> None:
    while start < end:
        stop = min(end, (start // block_size + 1) * block_size)
        base = (blocks[start // block_size] - start // block_size) * block_size
        slots.extend(range(base + start, base + stop))
        start = stop


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype.itemsize == 2 else 1


def _empty_with_slack(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.empty(count + READ_SLACK_BYTES // dtype.itemsize, dtype=dtype, device=device)[:count].view(shape)


def _fits(k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> bool:
    return (
        k_cache.dtype in (torch.bfloat16, torch.float32)
        and k_cache.is_cpu
        and (plan.block_size == 8 or plan.block_size % 16 == 0)
        and v_cache.shape[3] <= MAX_NATIVE_DIM
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("attention")
    if library is not None:
        pointer, long, real, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
        library.paged_attention.argtypes = [pointer] * 8 + [long] * 10 + [real] * 2 + [integer] * 2
        library.paged_attention.restype = integer
        library.write_kv.argtypes = [pointer] * 5 + [long] * 9 + [integer] * 2
        library.write_kv.restype = None
    return library
