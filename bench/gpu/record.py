"""What a section finds out, written to its file at once: a section that dies has still said what it saw before."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import torch

DeviceKind = Literal["cuda", "emulated"]


class Check(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    detail: str = ""


class Number(msgspec.Struct, frozen=True):
    """`floor` is the best this machine could do and `bar` what we promise, both in `unit`."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    ratio: float | None = None  # value / floor
    bar: float | None = None
    met: bool | None = None


class SectionResult(msgspec.Struct):
    name: str
    ok: bool | None = True  # None: not run, for this reason
    reason: str = ""
    seconds: float = 0.0
    checks: list[Check] = []
    numbers: list[Number] = []
    left_out: list[str] = []  # for want of time
    tail: str = ""  # of what a failed section printed


class Skipped(Exception):
    """The section has nothing to do here; the message says why."""


@dataclass
class Setting:
    """Where a section runs and what is known by then."""

    kind: DeviceKind
    deadline: float  # of time.monotonic
    scratch: Path  # removed at the end of the run
    limits: Mapping[str, float] = field(default_factory=dict)  # measured by the section of this name
    variant: str = ""  # of a module that serves several sections
    results: Path | None = None  # the result file, for what is written beside it

    @property
    def is_dry(self) -> bool:
        """Without a GPU: tiny shapes, and times mean nothing."""
        return self.kind == "emulated"

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", 0) if self.kind == "cuda" else torch.device("cpu")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def bytes_us(self, num_bytes: float) -> float | None:
        """The time the device needs to move so many bytes, by the bandwidth of its own copies."""
        rate = self.limits.get("copy_gb_s")
        return None if rate is None else num_bytes / rate / 1e3

    def flops_us(self, flops: float) -> float | None:
        rate = self.limits.get("matmul_tflop_s")
        return None if rate is None else flops / rate / 1e6


class Recorder:
    def __init__(self, name: str, path: Path, setting: Setting) -> None:
        self.result = SectionResult(name)
        self.setting = setting
        self._path = path
        self._started = time.monotonic()
        self._write()

    def check(self, name: str, ok: bool, detail: str = "") -> bool:
        self.result.checks.append(Check(name, bool(ok), detail))
        if not ok:
            self.result.ok = False
            print(f"FAILED {name}: {detail}", flush=True)
        self._write()
        return bool(ok)

    def within(self, name: str, error: float, tolerance: float) -> bool:
        """NaN never passes."""
        return self.check(name, error <= tolerance, f"{error:.3g} <= {tolerance:.3g}")

    def number(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        floor: float | None = None,
        bar: float | None = None,
        higher_is_better: bool = False,
    ) -> None:
        """Dry runs measure nothing."""
        if self.setting.is_dry or value is None:
            return
        met = None if bar is None else (value >= bar if higher_is_better else value <= bar)
        ratio = value / floor if floor else None
        self.result.numbers.append(Number(name, value, unit, floor, ratio, bar, met))
        self._write()

    def part(self, name: str, body: Callable[[], None], *, needs_s: float = 0.0) -> bool:
        """One independent piece: what it raises fails it alone. Left out, visibly, when the time is gone."""
        if self.setting.seconds_left < needs_s:
            self.leave_out(name)
            return False
        try:
            body()
        except Skipped as skipped:
            self.check(name, True, f"skipped: {skipped}")
        except Exception as error:
            traceback.print_exc()
            return self.check(name, False, f"{type(error).__name__}: {str(error)[:300]}")
        return True

    def leave_out(self, name: str) -> None:
        self.result.left_out.append(name)
        self._write()

    def skip(self, reason: str) -> None:
        self.result.ok, self.result.reason = None, reason

    def finish(self) -> None:
        self.result.seconds = time.monotonic() - self._started
        self._write()

    def _write(self) -> None:
        self.result.seconds = time.monotonic() - self._started
        draft = self._path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(self.result))
        os.replace(draft, self._path)
