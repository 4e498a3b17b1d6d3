"""Paged caches of random keys for attention: the tables are shuffled, and what no row may see is NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serverlesslora_kernels.cuda.attention import DeviceKv, DevicePlan, write_kv


class Heads(NamedTuple):
    q: int
    kv: int
    dim: int


class Case(NamedTuple):
    q: Tensor  # [T, q_heads, dim]
    keys: list[Tensor]  # of each sequence, [context, kv_heads, dim]
    values: list[Tensor]
    kv: DeviceKv
    plan: DevicePlan
    q_lens: list[int]


def build(
    heads: Heads,
    q_lens: Sequence[int],
    contexts: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """The cache is filled by `write_kv`: the context first, then the new tokens."""
    generator = torch.Generator(device).manual_seed(sum(contexts))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    blocks = [-(-context // block_size) for context in contexts]
    num_blocks = sum(blocks) + 3
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in blocks]
    # Both in one pool, as the engine has them: a block's keys and values lie together.
    pool = torch.full((num_blocks, 2, block_size, heads.kv, heads.dim), math.nan, dtype=dtype, device=device)
    kv = DeviceKv(pool[:, 0], pool[:, 1])
    keys = [random(context, heads.kv, heads.dim) for context in contexts]
    values = [random(context, heads.kv, heads.dim) for context in contexts]
    pin = device.type == "cuda"
    everything = DevicePlan.build(contexts, contexts, tables, block_size, device, pin=pin)
    write_kv(kv, torch.cat(keys), torch.cat(values), everything)
    plan = DevicePlan.build(q_lens, contexts, tables, block_size, device, pin=pin)
    return Case(random(sum(q_lens), heads.q, heads.dim), keys, values, kv, plan, list(q_lens))


def oracle(
    case: Case,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """In float64, a sequence at a time."""
    outputs, row = [], 0
    for keys, values, q_len in zip(case.keys, case.values, case.q_lens, strict=True):
        group = case.q.shape[1] // keys.shape[1]
        q = case.q[row : row + q_len].double()
        k, v = keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
        scores = torch.einsum("thd,chd->htc", q, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(len(keys) - q_len, len(keys), device=q.device)[:, None]
        key = torch.arange(len(keys), device=q.device)[None, :]
        seen = key <= position
        if sliding_window is not None:
            seen = seen & (key > position - sliding_window)
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, q_len, 1)), 2)
        weights = scores.softmax(2)[:, :, : len(keys)]
        outputs.append(torch.einsum("htc,chd->thd", weights, v))
        row += q_len
    return torch.cat(outputs)
