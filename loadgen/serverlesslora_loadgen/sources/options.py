"""What to take of a published trace, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from serverlesslora_loadgen.classes import CLASSES
from serverlesslora_loadgen.errors import TraceError, WorkloadError
from serverlesslora_loadgen.generate.lengths import Lengths
from serverlesslora_loadgen.trace import TraceRequest

MOST_REQUESTS = 5_000_000  # of one trace: about a gigabyte as requests

Progress = Callable[[float], None]  # told the part of the file that has been read, 0 … 1


class Imported(NamedTuple):
    requests: list[TraceRequest]
    notes: list[str]  # what was assumed and what was left out: belongs into every report made of them


class ImportOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`functions` and all below, down to `trigger`, choose adapters, and are for sources whose rows are functions
    or clients. No request of a chosen one is ever left out: thinning would turn its bursts into a Poisson process."""

    seed: int = 0
    start_s: float = 0.0  # of the source's own time; the trace that comes out begins at 0
    duration_s: float | None = None  # None: to the end of the source
    model: str = ""  # where the source names no model
    jitter_ms: float | None = None  # times are spread over this; None: over the steps of a clock that has coarse ones
    lengths: Lengths | None = None  # where the source has none
    functions: int | None = None  # how many become adapters; None: all there are
    classes: tuple[str, ...] = ()  # that they are taken from, equally many of each
    popularity_cap: int | None = None  # requests in the time that is taken; a function with more is not chosen
    rate_rps: float | None = None  # of all adapters together: met by leaving out as many of the busiest as it takes
    trigger: str | None = None  # only functions that are invoked by this, such as http

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise WorkloadError(f"a seed of {self.seed} cannot be used; give 0 or more")
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise WorkloadError(f"a trace cannot start at {self.start_s:g} s; give 0 or more")
        if self.duration_s is not None and not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise WorkloadError(f"a trace cannot last {self.duration_s:g} s; give more than 0")
        if self.jitter_ms is not None and not (math.isfinite(self.jitter_ms) and self.jitter_ms >= 0):
            raise WorkloadError(f"times cannot be spread over {self.jitter_ms:g} ms; give 0 or more")
        if self.rate_rps is not None and not (math.isfinite(self.rate_rps) and self.rate_rps > 0):
            raise WorkloadError(f"{self.rate_rps:g} requests per second cannot be met; give more than 0")
        for name, count in (("functions", self.functions), ("popularity_cap", self.popularity_cap)):
            if count is not None and count < 1:
                raise WorkloadError(f"{name} is {count}; give 1 or more")
        for name in self.classes:
            if name not in CLASSES:
                raise WorkloadError(f"{name!r} is no class of adapters; there are {', '.join(CLASSES)}")
        if len(set(self.classes)) < len(self.classes):
            raise WorkloadError(f"a class is asked for twice: {', '.join(self.classes)}")
        if self.functions is not None and self.functions < len(self.classes):
            raise WorkloadError(
                f"{self.functions} functions cannot be of {len(self.classes)} classes; take more functions"
            )

    @property
    def end_s(self) -> float:
        """Of the source's time; infinite when it is taken to its end."""
        return math.inf if self.duration_s is None else self.start_s + self.duration_s


def require_lengths(options: ImportOptions, what: str) -> Lengths:
    """Raises WorkloadError when none are given: made up ones would decide the result unnoticed."""
    if options.lengths is None:
        raise WorkloadError(
            f"{what} says nothing of the lengths of prompts and answers; name a law to draw them from, such as"
            " empirical:FILE of a trace that has them"
        )
    return options.lengths


def in_order(requests: list[TraceRequest], options: ImportOptions, source: str) -> list[TraceRequest]:
    """By time; equal times stay as they were. Raises TraceError when there is none, or more than can be held."""
    if not requests:
        end = "its end" if options.duration_s is None else f"{options.end_s:g} s"
        raise TraceError(f"{source} has no request from {options.start_s:g} s to {end}; take another part of it")
    guard_size(len(requests), source)
    return sorted(requests, key=lambda request: request.timestamp)


def guard_size(requests: int, source: str) -> None:
    """Raises TraceError for more than MOST_REQUESTS."""
    if requests > MOST_REQUESTS:
        raise TraceError(
            f"{source} has more than {MOST_REQUESTS:,} requests in what is asked for; take a shorter part of it, or"
            " fewer and less popular functions where it has some"
        )


def to_ms(at_s: float) -> float:
    """To whole microseconds, which is what a trace file keeps: what is computed here holds for the file as well."""
    return round(1e3 * at_s, 3)
