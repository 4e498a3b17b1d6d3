"""`serverlesslora usage`: what functions, tenants and requests took and cost, from a running server."""

from __future__ import annotations

import argparse
import datetime
import sys
import urllib.parse
from collections.abc import Iterator
from typing import TextIO

import msgspec
from rich.table import Table
from rich.text import Text

from serverlesslora.cli.client import add_client_flags, call, plain, plain_console
from serverlesslora.cli.serve import Subparsers
from serverlesslora.errors import ConfigError
from serverlesslora.metering.export import PricedRow, RequestReport, UsageReport, to_csv
from serverlesslora.metering.prices import GB, Money
from serverlesslora.metering.usage import BYS

PAGE = 1000  # requests of one call when all are wanted


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser("usage", help="who used what and what it cost")
    parser.add_argument("--by", choices=(*BYS, "request"), default="function", help="what to add up [function]")
    parser.add_argument("--since", metavar="TIME", help="unix seconds, ISO 8601 (UTC), or a span ago: 30m, 1h, 7d")
    parser.add_argument("--until", metavar="TIME", help="the same; not included [now]")
    parser.add_argument("--limit", type=int, metavar="N", help="rows at most; with --by request the newest [100]")
    parser.add_argument("--csv", metavar="FILE", help="write CSV there, '-' is stdout; all requests without --limit")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.csv is not None:
        _write_csv(arguments)
        return 0
    report = _ask(arguments, limit=arguments.limit)
    if arguments.json:
        print(msgspec.json.encode(report).decode())
        return 0
    console = plain_console()
    console.print(render(report))
    for line in _remarks(report):
        console.print(Text(line))
    return 0


def _ask(arguments: argparse.Namespace, *, limit: int | None, after: str | None = None) -> UsageReport | RequestReport:
    wanted = {"by": arguments.by, "since": arguments.since, "until": arguments.until, "limit": limit, "after": after}
    query = urllib.parse.urlencode({name: value for name, value in wanted.items() if value is not None})
    kind = RequestReport if arguments.by == "request" else UsageReport
    report: UsageReport | RequestReport = call(arguments, "GET", f"/admin/usage?{query}", type=kind)
    return report


def _write_csv(arguments: argparse.Namespace) -> None:
    reports = _pages(arguments) if arguments.by == "request" else iter([_ask(arguments, limit=arguments.limit)])
    first = next(reports)  # before the file is touched: without an answer an older one stays as it is
    if arguments.csv == "-":
        _write(sys.stdout, first, reports)
        return
    try:
        with open(arguments.csv, "w", encoding="utf-8", newline="") as file:
            count = _write(file, first, reports)
    except OSError as error:
        raise ConfigError(f"cannot write {arguments.csv}: {error.strerror}") from error
    print(msgspec.json.encode({"rows": count}).decode() if arguments.json else f"{count} rows in {arguments.csv}")


def _write(file: TextIO, first: UsageReport | RequestReport, others: Iterator[UsageReport | RequestReport]) -> int:
    file.write(to_csv(first))
    count = len(first.rows)
    for report in others:
        file.write(to_csv(report, header=False))
        count += len(report.rows)
    return count


def _pages(arguments: argparse.Namespace) -> Iterator[UsageReport | RequestReport]:
    left = arguments.limit
    after: str | None = None
    while True:
        report = _ask(arguments, limit=PAGE if left is None else min(PAGE, left), after=after)
        assert isinstance(report, RequestReport)
        yield report
        after = report.next
        if left is not None:
            left -= len(report.rows)
        if after is None or left == 0:
            return


def render(report: UsageReport | RequestReport) -> Table:
    return _sums(report) if isinstance(report, UsageReport) else _requests(report)


def _sums(report: UsageReport) -> Table:
    table = Table(report.by, show_footer=True)
    total = _sum_cells(report.total)
    names = (
        "requests",
        "not finished",
        "SLO missed",
        "prompt",
        "cached",
        "output",
        "device s",
        "GB·h",
        "paid",
        "charged",
    )
    for name, sum_ in zip(names, total, strict=True):
        table.add_column(name, justify="right", footer=sum_)
    table.columns[0].footer = "all"
    for row in report.rows:
        table.add_row(_name(row), *_sum_cells(row))
    return table


def _name(row: PricedRow) -> Text:
    if row.usage.idle:
        return Text("idle", style="italic")
    return Text("none", style="italic") if row.usage.key is None else plain(row.usage.key)


def _sum_cells(row: PricedRow) -> list[str]:
    u = row.usage
    counts = (u.requests, u.requests - u.finished, u.slo_missed, u.prompt_tokens, u.cached_tokens, u.completion_tokens)
    return [*map(str, counts), f"{u.device_s:.3f}", f"{sum(u.byte_s.values()) / GB / 3600:.4g}", *_money(row.money)]


def _requests(report: RequestReport) -> Table:
    table = Table("started (UTC)", "request", "function", "tenant", "status", "rung")
    for name in ("prompt", "output", "device s", "total s", "paid", "charged"):
        table.add_column(name, justify="right")
    for row in report.rows:
        u = row.usage
        started = datetime.datetime.fromtimestamp(u.started_at, datetime.UTC).strftime("%m-%d %H:%M:%S")
        texts = [plain(text) for text in (u.request_id, u.function, u.tenant or "", u.status, u.rung)]
        tokens = (str(u.prompt_tokens), str(u.completion_tokens))
        table.add_row(started, *texts, *tokens, f"{u.device_s:.3f}", f"{u.duration_s:.3f}", *_money(row.money))
    return table


def _money(money: Money) -> tuple[str, str]:
    return f"{money.paid:.4g}", "-" if money.charged is None else f"{money.charged:.4g}"


def _remarks(report: UsageReport | RequestReport) -> Iterator[str]:
    prices = report.prices
    worth = ", an ILLUSTRATION: give the server your own price file" if prices.illustrative else ""
    yield f"money in {prices.currency}, prices of {prices.date} ({prices.source}){worth}"
    if _is_cut(report):
        yield "there are more rows; raise --limit, or --csv FILE for all"
    if report.problem is not None:
        yield f"problem: {report.problem}"


def _is_cut(report: UsageReport | RequestReport) -> bool:
    return report.next is not None if isinstance(report, RequestReport) else report.has_more
