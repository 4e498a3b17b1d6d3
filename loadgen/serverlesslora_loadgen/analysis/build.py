"""A run becomes a result: everything that is said of it, and the verdict.

A run is valid when the client kept its schedule. It is passed when it is valid, every answer was correct, most requests
were answered, and every objective was met: those that were asked, and `errors=0` and `shed=5%` where nothing was said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from msgspec.structs import replace

from serverlesslora_loadgen.analysis import calibrated, client, objectives, statistics
from serverlesslora_loadgen.analysis.columns import Bools, Columns, columns
from serverlesslora_loadgen.analysis.groups import section
from serverlesslora_loadgen.analysis.objectives import ObjectiveText
from serverlesslora_loadgen.analysis.timeline import heat, timeline
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import (
    Client,
    KneePoint,
    Limits,
    Mode,
    Money,
    Result,
    Section,
    Setup,
    SlowRequest,
    Verdict,
)
from serverlesslora_loadgen.trace import TraceRequest
from serverlesslora_loadgen.units import show_seconds

if TYPE_CHECKING:
    from serverlesslora_loadgen.observe import Sample

SLOWEST = 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that is known when the last request has ended."""

    title: str
    mode: Mode
    setup: Setup
    requests: Sequence[TraceRequest]  # as they were replayed; a record's id is its place among them
    records: Sequence[Record]
    seconds: float  # from the start to the end of the last request
    processes: int
    cpu_s: float  # of all client processes
    late_sockets: int = 0
    samples: Sequence[Sample] = ()
    limits: Limits | None = None  # None: those of the setup
    objectives: Sequence[ObjectiveText] = ()
    warmup_s: float | None = None  # None: until each adapter has had one request
    money: Money | None = None
    knee: Sequence[KneePoint] = ()


class Window(NamedTuple):
    """What is left without warm-up and drain."""

    mask: Bools
    seconds: float
    until_s: float  # the last request was due: what ended later was drained
    rule: str


def make_result(run: Run) -> Result:
    """Raises ObjectiveError, or ResultError when records and requests do not belong together."""
    asked = [objectives.parse_objective(text) for text in run.objectives]
    records = complete(run.requests, run.records)
    setup = run.setup if run.limits is None else replace(run.setup, limits=run.limits)
    deadlines = sum(record.deadline_s is not None for record in records)
    has_limits = objectives.has_meaning(setup.limits, deadlines=bool(deadlines))
    all_of_it = columns(records, setup.limits)
    # A goodput over less time than the answers took would be too high.
    seconds = max([run.seconds, *(record.done_s for record in records if record.done_s is not None)])
    whole = section(all_of_it, seconds=seconds)
    window = steady_window(all_of_it, run.warmup_s)
    self_check = client.client(
        all_of_it.table,
        seconds=seconds,
        processes=run.processes,
        cpu_s=run.cpu_s,
        late_sockets=run.late_sockets,
    )
    when = timeline(all_of_it, seconds, run.samples)
    notes = [
        *setup.trace.notes,
        *_goodness(deadlines, has_limits),
        *calibrated.doubts(
            setup.calibration,
            setup.environment,
            processes=run.processes,
            busiest_rps=max(when.sent, default=0) / when.step_s,
            most_streams=max(when.in_flight, default=0),
        ),
    ]
    setup = replace(setup, trace=replace(setup.trace, notes=notes))
    return Result(
        title=_title(run.title, run.mode),
        mode=run.mode,
        setup=setup,
        verdict=verdict(all_of_it, whole, self_check, asked, verified=setup.verified, has_limits=has_limits),
        whole=whole,
        steady=_steady(all_of_it, window),
        warmup_rule=window.rule,
        timeline=when,
        heat=heat(all_of_it),
        cdf=cdf(all_of_it),
        client=self_check,
        slowest=slowest(records, all_of_it),
        money=run.money,
        knee=list(run.knee),
    )


def _goodness(deadlines: int, has_limits: bool) -> list[str]:
    """What good means, where the limits do not say all of it."""
    if deadlines:
        return [f"{deadlines:,} requests have a deadline of their own for the first token, and are good only within it"]
    return [] if has_limits else ["no limits were set: whatever was answered counts as good"]


