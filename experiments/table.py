"""What an experiment found, as a table for people and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from experiments.pictures import write_pictures
from serverlesslora_loadgen.result import Distribution, Environment, Estimate
from serverlesslora_loadgen.run import Finished
from serverlesslora_loadgen.units import show_seconds

OURS, BASELINE = "ours", "process"
MEASURED = "lifetimes"  # the cost that was measured from outside


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times are seconds; money is in the currency of the (illustrative) prices."""

    trace: str
    system: str
    valid: bool
    requests: int
    answered: int
    shed: int
    failed: int
    cold: int  # answers that met something cold
    good: Estimate  # share of all that was sent
    ttft_mean_s: Estimate | None  # of what was answered, as the others
    ttft_p50_s: Estimate | None
    ttft_p99_s: Estimate | None
    gb_seconds: float | None
    device_seconds: float | None
    cost: float | None
    cpu_s: float  # of all processes of the server, starts included
    took_s: float  # with the start of the server


class Table(msgspec.Struct, frozen=True, kw_only=True):
    date: str
    model: str
    traces: dict[str, str]
    functions: int  # of each trace, chosen whole
    seconds: float
    speedup: float
    length_scale: float
    memory_mb: int
    good_ttft_s: float
    deadline_s: float
    took_s: float
    environment: Environment
    rows: list[Row]


def row_of(trace: str, system: str, done: Finished, *, cpu_s: float, took_s: float) -> Row:
    whole = done.result.whole
    counts = whole.counts
    ttft: Distribution | None = whole.latency.get("ttft")
    cold = sum(group.counts.ok for group in whole.groups.get("cold", []) if group.key not in ("warm", "unknown"))
    money = done.result.money
    cost = next((each for each in money.measured if each.name == MEASURED), None) if money is not None else None
    return Row(
        trace=trace,
        system=system,
        valid=done.result.verdict.valid,
        requests=counts.sent,
        answered=counts.ok,
        shed=counts.shed,
        failed=counts.failed,
        cold=cold,
        good=whole.attainment,
        ttft_mean_s=None if ttft is None else ttft.mean,
        ttft_p50_s=None if ttft is None else ttft.percentiles["p50"],
        ttft_p99_s=None if ttft is None else ttft.percentiles["p99"],
        gb_seconds=None if cost is None else cost.gb_seconds,
        device_seconds=None if cost is None else cost.device_seconds,
        cost=None if cost is None else cost.total,
        cpu_s=cpu_s,
        took_s=took_s,
    )


def shown(row: Row) -> str:
    """One line for whoever watches."""
    mean = None if row.ttft_mean_s is None else row.ttft_mean_s.value
    return (
        f"{row.trace:12} {row.system:16} {row.answered}/{row.requests} answered, "
        f"{100 * row.good.value:5.1f} % good, first token {show_seconds(mean)} (mean), "
        f"{row.gb_seconds or 0:.0f} GB·s, {row.device_seconds or 0:.1f} device-s, "
        f"{row.cpu_s:.0f} CPU-s, {row.took_s:.0f} s"
        f"{'' if row.valid else ', INVALID'}"
    )


def publish(table: Table, folder: Path) -> None:
    """`paper-MODEL.json`, `.md` and `.svg` pictures, where a browser can draw them."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"paper-{table.model}"
    (folder / f"{stem}.json").write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    pictures = write_pictures(table, folder, stem)
    (folder / f"{stem}.md").write_text(markdown(table, pictures), "utf-8")


def below(rows: Sequence[Row], ours: str = OURS, theirs: str = BASELINE) -> dict[str, float]:
    """By how much ours is below theirs, in percent; only of what both have."""
    by_system = {row.system: row for row in rows}
    if ours not in by_system or theirs not in by_system:
        return {}
    a, b = by_system[ours], by_system[theirs]
    found = {}
    if a.ttft_mean_s is not None and b.ttft_mean_s is not None:
        found["mean TTFT"] = 100 * (1 - a.ttft_mean_s.value / b.ttft_mean_s.value)
    for name, mine, other in (
        ("GB·s", a.gb_seconds, b.gb_seconds),
        ("device-s", a.device_seconds, b.device_seconds),
        ("CPU-s", a.cpu_s, b.cpu_s),
        ("cost", a.cost, b.cost),
    ):
        if mine is not None and other:
            found[name] = 100 * (1 - mine / other)
    if a.cost is not None and b.cost is not None and a.answered and b.answered:
        found["cost per answer"] = 100 * (1 - a.cost / a.answered / (b.cost / b.answered))
    return found


def markdown(table: Table, pictures: Sequence[str]) -> str:
    lines = [
        f"# Everything on, each part off, one process per function: {table.model} model",
        "",
        f"{table.date}, {table.environment.cores} cores of {table.environment.cpu}, "
        f"{table.environment.memory_bytes / 1e9:.0f} GB. Each run: {table.seconds:g} s of requests to at most "
        f"{table.functions} functions of the trace, each a domain of its own; time compressed by {table.speedup:g}, "
        f"lengths times {table.length_scale:g}, at most {table.memory_mb / 1000:g} GB. A request is good when its "
        f"first token comes within {table.good_ttft_s:g} s of when it was meant to leave; the server refuses what it "
        f"cannot begin within {table.deadline_s:g} s. Latencies are of what was answered, `good` is of all that was "
        f"sent. Prices are illustrative. `python experiments/paper.py --model {table.model}`: "
        f"{table.took_s / 60:.0f} minutes.",
        "",
        "`device-s` is what requests were computed in and what `cost` is paid by, besides GB·s; `CPU-s` is what all "
        "processes of the server used, with the starts that nobody pays for by that formula. Who lets requests wait "
        "computes them in larger batches, which takes fewer device seconds.",
        "",
    ]
    for picture in pictures:
        lines += [f"![{picture}]({picture})", ""]
    for trace, source in table.traces.items():
        rows = [row for row in table.rows if row.trace == trace]
        lines += [f"## {trace.capitalize()} ({source}, {rows[0].requests} requests)", "", *_rows(rows), ""]
        reductions = ", ".join(f"{name} {-value:+.1f} %" for name, value in below(rows).items())
        if reductions:
            lines += [f"Ours against one process per function: {reductions}.", ""]
    return "\n".join(lines)


def _rows(rows: Sequence[Row]) -> list[str]:
    head = [
        "system",
        "good",
        "first token mean",
        "p50",
        "p99",
        "cold",
        "shed",
        "failed",
        "GB·s",
        "device-s",
        "cost",
        "CPU-s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row.system + ("" if row.valid else " (INVALID)"),
            f"{100 * row.good.value:.1f} %",
            *(_time(each) for each in (row.ttft_mean_s, row.ttft_p50_s, row.ttft_p99_s)),
            *(str(each) for each in (row.cold, row.shed, row.failed)),
            *("–" if each is None else f"{each:.3g}" for each in (row.gb_seconds, row.device_seconds)),
            "–" if row.cost is None else f"{1000 * row.cost:.3g} m",
            f"{row.cpu_s:.3g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _time(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return show_seconds(estimate.value)
    return f"{show_seconds(estimate.value)} ({show_seconds(estimate.low)}–{show_seconds(estimate.high)})"
