"""Matrix products of few rows: the library's against the skinny kernel's, and which one a table should choose."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.record import Recorder
from serverlesslora_kernels.cuda.linear import measure

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


def run(recorder: Recorder) -> None:
    setting = recorder.setting
    for name, shape in SHAPES.items() if not setting.is_dry else [("tiny", (48, 64))]:
        if setting.seconds_left < 4:
            recorder.leave_out(name)
            continue
        recorder.part(name, lambda name=name, shape=shape: _shape(recorder, name, *shape))  # type: ignore[misc]


def _shape(recorder: Recorder, name: str, n: int, k: int) -> None:
    setting = recorder.setting
    rows, repeats, stopwatch = (ROWS, 7, None) if not setting.is_dry else ((1, 3), 1, _once)
    with torch.inference_mode():
        choices = measure([(n, k)], rows, repeats, device=setting.torch_device, stopwatch=stopwatch)
    recorder.check(f"{name}: every number of rows measured", len(choices.measured) == len(rows))
    for entry in choices.measured:
        floor = setting.bytes_us(2 * (n * k + entry.rows * (n + k)))
        recorder.number(f"{name} rows {entry.rows}: library", entry.library_us, "us", floor=floor)
        recorder.number(f"{name} rows {entry.rows}: skinny", entry.skinny_us, "us", floor=floor)
    if not setting.is_dry:
        skinny = [entry.rows for entry in choices.measured if entry.path == "skinny"]
        recorder.check(f"{name}: which path is worth it", True, f"skinny for rows {skinny}" if skinny else "library")


def _once(work: Callable[[int], None], repeats: int) -> float:
    work(0)
    return 1.0
