"""Decode and prefill attention over a paged cache, against the time to read the cache once and against torch.

    PYTHONPATH=.:ipc:kernels:loadgen python bench/attention.py [--rounds 30] [--layers 6]

One JSON line per case. The candidates take turns inside every round, so that a busy machine hits them alike; read the
ratios rather than the microseconds. Each call uses another layer's cache, as in a model, so that it does not find its
keys in the cache of the core that just used them.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from serverlesslora_kernels import native
from serverlesslora_kernels.attention import (
    AttentionPlan,
    KvCache,
    allocate_kv,
    attend_torch,
    paged_attention,
    write_kv,
)


class Shape(NamedTuple):
    name: str
    q_heads: int
    kv_heads: int
    dim: int


SHAPES = (Shape("qwen2-0.5b", 14, 2, 64), Shape("llama-1b", 32, 8, 64))
BLOCK_SIZE = 16


class Work(NamedTuple):
    plan: AttentionPlan
    caches: list[KvCache]
    dense: list[list[tuple[Tensor, Tensor]]]  # per layer and sequence: k, v as [1, kv_heads, context, dim]
    k: Tensor
    v: Tensor
    q: Tensor


def prepare(shape: Shape, sequences: int, q_len: int, context: int, layers: int, dtype: torch.dtype) -> Work:
    blocks_each = -(-context // BLOCK_SIZE)
    blocks = list(range(sequences * blocks_each))
    random.Random(0).shuffle(blocks)
    tables = [blocks[i * blocks_each : (i + 1) * blocks_each] for i in range(sequences)]
    fill = AttentionPlan.build([context] * sequences, [context] * sequences, tables, BLOCK_SIZE)
    plan = AttentionPlan.build([q_len] * sequences, [context] * sequences, tables, BLOCK_SIZE)
    caches, dense = [], []
    for _ in range(layers):
        cache = allocate_kv(len(blocks), BLOCK_SIZE, shape.kv_heads, shape.dim, shape.dim, dtype)
        k, v = (torch.randn(sequences * context, shape.kv_heads, shape.dim).to(dtype) for _ in range(2))
        write_kv(*cache, k, v, fill)
        caches.append(cache)
        wholes = (t.view(sequences, context, shape.kv_heads, shape.dim).transpose(1, 2).contiguous() for t in (k, v))
        dense.append([(one[None], other[None]) for one, other in zip(*wholes, strict=True)])
    rows = sequences * q_len
    q = torch.randn(rows, shape.q_heads, shape.dim).to(dtype)
    return Work(plan, caches, dense, k[:rows].clone(), v[:rows].clone(), q)


def medians_us(candidates: dict[str, Callable[[int], object]], rounds: int, layers: int) -> dict[str, float]:
    """Median microseconds per call of each candidate, interleaved; a candidate gets the number of the layer."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 2):
        for name, call in candidates.items():
            began = time.perf_counter()
            for layer in range(layers):
                call(layer)
            if turn >= 2:
                samples[name].append((time.perf_counter() - began) / layers * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def measure(
    shape: Shape, sequences: int, q_len: int, context: int, rounds: int, layers: int, dtype: torch.dtype
) -> None:
    work = prepare(shape, sequences, q_len, context, layers, dtype)
    scale = shape.dim**-0.5
    group = shape.q_heads // shape.kv_heads
    causal = q_len > 1 and q_len == context
    mask = None if causal or q_len == 1 else torch.ones(q_len, context, dtype=torch.bool).tril(context - q_len)

    def dense_loop(layer: int) -> list[Tensor]:
        """Torch with the keys of every sequence already contiguous: what a cache without pages would do."""
        results = []
        for (k, v), (start, end, _) in zip(work.dense[layer], work.plan.spans, strict=True):
            q = work.q[start:end].transpose(0, 1)[None]
            if mask is not None:  # grouped heads with a mask take torch's slow path
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            results.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=mask is None
                )
            )
        return results

    def floor(layer: int) -> None:
        for part in work.caches[layer]:
            part.flatten().view(torch.int64).sum()

    times = medians_us(
        {
            "native": lambda i: paged_attention(work.q, *work.caches[i], work.plan, scale=scale),
            "paged torch": lambda i: attend_torch(work.q, *work.caches[i], work.plan, scale, None, None, None),
            "dense sdpa loop": dense_loop,
            "sum of cache": floor,
            "write_kv": lambda i: write_kv(*work.caches[i], work.k, work.v, work.plan),
        },
        rounds,
        layers,
    )
    bytes_read = 2 * sequences * context * shape.kv_heads * shape.dim * dtype.itemsize
    flops = 4 * shape.q_heads * shape.dim * sequences * sum(range(context - q_len + 1, context + 1))
    result = {
        "case": f"{shape.name} {sequences}x{q_len} rows, context {context}, {str(dtype).removeprefix('torch.')}",
        "us": {name: round(value, 1) for name, value in times.items()},
        "native_gb_s": round(bytes_read / times["native"] / 1e3, 2),
        "native_gflop_s": round(flops / times["native"] / 1e3, 1),
        "sdpa_over_native": round(times["dense sdpa loop"] / times["native"], 2),
        "paged_torch_over_native": round(times["paged torch"] / times["native"], 2),
        "native_over_sum": round(times["native"] / times["sum of cache"], 2),
    }
    print(json.dumps(result), flush=True)


def cpu_name() -> str:
    if not (info := Path("/proc/cpuinfo")).exists():
        return platform.processor() or platform.machine()
    line = next(line for line in info.read_text().splitlines() if line.startswith(("model name", "Processor", "CPU")))
    return line.partition(":")[2].strip()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    setup = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.load("attention") is not None,
        "block_size": BLOCK_SIZE,
        "rounds": arguments.rounds,
        "layers": arguments.layers,
    }
    print(json.dumps({"setup": setup}), flush=True)
    for shape in SHAPES:
        for context in (128, 1024, 4096):
            for sequences in (1, 16):
                measure(shape, sequences, 1, context, arguments.rounds, arguments.layers, dtype)
        for q_len, context in ((128, 128), (512, 512), (512, 2048)):
            measure(shape, 1, q_len, context, max(3, arguments.rounds // 3), arguments.layers, dtype)


if __name__ == "__main__":
    main()
