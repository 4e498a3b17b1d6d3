"""A made-up workload: what it is told to be, the trace it becomes, and the proof that the trace is what was told."""

from __future__ import annotations

import heapq
import itertools
import math
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from serverlesslora_loadgen.classes import CLASSES, MIN_ARRIVALS, NORMAL_MAX, class_of, cv
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.arrivals import Arrivals, Gamma, OnOff, Poisson, Times, parse_arrivals
from serverlesslora_loadgen.generate.diurnal import Course, Diurnal, Flat
from serverlesslora_loadgen.generate.lengths import FixedLengths, Lengths
from serverlesslora_loadgen.generate.popularity import Popularity, Zipf, counts
from serverlesslora_loadgen.trace import TraceRequest

# What a class is made by when only its name is given.
PRESETS: dict[str, Arrivals] = {
    "Predictable": Gamma(cv=0.7),
    "Normal": Gamma(cv=2.0),
    "Bursty": OnOff(on_s=20.0, cv=7.0),
}
# Few requests of a heavy-tailed law often look tamer than the law is. An adapter with a class is drawn anew until it
# has it: so many times, and then it cannot be had.
DRAWS = 200
# How far a CV may lie from that of its law, in standard errors (one adapter in two million), and at least, absolutely:
# times are rounded to microseconds.
MAX_ERRORS, MIN_TOLERANCE = 5.0, 0.01

Positive = Annotated[float, Meta(gt=0, le=1e9)]
L = TypeVar("L", Popularity, Diurnal, Lengths)


class ContradictionError(WorkloadError, ValueError):
    """Fields that do not go together. msgspec turns a ValueError into its own, with the place in the file."""


class ArrivalClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the adapters that is asked by one law. Named Predictable, Normal or Bursty it is held to the name,
    except adapters with too few requests for it: they get the class they turn out to have, or none.
    """

    name: Annotated[str, Meta(min_length=1)]
    arrivals: Arrivals | None = None  # None: as PRESETS has it for the name
    weight: Positive = 1.0  # of the adapters, against the other classes'

    def __post_init__(self) -> None:
        if self.arrivals is None and self.name not in PRESETS:
            raise ValueError(f"class {self.name!r} needs `arrivals`; only {', '.join(PRESETS)} go without")

    @property
    def law(self) -> Arrivals:
        return self.arrivals or PRESETS[self.name]


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`classes` are dealt out over the adapters in turns, by weight, the most popular adapter first."""

    adapters: Annotated[int, Meta(ge=1, le=1_000_000)]
    rate_rps: Positive  # of all adapters together; rate x duration is the number of requests, whatever the seed
    duration_s: Positive
    popularity: Popularity = Zipf(s=1.1)
    arrivals: Arrivals | None = None  # of every adapter; None: `classes`, or Poisson
    classes: tuple[ArrivalClass, ...] = ()
    diurnal: Diurnal = Flat()
    lengths: Lengths = FixedLengths(input=128, output=32)
    seed: Annotated[int, Meta(ge=0)] = 0
    name: str = "adapter-{:02d}"  # of adapter i, from 0; the number grows with the digits it needs

    def __post_init__(self) -> None:
        if self.arrivals is not None and self.classes:
            raise ContradictionError("either `arrivals` for every adapter or `classes` with their own, not both")
        try:
            is_pattern = self.name.format(0) != self.name.format(1)
        except (IndexError, KeyError, ValueError, AttributeError):
            is_pattern = False
        if not is_pattern:
            raise ContradictionError(f"`name` {self.name!r} must hold one place for a number, such as adapter-{{:02d}}")


def read_workload(path: Path) -> Workload:
    """TOML. Files it names are looked for beside it. Raises WorkloadError naming the file and the field."""
    try:
        workload = msgspec.convert(tomllib.loads(path.read_text()), Workload)
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read the workload {path}: {error}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise WorkloadError(f"bad workload {path}: {error}") from error
    return msgspec.structs.replace(
        workload,
        popularity=_beside(path, workload.popularity),
        diurnal=_beside(path, workload.diurnal),
        lengths=_beside(path, workload.lengths),
    )


def _beside(path: Path, law: L) -> L:
    file = getattr(law, "file", None)
    return law if file is None else msgspec.structs.replace(law, file=str(path.parent / file))


def parse_classes(text: str) -> tuple[ArrivalClass, ...]:
    """`mixed` (all three), `bursty`, `predictable;bursty`, `Bursty=onoff:on=30,cv=6;Normal`. Raises WorkloadError."""
    if text.strip().lower() == "mixed":
        return tuple(ArrivalClass(name) for name in PRESETS)
    classes = []
    for part in text.split(";"):
        word, equals, law = part.partition("=")
        name = next((each for each in PRESETS if each.lower() == word.strip().lower()), word.strip())
        try:
            classes.append(ArrivalClass(name, parse_arrivals(law) if equals else None))
        except ValueError as error:
            raise WorkloadError(f"{text!r}: {error}, such as {word.strip() or 'name'}=gamma:cv=2") from None
    return tuple(classes)


class _Adapter(NamedTuple):
    name: str
    n: int
    law: Arrivals
    class_: str | None  # that was asked for

    @property
    def is_held(self) -> bool:
        """Whether it must have its class. n requests have a CV of at most √(n - 2), whoever asks."""
        reach = math.sqrt(self.n - 2) if self.n >= MIN_ARRIVALS else 0.0
        return self.class_ in CLASSES and reach > (NORMAL_MAX if self.class_ == "Bursty" else 0.0)


