"""`summary.md`: what fits into the description of a change, with the same first line as the report.

Names stand in code spans, where Markdown has no power over them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from serverlesslora_loadgen.analysis import calibrated
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.report import words
from serverlesslora_loadgen.report.words import Cell, Fragment, cell, percent, percentile, price
from serverlesslora_loadgen.result import Group, Result
from serverlesslora_loadgen.units import show_seconds


def write_summary(result: Result, path: Path) -> None:
    """Raises LoadgenError when the file cannot be written."""
    try:
        path.write_text(summary(result), encoding="utf-8")
    except OSError as error:
        raise LoadgenError(f"cannot write the summary {path}: {error}") from error


def summary(result: Result) -> str:
    # A trace may have deadlines of its own, so without limits good is not only answered.
    met = words.good(result)
    loud = [f"> **{word}** {text(why)}\n" for word, why in words.warnings(result)]
    parts = [
        "".join(_fragment(fragment) for fragment in words.sentence(result)).strip() + "\n",
        *loud,
        *_objectives(result),
        *_latencies(result),
        *_groups("cold start", words.cold_groups(result), met),
        *_groups("class", result.whole.groups.get("class", []), met),
        *_money(result),
        *_client(result),
        *_again(result),
    ]
    return "\n".join(parts)


def code(name: str, limit: int = 60) -> str:
    """A code span that the name cannot leave: its fence is longer than any run of backticks inside."""
    shown = words.short(words.visible(name), limit).replace("|", "\\|")  # a cell of a table would end there
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def text(said: str) -> str:
    """Text that Markdown leaves as it is. A word joiner keeps forges from linking people, issues and addresses."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|~&$])", r"\\\1", words.visible(said))
    return re.sub(r"([@#]|:(?=//)|www(?=\.))", "\\1\u2060", escaped)


def _fragment(fragment: Fragment) -> str:
    shown = text(fragment.text)
    inner = shown.strip()
    return shown.replace(inner, f"**{inner}**") if fragment.strong and inner else shown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(of: Cell) -> str:
    return f"{of.value} ({of.between})" if of.n else of.value


def _objectives(result: Result) -> list[str]:
    rows = [
        (code(each.text), text(words.found(each)), "met" if each.met else "**missed**")
        for each in result.verdict.objectives
    ]
    return [_table(("asked", "found", ""), rows)] if rows else []


def _latencies(result: Result) -> list[str]:
    shares = ("p50", "p90", "p99")
    rows = [
        (words.LATENCIES[name], f"{found.n:,}", *(_cell(cell(found.percentiles.get(share))) for share in shares))
        for name in ("ttft", "tpot", "itl", "e2e")
        if (found := result.whole.latency.get(name)) is not None and found.n
    ]
    return [_table(("from the intended time", "n", *shares), rows)] if rows else []


def _groups(title: str, groups: Sequence[Group], met: str) -> list[str]:
    """`met`: what the share of good requests is called."""
    rows = [
        (
            code(group.key),
            f"{group.counts.sent:,}",
            _cell(cell(group.attainment, percent)),
            *(_cell(cell(percentile(group, "ttft", share))) for share in ("p50", "p99")),
        )
        for group in groups
    ]
    return [_table((title, "sent", met, "TTFT p50", "TTFT p99"), rows)] if rows else []


def _money(result: Result) -> list[str]:
    money = result.money
    if money is None or not (money.measured or money.baselines):
        return []
    rows = [
        (
            code(cost.name),
            *(
                text(price(amount, money.currency))
                for amount in (cost.total, cost.per_1k_requests, cost.per_good_request)
            ),
            words.MISSING if cost.idle_share is None else percent(cost.idle_share),
            words.MISSING if cost.effectiveness is None else words.number(cost.effectiveness),
        )
        for cost in (*money.measured, *money.baselines)
    ]
    head = ("cost", "total", "per 1k requests", "per good request", "idle", "1 / (E2E × cost)")
    idle = (
        "Idle: of what was measured, memory while no request of any adapter was in flight; of a baseline, instances "
        "without one of their own adapter.\n"
    )
    return [_table(head, rows), *([idle] if money.measured and money.baselines else [])]


def _client(result: Result) -> list[str]:
    lag = result.client.lag
    shares = ("p50", "p99", "max")
    late = (
        "nothing was sent"
        if lag is None
        else f"lag {', '.join(f'{share} {_cell(cell(lag.percentiles.get(share)))}' for share in shares)}, n = {lag.n:,}"
    )
    known = result.setup.calibration
    added = "not calibrated"
    if known is not None:
        added = f"adds {show_seconds(known.added_ttft_p50_s)} to TTFT p50"
        if other := calibrated.differences(known, result.setup.environment, result.client.processes):
            added += f", if the calibration is of this client ({text('; '.join(other))})"
    return [f"Client: {late}; {percent(min(1.0, result.client.cpu_share))} of a core; {added}.\n"]


def _again(result: Result) -> list[str]:
    """A fence that the command cannot close, and where it ran."""
    command = words.visible(shlex.join(result.setup.command))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    machine, trace = result.setup.environment, result.setup.trace
    where = (
        f"{text(machine.cpu)}, {machine.cores} cores, {words.size(machine.memory_bytes)}, Linux {text(machine.kernel)}"
    )
    return [f"{fence}sh\n{command}\n{fence}\n", f"{where}. Trace {code(trace.name)} {code(trace.sha256[:12])}.\n"]
