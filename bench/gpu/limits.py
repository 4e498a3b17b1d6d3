"""The device's own limits, measured in the same run: every other number is held against one of these."""

from __future__ import annotations

import torch

from bench.gpu.record import Recorder
from bench.gpu.timing import Stopwatch

_BYTES = 4 << 30
_TRANSFER_BYTES = 1 << 30


def run(recorder: Recorder) -> None:
    watch = Stopwatch(recorder.setting)
    _memory(recorder, watch)
    _transfers(recorder, watch)
    _products(recorder, watch)
    _launches(recorder, watch)


def _memory(recorder: Recorder, watch: Stopwatch) -> None:
    setting = recorder.setting
    size = 1 << 20 if setting.is_dry else _BYTES
    source = torch.randint(-(1 << 30), 1 << 30, (size // 4,), dtype=torch.int32, device=setting.torch_device)
    target = torch.empty_like(source)
    copied = _gb_s(2 * source.nbytes, watch.eager_us(lambda: target.copy_(source)))
    recorder.check("a copy is a copy", torch.equal(source, target))
    recorder.number("copy_gb_s", copied, "GB/s")  # read and written
    values = torch.empty(size // 4, device=setting.torch_device).normal_()
    recorder.number("read_gb_s", _gb_s(values.nbytes, watch.eager_us(lambda: values.sum())), "GB/s")


def _transfers(recorder: Recorder, watch: Stopwatch) -> None:
    setting = recorder.setting
    size = 1 << 20 if setting.is_dry else _TRANSFER_BYTES
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not setting.is_dry)
    device = torch.zeros(size, dtype=torch.uint8, device=setting.torch_device)
    for name, target, source in (("h2d_gb_s", device, host), ("d2h_gb_s", host, device)):
        microseconds = watch.eager_us(lambda: target.copy_(source, non_blocking=True), repeats=5)  # noqa: B023
        recorder.number(name, _gb_s(size, microseconds), "GB/s")


def _products(recorder: Recorder, watch: Stopwatch) -> None:
    n = 64 if recorder.setting.is_dry else 8192
    # Zeros would be faster than any real matrix.
    a, b = (torch.randn(n, n, device=recorder.setting.torch_device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    microseconds = watch.eager_us(lambda: torch.mm(a, b, out=c), inner=4)
    recorder.number("matmul_tflop_s", 2 * n**3 / microseconds / 1e6, "TFLOP/s")


def _launches(recorder: Recorder, watch: Stopwatch) -> None:
    small = torch.zeros(256, device=recorder.setting.torch_device)

    def add() -> None:
        small.add_(1.0)

    def many() -> None:
        for _ in range(1000):
            add()

    recorder.number("launch_us", watch.wall_us(many) / 1000, "us per launch from Python")
    recorder.number("graph_kernel_us", watch.graph_us([add], at_least=1000), "us per small kernel in a graph")
    recorder.number("graph_replay_us", watch.graph_us([add], at_least=1), "us per replay of one kernel")
    recorder.check("the device computes", bool(torch.isfinite(small).all()))


def _gb_s(num_bytes: int, microseconds: float) -> float:
    return num_bytes / microseconds / 1e3
