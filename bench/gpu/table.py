"""What people read: one line per failed check and per number, then one line per section."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.gpu.record import Number, SectionResult

_TAIL_LINES = 25


def print_section(console: Console, result: SectionResult) -> None:
    for check in result.checks:
        if not check.ok:
            console.print(f"  [red]failed[/] {escape(check.name)}: {escape(check.detail)}")
    if result.left_out:
        console.print(f"  [yellow]left out for want of time[/]: {escape(', '.join(result.left_out))}")
    if result.ok is False and result.tail:
        lines = result.tail.splitlines()[-_TAIL_LINES:]
        console.print(escape("\n".join(f"    | {line}" for line in lines)), style="dim")
    if result.numbers:
        table = Table(box=None, pad_edge=True, header_style="dim")
        for heading in ("number", "value", "unit", "floor", "ratio", "bar", ""):
            table.add_column(heading, justify="left" if heading in ("number", "unit", "") else "right")
        for number in result.numbers:
            table.add_row(*_row(number))
        console.print(table)


def print_summary(console: Console, results: list[SectionResult], seconds: float, path: Path) -> None:
    table = Table(title=f"{seconds:.0f} s, written to {path}")
    for heading in ("section", "correct", "checks", "bars met", "seconds"):
        table.add_column(heading, justify="left" if heading in ("section", "correct") else "right")
    for result in results:
        bars = [number.met for number in result.numbers if number.met is not None]
        passed = sum(check.ok for check in result.checks)
        table.add_row(
            result.name,
            _verdict(result),
            f"{passed}/{len(result.checks)}",
            f"{sum(bars)}/{len(bars)}" if bars else "-",
            f"{result.seconds:.0f}",
        )
    console.print(table)
    for result in results:
        for number in result.numbers:
            if number.met is False:
                bar = f"{_short(number.value)} {number.unit}, the bar is {_short(number.bar)}"
                console.print(f"[yellow]missed[/] {result.name}: {escape(number.name)}: {bar}")


def _verdict(result: SectionResult) -> str:
    if result.ok is None:
        return f"[yellow]skipped[/]: {escape(result.reason)}"
    if result.ok:
        return "[green]yes[/]"
    return "[red]no[/]" + (f": {escape(result.reason)}" if result.reason else "")


def _row(number: Number) -> tuple[str, ...]:
    verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[number.met]
    cells = (_short(number.value), number.unit, _short(number.floor), _short(number.ratio), _short(number.bar))
    return (escape(number.name), *cells, verdict)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
