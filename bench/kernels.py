"""Times the CPU kernels against the machine's own limits and against torch, interleaved, as JSON lines.

    PYTHONPATH=kernels python bench/kernels.py [--threads N] [--repeats N] [--only linear,sgmv]

Every repeat runs all contenders of a case one after the other, so that a busy machine slows them alike; ratios are
medians of the per-repeat ratios. Weights are rotated through more memory than the caches hold. `floor` is the time a
plain sum over as many bytes of a large tensor takes in the same repeat.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from serverlesslora_kernels import native
from serverlesslora_kernels.linear import linear
from serverlesslora_kernels.segments import LoraPiece, LoraWeights, SegmentTable
from serverlesslora_kernels.sgmv import sgmv

LAYERS = 24
LINEARS = {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864), "lm_head": (151936, 896)}
GROUPS = {  # k, then the (outputs, offset) of each piece
    "qkv": (896, [(896, 0), (128, 896), (128, 1024)]),
    "o": (896, [(896, 0)]),
    "gate_up": (896, [(4864, 0), (4864, 4864)]),
    "down": (4864, [(896, 0)]),
}
SEGMENTS = {  # rows of each adapter's segment
    "16 adapters x 1 row": [1] * 16,
    "16 adapters x 8 rows": [8] * 16,
    "1 adapter x 1 row": [1],
    "1 adapter x 16 rows": [16],
    "1 adapter x 128 rows": [128],
}
Contenders = dict[str, Callable[[], object]]


def emit(**record: object) -> None:
    print(json.dumps(record), flush=True)


def setup(threads: int) -> dict[str, object]:
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), "")
    return {
        "case": "setup",
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "threads": threads,
        "clock": "thread_time" if threads == 1 else "wall",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native": {name: native.load(name) is not None for name in ("linear", "sgmv")},
    }


def timed(call: Callable[[], object]) -> float:
    """One thread is timed by the time it ran, which a busy machine disturbs less; more only by the wall clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def compare(contenders: Contenders, num_bytes: int, memory: Tensor, repeats: int) -> dict[str, object]:
    """Times in ms, and the first contender's ratio to the byte floor and to each of the others."""
    times: dict[str, list[float]] = {name: [] for name in (*contenders, "floor")}
    for call in contenders.values():
        call()
    for _ in range(repeats):
        for name, call in contenders.items():
            times[name].append(timed(call))
        times["floor"].append(timed(memory.sum) * num_bytes / memory.nbytes)
    ours, *others = times
    ratios = {f"to_{name}": [a / b for a, b in zip(times[ours], times[name], strict=True)] for name in others}
    return {
        "ms": {name: spread([1e3 * value for value in values]) for name, values in times.items()},
        "gb_per_s": round(num_bytes / statistics.median(times[ours]) / 1e9, 1),
        "ratio": {name: spread(values) for name, values in ratios.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def linear_cases(memory: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    for name, (n, k) in LINEARS.items():
        copies = max(1, min(LAYERS, 300_000_000 // (2 * n * k)))
        weights = torch.randn(copies, n, k).bfloat16()
        for rows in (1, 4, 8, 16, 32, 64):
            x = torch.randn(rows, k).bfloat16()
            contenders: Contenders = {
                "ours": lambda x=x, weights=weights: [linear(x, w) for w in weights],  # type: ignore[misc]
                "f_linear": lambda x=x, weights=weights: [torch.nn.functional.linear(x, w) for w in weights],  # type: ignore[misc]
            }
            result = compare(contenders, weights.nbytes, memory, repeats)
            yield {"case": "linear", "shape": name, "n": n, "k": k, "rows": rows, "calls": copies, **result}


def sgmv_cases(memory: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    """All seven linears of 24 layers, rank 16: what LoRA adds to one step of the 0.5B shape."""
    adapter = {
        group: [
            LoraPiece(torch.randn(16, k).bfloat16(), torch.randn(n, 16).bfloat16(), 2.0, offset) for n, offset in pieces
        ]
        for group, (k, pieces) in GROUPS.items()
    }
    start = time.perf_counter()
    packed = [
        [{g: LoraWeights.pack(p, torch.bfloat16) for g, p in adapter.items()} for _ in range(LAYERS)] for _ in range(16)
    ]
    yield {"case": "pack", "adapters": 16, "ms_per_adapter": round((time.perf_counter() - start) / 16 * 1e3, 2)}
    stacked = {  # what bmm needs: [adapters, rank, k] and [adapters, n, rank], a fresh copy per layer
        (layer, group, i): (
            piece.a.expand(16, -1, -1).contiguous(),
            piece.b.expand(16, -1, -1).contiguous(),
            piece.offset,
        )
        for layer in range(LAYERS)
        for group, pieces in adapter.items()
        for i, piece in enumerate(pieces)
    }
    for name, rows_per_segment in SEGMENTS.items():
        total = sum(rows_per_segment)
        bounds = [sum(rows_per_segment[:i]) for i in range(len(rows_per_segment) + 1)]
        xs = {group: torch.randn(total, k).bfloat16() for group, (k, _) in GROUPS.items()}
        ys = {group: torch.zeros(total, sum(n for n, _ in pieces)).bfloat16() for group, (_, pieces) in GROUPS.items()}
        tables = [
            (
                group,
                SegmentTable(
                    [(bounds[i], bounds[i + 1], packed[i][layer][group]) for i in range(len(rows_per_segment))]
                ),
            )
            for layer in range(LAYERS)
            for group in GROUPS
        ]
        count, each = len(rows_per_segment), rows_per_segment[0]

        def ours(
            tables: list[tuple[str, SegmentTable]] = tables, xs: dict[str, Tensor] = xs, ys: dict[str, Tensor] = ys
        ) -> None:
            for group, table in tables:
                sgmv(ys[group], xs[group], table)

        def bmm(count: int = count, each: int = each, xs: dict[str, Tensor] = xs, ys: dict[str, Tensor] = ys) -> None:
            for (_, group, _), (a, b, offset) in stacked.items():
                x = xs[group].view(count, each, -1)
                update = torch.bmm(torch.bmm(x, a[:count].mT), b[:count].mT).mul_(2.0)
                ys[group][:, offset : offset + b.shape[1]] += update.view(count * each, -1)

        num_bytes = sum(w.nbytes for i in range(count) for layer in packed[i] for w in layer.values())
        result = compare({"ours": ours, "bmm": bmm}, num_bytes, memory, repeats)
        yield {
            "case": "sgmv",
            "segments": name,
            "rank": 16,
            "calls": len(tables),
            "mb": round(num_bytes / 1e6, 1),
            **result,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="linear,sgmv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    emit(**setup(arguments.threads))
    memory = torch.ones(1 << 25, dtype=torch.int64)
    cases = {"linear": linear_cases, "sgmv": sgmv_cases}
    with torch.inference_mode():
        for name in arguments.only.split(","):
            for record in cases[name](memory, arguments.repeats):
                emit(**record)


if __name__ == "__main__":
    main()
