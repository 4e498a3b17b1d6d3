"""Functions or clients of a source, one adapter each: chosen, merged in the order of time, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from serverlesslora_loadgen.classes import DEFINITION, adapter_facts, class_of, cv
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.lengths import Lengths
from serverlesslora_loadgen.sources.choosing import Candidate, choose
from serverlesslora_loadgen.sources.options import (
    MOST_REQUESTS,
    Imported,
    ImportOptions,
    guard_size,
    in_order,
    require_lengths,
    to_ms,
)
from serverlesslora_loadgen.trace import TraceRequest

Times = NDArray[np.float64]  # [n] seconds of the source, ascending

RATE_TOLERANCE = 0.25  # of the rate asked for: whole functions seldom add up to it exactly
LISTED = 64  # adapters, whose functions are named in the notes


class Stream(NamedTuple):
    """The requests of one function. A day has too many to keep them all, so they are made when they are looked at."""

    name: str  # how the source knows it
    least: int  # requests for sure, known without making any: more than allowed, and it is not even made
    times: Callable[[], Times]  # the same at every call


def import_streams(
    streams: Sequence[Stream], options: ImportOptions, duration_s: float, *, source: str, kind: str
) -> Imported:
    """`kind`: what a stream is, such as `function`. Raises WorkloadError when the choice cannot be met."""
    lengths = require_lengths(options, source)
    chosen = choose(_candidates(streams, options, duration_s), options, duration_s)
    total = sum(each.requests for each in chosen)
    guard_size(total, source)
    _check_rate(total / duration_s, len(chosen), options, kind)
    models = names(len(chosen))
    requests = _requests([streams[each.place] for each in chosen], models, chosen, options, lengths)
    requests = in_order(requests, options, source)
    check_classes(requests)
    notes = [
        f"{len(chosen)} of the {len(streams)} {kind}s of {source} are the adapters, one each, with every request they"
        f" had in {duration_s / 60:g} min from {options.start_s / 60:g} min: {len(requests):,} requests,"
        f" {len(requests) / duration_s:.3g} per second"
        + (f" ({options.rate_rps:g} asked for)" if options.rate_rps is not None else "")
    ]
    if len(chosen) <= LISTED:
        notes.append(f"{models[0]} and on are {', '.join(streams[each.place].name for each in chosen)}")
    notes.append(f"lengths were drawn in pairs from {_told(lengths)} (seed {options.seed})")
    if any(each.class_ for each in chosen):
        notes.append(DEFINITION)
    return Imported(requests, notes)


def names(count: int) -> list[str]:
    """`adapter-00` and on; wide enough that the order of names is that of numbers."""
    width = max(2, len(str(count - 1)))
    return [f"adapter-{number:0{width}d}" for number in range(count)]


def check_classes(requests: Sequence[TraceRequest]) -> None:
    """Takes the class of every adapter anew from what is written out. Raises WorkloadError when it is not the same."""
    claimed = {request.model: request.class_ for request in requests}
    for facts in adapter_facts(requests):
        if facts.class_ != claimed[facts.model]:
            raise WorkloadError(
                f"{facts.model} was chosen as {claimed[facts.model]}, and its {facts.n} requests came out as"
                f" {facts.class_} (CV {facts.cv}); this is a mistake of the import: do not use its trace"
            )


def _check_rate(rate_rps: float, chosen: int, options: ImportOptions, kind: str) -> None:
    """Raises WorkloadError when the nearest there is is not near."""
    if options.rate_rps is not None and abs(rate_rps / options.rate_rps - 1) > RATE_TOLERANCE:
        remedy = "fewer" if rate_rps > options.rate_rps else "more"
        raise WorkloadError(
            f"{chosen} {kind}s come to {rate_rps:.3g} requests per second at the nearest, and {options.rate_rps:g} are"
            f" asked for; take {remedy} {kind}s, another time or another rate (compress time to raise it further)"
        )


def _candidates(streams: Sequence[Stream], options: ImportOptions, duration_s: float) -> list[Candidate]:
    """All that may be chosen: with at least one request, and none that is too popular."""
    most = MOST_REQUESTS if options.popularity_cap is None else options.popularity_cap
    if options.rate_rps is not None:
        # One that is by itself more than everything asked for is never the nearest.
        most = min(most, max(1, int(options.rate_rps * duration_s)))
    candidates = []
    for place, stream in enumerate(streams):
        if stream.least <= most and 0 < len(times := _in_window(stream, options)) <= most:
            found = cv(times)
            candidates.append(Candidate(place, len(times), None if found is None else class_of(found)))
    return candidates


def _in_window(stream: Stream, options: ImportOptions) -> Times:
    """From the beginning of the time that is taken, as exactly as a trace file says it."""
    times = stream.times()
    kept = times[(times >= options.start_s) & (times < options.end_s)] - options.start_s
    rounded = np.round(kept, 6)
    # Whoever cuts the trace at the same time again has to find the same requests in it.
    return rounded if options.duration_s is None else np.minimum(rounded, options.duration_s - 1e-6)


def _requests(
    streams: Sequence[Stream],
    models: Sequence[str],
    chosen: Sequence[Candidate],
    options: ImportOptions,
    lengths: Lengths,
) -> list[TraceRequest]:
    each = [_in_window(stream, options) for stream in streams]
    times = np.concatenate(each)
    adapters = np.repeat(np.arange(len(streams)), [len(one) for one in each])
    pairs = lengths.sample(np.random.default_rng([options.seed, 1]), len(times))
    return [
        TraceRequest(to_ms(at_s), input_length, output_length, models[adapter], class_=chosen[adapter].class_)
        for at_s, adapter, (input_length, output_length) in zip(
            times.tolist(), adapters.tolist(), pairs.tolist(), strict=True
        )
    ]


def _told(lengths: Lengths) -> str:
    """As a workload file has it."""
    return msgspec.json.encode(lengths).decode()