def generate(workload: Workload) -> list[TraceRequest]:
    """The same workload, seed and files make the same trace, byte for byte, in any process.

    Every adapter has a stream of random numbers of its own: another number of adapters leaves those of the first ones
    alone. Raises WorkloadError when the workload is not a possible one, or an adapter came out other than asked for.
    """
    workload = _valid(workload)
    count_seed, length_seed, *seeds = np.random.SeedSequence(workload.seed).spawn(2 + workload.adapters)
    adapters = _adapters(workload, np.random.default_rng(count_seed))
    course = workload.diurnal.course(workload.duration_s)
    times = [_times(adapter, seed, course) for adapter, seed in zip(adapters, seeds, strict=True)]
    classes = [_class(adapter, each) for adapter, each in zip(adapters, times, strict=True)]
    merged = heapq.merge(*(zip(each.tolist(), itertools.repeat(i)) for i, each in enumerate(times)))
    lengths = workload.lengths.sample(np.random.default_rng(length_seed), sum(adapter.n for adapter in adapters))
    requests = [
        TraceRequest(
            timestamp=at_ms,
            input_length=input_length,
            output_length=output_length,
            model=adapters[i].name,
            class_=classes[i],
        )
        for (at_ms, i), (input_length, output_length) in zip(merged, lengths.tolist(), strict=True)
    ]
    _check(requests, adapters, course)
    return requests


def _valid(workload: Workload) -> Workload:
    """Also what was put together in Python, where no type is checked, obeys the limits of the fields."""
    try:
        return msgspec.convert(msgspec.to_builtins(workload), Workload)
    except msgspec.ValidationError as error:
        raise WorkloadError(f"bad workload: {error}") from error


def _adapters(workload: Workload, rng: np.random.Generator) -> list[_Adapter]:
    total = round(workload.rate_rps * workload.duration_s)
    if total < 1:
        raise WorkloadError(
            f"{workload.rate_rps:g} requests per second make none in {workload.duration_s:g} s; ask for more of either"
        )
    numbers = counts(workload.popularity.shares(workload.adapters), total, rng).tolist()
    names = [workload.name.format(i) for i in range(workload.adapters)]
    if not workload.classes:
        law = workload.arrivals or Poisson()
        return [_Adapter(name, n, law, None) for name, n in zip(names, numbers, strict=True)]
    dealt = _dealt([each.weight for each in workload.classes], workload.adapters)
    return [
        _Adapter(name, n, workload.classes[i].law, workload.classes[i].name)
        for name, n, i in zip(names, numbers, dealt, strict=True)
    ]


def _dealt(weights: Sequence[float], n: int) -> list[int]:
    """In turns: who is furthest behind its share is next. Exact, as three floats of a third are not one."""
    shares = [Fraction(weight) for weight in weights]
    credit = [Fraction(0)] * len(shares)
    dealt = []
    for _ in range(n):
        credit = [each + share for each, share in zip(credit, shares, strict=True)]
        chosen = max(range(len(credit)), key=credit.__getitem__)  # the first of equals
        credit[chosen] -= sum(shares)
        dealt.append(chosen)
    return dealt


def _times(adapter: _Adapter, seed: np.random.SeedSequence, course: Course) -> Times:
    """In ms of the trace, as they are written."""
    rng = np.random.default_rng(seed)
    span_s = float(course.clock_s[-1])
    seen = []
    for _ in range(DRAWS):
        times = np.round(1000 * course.to_clock(adapter.law.times(rng, adapter.n, span_s)), 3)
        found = cv(times)
        if found is None or not adapter.is_held or class_of(found) == adapter.class_:
            return times
        seen.append(found)
    raise WorkloadError(
        f"{adapter.name} was to be {adapter.class_}, but in {DRAWS} draws of its {adapter.n} requests from"
        f" {adapter.law} the CV was {min(seen):.2f} to {max(seen):.2f}; ask for arrivals of another CV, or give it more"
        " requests: a longer duration, a higher rate, fewer adapters, a flatter popularity"
    )


def _class(adapter: _Adapter, times_ms: Times) -> str | None:
    """Words of the person's own stay; the three classes are said only of whom they are true."""
    if adapter.class_ is not None and adapter.class_ not in CLASSES:
        return adapter.class_
    found = cv(times_ms)
    return None if found is None else class_of(found)


def _check(requests: Sequence[TraceRequest], adapters: Sequence[_Adapter], course: Course) -> None:
    """From the rows alone: every adapter has its class, and the CV of its law as nearly as its number of requests lets
    one tell. Laws hold in the steady time, so the course of the day is taken out for them.
    """
    span_s = float(course.clock_s[-1])
    times: dict[str, list[float]] = defaultdict(list)
    for request in requests:
        times[request.model].append(request.timestamp)
    for adapter in adapters:
        found = cv(times[adapter.name])
        if found is None:
            continue
        if adapter.is_held and class_of(found) != adapter.class_:
            raise WorkloadError(f"{adapter.name} was to be {adapter.class_} but its CV came out as {found:.2f}")
        if adapter.law.parts(adapter.n, span_s) < MIN_ARRIVALS:
            continue
        steady = cv(course.to_steady(np.array(times[adapter.name]) / 1000))
        law = adapter.law.moments(adapter.n / span_s)
        factor = math.exp(min(MAX_ERRORS * law.cv_error(adapter.n - 1), 100.0))
        if steady is None or not law.cv / factor - MIN_TOLERANCE <= steady <= law.cv * factor + MIN_TOLERANCE:
            raise WorkloadError(
                f"{adapter.name} was to have a CV of {law.cv:.2f} by {adapter.law}, and has {steady} in its"
                f" {adapter.n} requests; with so many it may be off by a factor of {factor:.2f}"
            )
