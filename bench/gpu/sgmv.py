"""SGMV over shapes, rows, ranks and popularity, against its byte floor and against bmm over gathered weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.record import Recorder, Setting
from bench.gpu.sgmv_cases import Adapters, popular, segments_of
from bench.gpu.timing import Stopwatch, copies_for
from serverlesslora_kernels.cuda.lora_table import ProjectionLayout

NUM_ADAPTERS = 32
MIXED_RANKS = (8, 16, 32, 64)
MARGIN_US = 10.0  # over twice the floor: the bar
ROWS = (1, 8, 32, 512)  # the last as a prefill
MAX_CALLS = 384  # in one graph


class Shape(NamedTuple):
    name: str
    layout: ProjectionLayout


def shapes(hidden: int, outs: Sequence[int]) -> list[Shape]:
    kv = hidden // 4
    qkv = ProjectionLayout(hidden, ((0, hidden), (hidden, kv), (hidden + kv, kv)))
    plain = [Shape(f"{hidden}->{out}", ProjectionLayout(hidden, ((0, out),))) for out in outs]
    return [Shape(f"qkv {hidden}", qkv), *plain]


def all_shapes(*, dry: bool) -> list[Shape]:
    if dry:
        return [shapes(64, [64])[1]]
    down = Shape("14336->4096", ProjectionLayout(14336, ((0, 4096),)))
    return [*shapes(4096, [4096, 14336]), down, *shapes(2048, [4096, 11008])]


def run(recorder: Recorder) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in all_shapes(dry=recorder.setting.is_dry):
            recorder.part(shape.name, lambda shape=shape: _shape(recorder, shape))  # type: ignore[misc]


def compile_all(recorder: Recorder) -> None:
    """Every launch of this section once, on few adapters: Triton keeps what it compiled for it."""
    setting = recorder.setting
    with torch.inference_mode():
        for shape in all_shapes(dry=setting.is_dry):
            for rank in (16, 64) if not setting.is_dry else (4,):  # tiles are cut by rank
                adapters = Adapters([shape.layout], [rank] * 2, torch.bfloat16, setting.torch_device, real=False)
                for rows in ROWS if not setting.is_dry else (2,):
                    x = torch.zeros(rows, shape.layout.in_features, device=setting.torch_device).bfloat16()
                    y = torch.zeros(rows, adapters.width(0), device=setting.torch_device).bfloat16()
                    adapters.call("rows" if rows <= 64 else "tiles", 0, y, x, popular("distinct", rows, 2))()


def _shape(recorder: Recorder, shape: Shape) -> None:
    setting = recorder.setting
    ranks = {"16": [16] * NUM_ADAPTERS}
    if setting.is_dry:
        ranks = {"4": [4, 4]}
    elif shape.name in ("4096->4096", "qkv 4096"):
        ranks |= {str(rank): [rank] * NUM_ADAPTERS for rank in (8, 64)}
        ranks["mixed"] = [MIXED_RANKS[slot % 4] for slot in range(NUM_ADAPTERS)]
    for label, each in ranks.items():
        if setting.seconds_left < 5:
            recorder.leave_out(f"{shape.name} rank {label}")
            continue
        _ranks(recorder, shape, label, each)


def _ranks(recorder: Recorder, shape: Shape, label: str, ranks: list[int]) -> None:
    setting = recorder.setting
    layout, dtype, device = shape.layout, torch.bfloat16, setting.torch_device
    probe = sum(rank * (layout.in_features + width) * 2 for rank in ranks for _, width in layout.sites)
    copies = copies_for(probe, setting, most=24)
    adapters = Adapters([layout] * copies, ranks, dtype, device, real=False)
    # Other ranks than the common one only where they matter most: the section has a minute for everything.
    for rows in (2,) if setting.is_dry else ROWS if label == "16" else (1, 32):
        popularity = ("distinct", "uniform", "skewed", "identical") if label == "16" and rows == 32 else ("distinct",)
        for name in popularity:
            _case(recorder, adapters, shape, label, rows, name)


def _case(recorder: Recorder, adapters: Adapters, shape: Shape, label: str, rows: int, popularity: str) -> None:
    setting, watch = recorder.setting, Stopwatch(recorder.setting)
    device, dtype, num_adapters = setting.torch_device, adapters.dtype, len(adapters.ranks)
    num_used = min(num_adapters, 8 if rows > 64 else num_adapters)  # a prefill has long segments
    slots = popular(popularity, rows, num_used)
    turns = _turns(slots, num_adapters, len(adapters.layouts))
    width, variant = adapters.width(0), "rows" if rows <= 64 else "tiles"
    xs = [torch.randn(rows, shape.layout.in_features, device=device).to(dtype) for _ in adapters.layouts]
    ys = [torch.zeros(rows, width, device=device, dtype=dtype) for _ in adapters.layouts]
    calls = [adapters.call(variant, index, ys[index], xs[index], used) for index, used in turns]
    ours = watch.graph_us(calls, repeats=7)
    name = f"{shape.name} rows {rows} rank {label} {popularity}"
    recorder.check(f"{name}: finite", all(bool(torch.isfinite(y).all()) for y in ys))
    floor = _floor_us(setting, adapters, turns)
    bar = None if floor is None or rows > 64 else 2 * floor + MARGIN_US
    recorder.number(name, ours, "us", floor=floor, bar=bar)
    theirs = watch.graph_us(_gathered(adapters, shape, xs, ys, turns), repeats=7)
    recorder.number(f"{name}: bmm over gathered weights", theirs, "us")
    recorder.number(f"{name}: times faster than bmm", theirs / ours, "x", bar=1.0, higher_is_better=True)


def _turns(slots: Sequence[int], num_adapters: int, copies: int) -> list[tuple[int, list[int]]]:
    """The same popularity with other adapters each time, on every copy, so that none is found in the cache: in a model
    all its other weights pass through the cache between two calls."""
    distinct = len(set(slots))
    shifts = max(1, min(num_adapters // distinct, MAX_CALLS // copies))
    shifted = [sorted((slot + shift * distinct) % num_adapters for slot in slots) for shift in range(shifts)]
    return [(index, used) for used in shifted for index in range(copies)]


def _floor_us(setting: Setting, adapters: Adapters, turns: Sequence[tuple[int, list[int]]]) -> float | None:
    """What moves or is multiplied at least, on average over the turns."""
    bytes_us = setting.bytes_us(statistics.mean(adapters.traffic(index, used) for index, used in turns))
    flops_us = setting.flops_us(statistics.mean(adapters.flops(index, used) for index, used in turns))
    return None if bytes_us is None or flops_us is None else max(bytes_us, flops_us)


def _gathered(
    adapters: Adapters, shape: Shape, xs: list[Tensor], ys: list[Tensor], turns: Sequence[tuple[int, list[int]]]
) -> list[Callable[[], object]]:
    """What one writes with torch alone: weights stacked to the largest rank, gathered by row (or by segment where all
    are of one length), two bmm; a matrix per site, as PEFT has them."""
    device, dtype, count = adapters.device, adapters.dtype, len(adapters.ranks)
    rank, sites, k = max(adapters.ranks), shape.layout.sites, shape.layout.in_features
    stacks = [
        [
            (
                torch.randn(count, k, rank, device=device, dtype=dtype),
                torch.randn(count, rank, width, device=device, dtype=dtype),
                y[:, offset : offset + width],
            )
            for offset, width in sites
        ]
        for y in ys
    ]

    def bound(copy: int, slots: Sequence[int]) -> Callable[[], object]:
        segments = segments_of(slots)
        lengths = {end - start for start, end, _ in segments}
        each = lengths.pop() if len(lengths) == 1 else 1
        index = torch.tensor([slots[start] for start in range(0, len(slots), each)], device=device)
        grouped = xs[copy].view(-1, each, k)

        def call() -> None:
            for a, b, out in stacks[copy]:
                update = torch.bmm(torch.bmm(grouped, a[index]), b[index])
                out.add_(update.view(-1, update.shape[2]), alpha=1e-6)

        return call

    return [bound(copy, slots) for copy, slots in turns]
