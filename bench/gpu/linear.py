"""Matrix products of few rows: the library's against the skinny kernel's, and the table of which one to choose."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from bench.gpu.record import Recorder
from bench.gpu.timing import Stopwatch
from serverlesslora_kernels.cuda.linear import LinearChoice, measure, skinny

SHAPES = {  # n, k
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B lm_head": (128256, 4096),
    "1B qkv": (3072, 2048),
    "1B o": (2048, 2048),
    "1B gate_up": (16384, 2048),
    "1B down": (2048, 8192),
    "1B lm_head": (128256, 2048),
}
ROWS = (1, 2, 4, 8, 16, 32)
TURNS = 64  # in one graph: as many as `measure` has copies of a small weight, so that none is found in the cache


def run(recorder: Recorder) -> None:
    setting = recorder.setting
    tables: list[LinearChoice] = []
    for name, shape in SHAPES.items() if not setting.is_dry else [("tiny", (48, 64))]:
        if setting.seconds_left < 4:
            recorder.leave_out(name)
            continue
        recorder.part(name, lambda name=name, shape=shape: tables.append(_shape(recorder, name, *shape)))  # type: ignore[misc]
        if setting.results is not None and not setting.is_dry and tables:
            write_table(table_path(setting.results), tables)


def compile_all(recorder: Recorder) -> None:
    """Every launch of this section once: Triton keeps what it compiled for it."""
    device, rows = recorder.setting.torch_device, ROWS if not recorder.setting.is_dry else (1, 3)
    with torch.inference_mode():
        for n, k in SHAPES.values() if not recorder.setting.is_dry else [(48, 64)]:
            weight = torch.zeros(n, k, device=device, dtype=torch.bfloat16)
            for count in rows:
                x, y = (torch.zeros(count, width, device=device, dtype=torch.bfloat16) for width in (k, n))
                skinny(y, x, weight, None, add=False)


def table_path(results: Path) -> Path:
    return results.with_name(f"{results.stem}-linear.json")


def write_table(path: Path, tables: list[LinearChoice]) -> None:
    """One table of all shapes, as `LinearChoice` is decoded: who reads it never sees half of one."""
    measured = tuple(entry for table in tables for entry in table.measured)
    text = msgspec.json.format(msgspec.json.encode(LinearChoice(measured, device=tables[0].device)), indent=1)
    draft = path.with_suffix(".draft")
    draft.write_bytes(text + b"\n")
    os.replace(draft, path)


def _shape(recorder: Recorder, name: str, n: int, k: int) -> LinearChoice:
    setting = recorder.setting
    rows, repeats = (ROWS, 7) if not setting.is_dry else ((1, 3), 1)
    watch = Stopwatch(setting)

    def in_a_graph(work: Callable[[int], None], repeats: int) -> float:
        """As the engine launches it; by bursts from Python the launches of small products would be timed."""
        turns = TURNS if not setting.is_dry else 2
        return watch.graph_us([functools.partial(work, turn) for turn in range(turns)], repeats=repeats)

    with torch.inference_mode():
        choices = measure([(n, k)], rows, repeats, device=setting.torch_device, stopwatch=in_a_graph)
    recorder.check(f"{name}: every number of rows measured", len(choices.measured) == len(rows))
    for entry in choices.measured:
        floor = setting.bytes_us(2 * (n * k + entry.rows * (n + k)))
        recorder.number(f"{name} rows {entry.rows}: library", entry.library_us, "us", floor=floor)
        recorder.number(f"{name} rows {entry.rows}: skinny", entry.skinny_us, "us", floor=floor)
    if not setting.is_dry:
        skinny_rows = [entry.rows for entry in choices.measured if entry.path == "skinny"]
        recorder.check(
            f"{name}: which path is worth it", True, f"skinny for rows {skinny_rows}" if skinny_rows else "library"
        )
    return choices