def complete(requests: Sequence[TraceRequest], records: Sequence[Record]) -> list[Record]:
    """A record for every request, by id. One without a record counts as not sent: nothing may get lost on the way."""
    found: dict[int, Record] = {}
    for record in records:
        if record.id in found:
            raise ResultError(f"there are two records of request {record.id}; a run has one of each")
        if not 0 <= record.id < len(requests):
            raise ResultError(f"there is a record of request {record.id}, and the trace has {len(requests)} requests")
        found[record.id] = record
    return [
        found.get(number)
        or Record(
            id=number,
            model=request.model,
            class_=request.class_,
            intended_s=request.timestamp / 1000,
            outcome="unsent",
            detail="nothing was heard of it",
        )
        for number, request in enumerate(requests)
    ]


def verdict(
    all_of_it: Columns,
    whole: Section,
    self_check: Client,
    asked: Sequence[objectives.Asked],
    *,
    verified: bool,
    has_limits: bool = True,
) -> Verdict:
    median = whole.latency["ttft"].percentiles.get("p50")
    invalid = client.flaws(all_of_it.table, self_check, None if median is None else median.value)
    judged = objectives.judge(asked, all_of_it, verified=verified, has_limits=has_limits)
    missed = [*objectives.flaws(all_of_it), *(each.reason for each in judged if not each.objective.met)]
    return Verdict(
        valid=not invalid,
        passed=not invalid and not missed,
        reasons=[*invalid, *missed],
        objectives=[each.objective for each in judged],
    )


def steady_window(all_of_it: Columns, warmup_s: float | None) -> Window:
    table = all_of_it.table
    # What never left keeps the time it had in the trace, an hour after the end of a run that was interrupted.
    left = ~table.unsent
    if not left.any():
        return Window(np.zeros(len(table), dtype=np.bool_), 0.0, 0.0, "nothing was sent")
    end_s = float(table.intended[left].max())
    if warmup_s is None:
        first = np.full(len(all_of_it.models), np.inf)
        np.minimum.at(first, table.model[left], table.intended[left])
        begin_s = float(first[np.isfinite(first)].max())
        mask = table.intended > begin_s
        rule = f"until each adapter has had one request ({show_seconds(begin_s)}"
    else:
        begin_s = warmup_s
        mask = table.intended >= begin_s
        rule = f"the first {show_seconds(warmup_s)} (chosen"
    if not (mask & left).any():
        mask = np.zeros(len(table), dtype=np.bool_)
    cut = len(table) - int(mask.sum())
    rule += f", {cut:,} request{'' if cut == 1 else 's'}); goodput also without what ended after the last was due"
    return Window(mask, max(0.0, end_s - begin_s), end_s, rule)


def _steady(all_of_it: Columns, window: Window) -> Section | None:
    if not window.mask.any():
        return None
    return section(all_of_it.where(window.mask), seconds=window.seconds, until_s=window.until_s)


def cdf(all_of_it: Columns) -> dict[str, dict[str, list[float]]]:
    """Of answered requests; a curve for each kind of cold start where there is more than one, and for all."""
    table = all_of_it.table
    kinds = {kind: mask for code, kind in enumerate(all_of_it.colds) if (mask := (table.cold == code) & table.ok).any()}
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("ttft", "e2e"):
        values = getattr(table, name)
        found[name] = {"all": statistics.curve(values)}
        if len(kinds) > 1:
            found[name] |= {kind: statistics.curve(values[mask]) for kind, mask in kinds.items()}
    found["gap"] = {"all": statistics.curve(all_of_it.gaps)}
    return {name: {key: values for key, values in each.items() if values} for name, each in found.items()}


def slowest(records: Sequence[Record], all_of_it: Columns) -> list[SlowRequest]:
    """By time to first token; what failed without an answer waited until it ended. What was shed did not wait."""
    table = all_of_it.table
    waited = np.where(table.failed, table.done - table.intended, table.ttft)
    order = np.argsort(np.where(np.isnan(waited), np.inf, -waited), kind="stable")
    return [_slow(records[at]) for at in order[:SLOWEST].tolist() if not np.isnan(waited[at])]


def _slow(record: Record) -> SlowRequest:
    return SlowRequest(
        id=record.id,
        model=record.model,
        request_id=record.request_id,
        cold=record.cold,
        cold_ms=record.cold_ms,
        stamps={
            "intended": record.intended_s,
            "written": record.written_s,
            "first_byte": record.first_byte_s,
            "first_token": record.first_token_s,
            "last_token": record.last_token_s,
            "done": record.done_s,
        },
        ttft_s=record.ttft_s if record.outcome == "ok" else None,
        e2e_s=record.e2e_s if record.outcome == "ok" else None,
        output_tokens=record.output_tokens,
    )


def _title(title: str, mode: Mode) -> str:
    """A closed loop says so wherever its numbers are shown."""
    return f"{title} (closed loop)" if mode == "closed" and "closed loop" not in title.lower() else title
