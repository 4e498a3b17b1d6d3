"""Two runs side by side.

All requests count, also those before the end of the warm-up, and what was not answered is later than anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from serverlesslora_loadgen.analysis import calibrated, columns, differences, objectives
from serverlesslora_loadgen.analysis.differences import Difference, Pair, Verdict
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Result
from serverlesslora_loadgen.units import show_seconds

if TYPE_CHECKING:
    from rich.console import Console

LATENCIES = ("ttft", "tpot", "e2e")
ALL: tuple[Verdict, ...] = ("A faster", "B faster", "A better", "B better", "no difference", "n too small")


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    a: str  # titles
    b: str
    paired: bool  # the same requests at the same times
    differences: list[Difference]
    warnings: list[str]  # what else differs, or keeps a verdict from being given
    how: str


def compare(a: Result, b: Result, records_a: Sequence[Record], records_b: Sequence[Record]) -> Comparison:
    """Raises ResultError when they cannot be compared at all."""
    if a.mode != b.mode:
        raise ResultError(
            f"A is {_loop(a)} and B is {_loop(b)}: their latencies do not mean the same; repeat one like the other"
        )
    tables = [_table("A", a, records_a), _table("B", b, records_b)]
    same_trace = bool(a.setup.trace.sha256) and a.setup.trace.sha256 == b.setup.trace.sha256
    paired = same_trace and np.array_equal(tables[0].id, tables[1].id)
    unlike = _unlike(a, b)
    warnings = [*_invalid(a, b), *unlike, *_incorrect(a, b), *_setups(a, b, paired)]
    withheld = ALL if unlike else _withheld(a, b)
    found: list[Difference] = []
    for latency in LATENCIES:
        values = Pair(*(table.or_never(latency) for table in tables))
        least_s = 0.0 if latency == "tpot" else _least_s(a, b)
        found += differences.times(latency, values, paired=paired, least_s=least_s, withheld=withheld)
    shares = {"answered": Pair(*(table.ok.astype(np.float64) for table in tables))}
    deadlines = any(record.deadline_s is not None for record in (*records_a, *records_b))
    if a.setup.limits == b.setup.limits and objectives.has_meaning(a.setup.limits, deadlines=deadlines):
        shares["attainment"] = Pair(*(table.good.astype(np.float64) for table in tables))
    found += [differences.share(name, each, paired=paired, withheld=withheld) for name, each in shares.items()]
    return Comparison(
        a=a.title,
        b=b.title,
        paired=paired,
        differences=found,
        warnings=warnings,
        how=(
            f"{'Paired by request' if paired else 'Unpaired'}, all requests, unanswered ones later than any; 95 % "
            "intervals by resampling blocks of neighbours. One run each: what differs from run to run of one server is "
            f"not in the intervals, so less than {100 * differences.MIN_SHARE:g} % of a time counts as no difference."
        ),
    )


def write_comparison(path: Path, comparison: Comparison) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")


# --- what can be compared


def _loop(result: Result) -> str:
    return {"open": "an open loop", "closed": "a closed loop", "sweep": "a sweep"}[result.mode]


def _table(name: str, result: Result, records: Sequence[Record]) -> columns.Table:
    """In the order of time."""
    sent, ids = result.whole.counts.sent, {record.id for record in records}
    if len(records) != sent or len(ids) != sent:
        raise ResultError(
            f"{name} has a result of {sent} requests and records of {len(ids)}: give the requests.csv of the same run"
        )
    return columns.columns(sorted(records, key=lambda record: record.id), result.setup.limits).table


def _invalid(a: Result, b: Result) -> list[str]:
    return [
        f"{name} is INVALID, so there is no verdict: {'; '.join(result.verdict.reasons)}"
        for name, result in (("A", a), ("B", b))
        if not result.verdict.valid
    ]


def _incorrect(a: Result, b: Result) -> list[str]:
    said = []
    for name, result in (("A", a), ("B", b)):
        if wrong := _wrong(result):
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in wrong.items())
            said.append(f"{name} gave answers that were not correct, and is ahead in nothing: {kinds}")
        if result.whole.counts.sent and not result.setup.verified:
            said.append(f"the answers of {name} were not held against golden ones")
    return said


def _wrong(result: Result) -> dict[str, int]:
    failures = result.whole.counts.failures
    return {kind: failures[kind] for kind in objectives.INCORRECT if failures.get(kind)}


def _withheld(a: Result, b: Result) -> tuple[Verdict, ...]:
    """Verdicts that may not be given."""
    if not (a.verdict.valid and b.verdict.valid):
        return ALL
    of_a: tuple[Verdict, ...] = ("A faster", "A better") if _wrong(a) else ()
    of_b: tuple[Verdict, ...] = ("B faster", "B better") if _wrong(b) else ()
    return (*of_a, *of_b)


def _unlike(a: Result, b: Result) -> list[str]:
    """Why the two were not asked the same: differences are then of the load as much as of the servers."""
    left, right = a.setup.trace, b.setup.trace
    why = []
    if a.mode == "sweep":
        why.append("these are sweeps, and the trials that are shown may be of different rates")
    if not left.sha256 or left.sha256 != right.sha256:
        why.append("they did not replay the same requests at the same times")
    for name, one, other in (
        ("the speed of time", left.speedup, right.speedup),
        ("the scale of lengths", left.length_scale, right.length_scale),
    ):
        if one != other:
            why.append(f"{name} is {one:g} and {other:g}")
    return [f"no verdict: {'; '.join(why)}. Replay one file, shaped alike, against both"] if why else []


def _setups(a: Result, b: Result, paired: bool) -> Iterator[str]:
    """What else differs between the two, so that a difference may not be due to the server."""
    left, right = a.setup, b.setup
    if not paired and left.trace.sha256 == right.trace.sha256:
        yield "the same trace, but not the same requests of it"
    if left.limits != right.limits:
        yield "not the same limits, so attainment is not compared"
    facts_a, facts_b = _facts(a), _facts(b)
    for name in dict.fromkeys((*facts_a, *facts_b)):
        if facts_a.get(name) != facts_b.get(name):
            yield f"not the same {name}: {facts_a.get(name)} and {facts_b.get(name)}"
    for name, result in (("A", a), ("B", b)):
        known = result.setup.calibration
        if known is None:
            yield f"{name} was not calibrated: what its client adds is not known"
        elif other := calibrated.differences(known, result.setup.environment, result.client.processes):
            yield (
                f"the calibration of {name} may not be of its client ({'; '.join(other)}): what that adds is not known"
            )


def _facts(result: Result) -> dict[str, Any]:
    trace, machine = result.setup.trace, result.setup.environment
    return {
        "seed": trace.seed,
        "CPU": machine.cpu,
        "cores": machine.cores,
        "memory": machine.memory_bytes,
        "kernel": machine.kernel,
        "Python": machine.python,
        "version of this tool": machine.tool,
        "client processes": result.client.processes,
        "timers": result.setup.timers,
        **{f"target {key}": value for key, value in result.setup.target.items() if key != "url"},
    }


def _least_s(a: Result, b: Result) -> float:
    """What the clients add themselves; a smaller difference may be theirs."""
    return max(
        (each.setup.calibration.added_ttft_p50_s for each in (a, b) if each.setup.calibration is not None), default=0.0
    )


# --- for people


def print_comparison(comparison: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"A: {comparison.a}\nB: {comparison.b}"))
    table = Table("", "A", "B", "B - A", "95 %", "n", "verdict", box=None, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for each in comparison.differences:
        show = _show_share if each.metric in ("answered", "attainment") else _show_time
        n = f"{each.n_a:,}" if each.n_a == each.n_b else f"{each.n_a:,} / {each.n_b:,}"
        # Only when nearly all resamples of one side had no answer.
        far = "∞" if each.b is None else "-∞" if each.a is None else "unbounded"
        between = "n too small" if each.verdict == "n too small" else f"{show(each.low, far)} … {show(each.high, far)}"
        style = {"no difference": "dim", "n too small": "dim", "no verdict": "yellow"}.get(each.verdict, "bold")
        table.add_row(
            *(each.metric, show(each.a, "never"), show(each.b, "never"), show(each.difference, ""), between, n),
            Text(each.verdict, style=style),
        )
    console.print(table)
    for warning in comparison.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    console.print(Text(comparison.how, style="dim"))


def _show_time(value: float | None, missing: str) -> str:
    return missing if value is None else show_seconds(value)


def _show_share(value: float | None, missing: str) -> str:
    return missing if value is None else f"{100 * value:.4g} %"
