"""How the rate of all adapters rises and falls together over a trace, without changing how many requests there are.

Arrivals are drawn in a time in which the rate is steady, and then put where the clock is when that much has come in
(the time-change of a point process). Turning it back is exact, so what was drawn can be checked in what was written.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.spelling import parse_law

Times = NDArray[np.float64]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
STEPS = 1024  # per period: the sine is followed in steps of 0.1 % of its height at most


class Course(NamedTuple):
    """When the clock says `clock_s`, as much has come in as at a steady rate by `steady_s`. Both from 0 to the end."""

    clock_s: Times
    steady_s: Times

    def to_clock(self, times_s: Times) -> Times:
        return np.interp(times_s, self.steady_s, self.clock_s)

    def to_steady(self, times_s: Times) -> Times:
        return np.interp(times_s, self.clock_s, self.steady_s)


class Flat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="none"):
    def course(self, span_s: float) -> Course:
        ends = np.array([0.0, span_s])
        return Course(ends, ends)


class Sine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="sine"):
    """rate(t) ~ 1 + depth · sin(2π t / period): begins at the mean, rising."""

    period_s: Seconds
    depth: Annotated[float, Meta(ge=0, le=1)]

    def course(self, span_s: float) -> Course:
        points = max(STEPS, math.ceil(STEPS * span_s / self.period_s)) + 1
        if points > 10_000_000:
            raise WorkloadError(f"a period of {self.period_s:g} s is too short for a trace of {span_s:g} s")
        clock = np.linspace(0, span_s, points)
        turn = 2 * np.pi / self.period_s
        return _course(clock, clock + self.depth / turn * (1 - np.cos(turn * clock)))


class CourseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="file"):
    """CSV of a time in seconds and what came in from then until the next; further columns and a header are ignored.

    It repeats. `period_s` squeezes or stretches all of it to that length: a day's course into a trace of an hour.
    """

    file: str
    period_s: Seconds | None = None

    def course(self, span_s: float) -> Course:
        edges, amounts = _read_course(Path(self.file))
        if self.period_s is not None:
            edges = edges * (self.period_s / edges[-1])
        rounds = math.ceil(span_s / edges[-1])
        if rounds * len(amounts) > 10_000_000:
            raise WorkloadError(f"{self.file} lasts {edges[-1]:g} s, too short for a trace of {span_s:g} s")
        starts = np.concatenate([edges[:-1] + i * edges[-1] for i in range(rounds)])
        clock = np.append(starts, rounds * edges[-1])
        sums = np.concatenate([[0.0], np.cumsum(np.tile(amounts, rounds))])
        within = clock < span_s
        last = np.interp(span_s, clock, sums)
        if last == 0:
            raise WorkloadError(f"nothing comes in during the first {span_s:g} s of {self.file}")
        return _course(np.append(clock[within], span_s), np.append(sums[within], last))


Diurnal = Flat | Sine | CourseFile


def parse_diurnal(text: str) -> Diurnal:
    """`none`, `sine:1h,0.5`, `sine:period=1h,depth=0.5`, `file:counts.csv`, `file:counts.csv,period=1h`.

    Raises WorkloadError.
    """
    law: Diurnal = parse_law(text, Diurnal, "a course of the day")
    return law


def _course(clock: Times, amounts: Times) -> Course:
    return Course(clock, amounts * (clock[-1] / amounts[-1]))


def _read_course(path: Path) -> tuple[Times, Times]:
    """Edges [n + 1] from 0 on, and amounts [n]; the last part is as long as the one before it."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise WorkloadError(f"cannot read the course {path}: {error}") from error
    points = []
    for number, row in enumerate(rows, 1):
        try:
            points.append((float(row[0]), float(row[1])))
        except (ValueError, IndexError):
            if number > 1:  # the first may be a header
                raise WorkloadError(f"{path}: row {number} is not a time and an amount: {','.join(row)[:60]}") from None
    if len(points) < 2:
        raise WorkloadError(f"{path} has {len(points)} rows; a course needs at least 2")
    at, amounts = np.array(points).T
    if not (np.isfinite(at).all() and np.isfinite(amounts).all() and (amounts >= 0).all() and amounts.sum() > 0):
        raise WorkloadError(f"{path}: amounts must be finite, 0 or more, and not all 0")
    if (np.diff(at) <= 0).any():
        raise WorkloadError(f"{path}: times must grow from row to row")
    edges = np.append(at, 2 * at[-1] - at[-2]) - at[0]
    return edges, amounts
