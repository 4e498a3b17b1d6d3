"""What there is to prove, in the order it is proven: what is wrong first, what is slow after."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bench.gpu.record import Recorder


class Section(NamedTuple):
    name: str
    max_s: float  # its own deadline
    min_s: float  # kept free for it by those before it
    proves: str
    module: str = ""  # where that is not its name
    variant: str = ""  # for a module that serves several sections
    is_correctness: bool = False  # also runs, on tiny shapes, without a GPU
    is_together: bool = False  # runs beside its neighbours of this kind: what it measures is no time of the device

    def run(self, recorder: Recorder) -> None:
        function: Callable[[Recorder], None] = importlib.import_module(f"bench.gpu.{self.module or self.name}").run
        function(recorder)


def _kernels(variant: str) -> Section:
    what = f"every kernel against float64 ({variant}), and what its first use costs"
    return Section(f"kernels_{variant}", 140, 50, what, "kernels", variant, is_correctness=True, is_together=True)


def _compile(variant: str) -> Section:
    what = f"compiles what the timed sections use ({variant}), several sections at a time"
    return Section(f"compile_{variant}", 140, 50, what, "compile_ahead", variant, is_together=True)


SECTIONS = (
    Section("driver", 75, 30, "the backbone is shared, read-only, and nothing is leaked", is_correctness=True),
    _kernels("bfloat16"),
    _kernels("float16"),
    _kernels("float32"),
    Section(
        "parity",
        140,
        50,
        "the engine against PEFT; interleaved requests against lonely ones",
        is_correctness=True,
        is_together=True,
    ),
    _compile("sgmv"),
    _compile("8b"),
    _compile("1b"),
    _compile("linear"),
    Section("limits", 25, 10, "what this device can do at best: the floors of all other numbers"),
    Section("engine_8b", 90, 45, "an 8B shape: attach, decode steps and prefill against their floors", "engine", "8b"),
    Section("sgmv", 75, 25, "SGMV against its byte floor and against bmm over gathered weights"),
    Section("cold", 75, 35, "what a first token costs by where its adapter and worker are", is_correctness=True),
    Section("load", 45, 20, "a checkpoint streamed to the device and attached by another process", is_correctness=True),
    Section("attention", 40, 12, "decode attention against the bandwidth of the device"),
    Section("engine_1b", 50, 20, "a 1B shape: attach, decode steps and prefill against their floors", "engine", "1b"),
    Section("linear", 40, 12, "matrix products of few rows: the library against the skinny kernel"),
)


def find(name: str) -> Section:
    return next(section for section in SECTIONS if section.name == name)


def choose(only: Sequence[str], *, without_gpu: bool) -> list[Section]:
    """In their order; `kernels` means all of `kernels_…`. Numbers need the limits. Without a GPU there are no numbers,
    and a section that has only those runs when it is asked for by name."""
    if not only:
        return [section for section in SECTIONS if section.is_correctness or not without_gpu]
    wanted = set() if without_gpu else {"limits"}
    for name in only:
        found = {section.name for section in SECTIONS if name in (section.name, section.name.split("_")[0])}
        if not found:
            raise SystemExit(f"no section {name}; there are {', '.join(section.name for section in SECTIONS)}")
        wanted |= found
    return [section for section in SECTIONS if section.name in wanted]


def turns(chosen: Sequence[Section]) -> list[list[Section]]:
    """Sections that run at the same time are one turn."""
    found: list[list[Section]] = []
    for section in chosen:
        if section.is_together and found and found[-1][-1].is_together:
            found[-1].append(section)
        else:
            found.append([section])
    return found


def deadline_s(turn: Sequence[Section], left_s: float, later: Sequence[Sequence[Section]]) -> float:
    """All it may take without taking what the later ones need at least; 0 when it needs far more."""
    most, least = max(section.max_s for section in turn), max(section.min_s for section in turn)
    kept = sum(max(section.min_s for section in other) for other in later)
    mine = min(most, max(left_s - kept, min(least, left_s)))
    return mine if mine >= least / 2 else 0.0
