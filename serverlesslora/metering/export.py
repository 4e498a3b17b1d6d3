"""Usage with its money, as people take it away: JSON as it is, CSV for spreadsheets.

A spreadsheet runs cells that begin with = + - @ (or a tab or carriage return before those) as formulas. Names of
tenants and functions come from users, so such text gets an apostrophe in front; numbers stay numbers.
"""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from serverlesslora.metering.prices import Money, Prices
from serverlesslora.metering.usage import NUMBERS, By, RequestPage, RequestUsage, UsageRow, add_up


class PriceNote(msgspec.Struct, frozen=True):
    """What the money of a report is worth."""

    currency: str
    date: datetime.date
    source: str
    illustrative: bool


class PricedRow(msgspec.Struct, frozen=True):
    usage: UsageRow
    money: Money


class PricedRequest(msgspec.Struct, frozen=True):
    usage: RequestUsage
    money: Money


class UsageReport(msgspec.Struct, frozen=True):
    """The rows that cost most first. `total` is of all rows, also of those beyond a limit (`has_more`)."""

    by: By
    since: float | None
    until: float | None
    prices: PriceNote
    rows: tuple[PricedRow, ...]
    total: PricedRow
    has_more: bool = False
    problem: str | None = None  # why the newest usage may be missing


class RequestReport(msgspec.Struct, frozen=True):
    """Requests, the newest first; `next` is the `after` of the next page."""

    since: float | None
    until: float | None
    prices: PriceNote
    rows: tuple[PricedRequest, ...]
    by: Literal["request"] = "request"
    next: str | None = None
    problem: str | None = None


def report_usage(
    rows: Sequence[UsageRow],
    prices: Prices,
    *,
    by: By,
    since: float | None = None,
    until: float | None = None,
    limit: int | None = None,
    problem: str | None = None,
) -> UsageReport:
    priced = [PricedRow(row, prices.row_money(row)) for row in rows]
    priced.sort(key=lambda row: (-row.money.paid, -row.usage.requests, row.usage.key or ""))
    everything = add_up(rows)
    return UsageReport(
        by=by,
        since=since,
        until=until,
        prices=_note(prices),
        rows=tuple(priced[:limit]),
        total=PricedRow(everything, prices.row_money(everything)),
        has_more=limit is not None and len(priced) > limit,
        problem=problem,
    )


def report_requests(
    page: RequestPage,
    prices: Prices,
    *,
    since: float | None = None,
    until: float | None = None,
    problem: str | None = None,
) -> RequestReport:
    rows = tuple(PricedRequest(usage, prices.request_money(usage)) for usage in page.requests)
    return RequestReport(since, until, _note(prices), rows, next=page.next, problem=problem)


def _note(prices: Prices) -> PriceNote:
    return PriceNote(prices.currency, prices.date, prices.source, prices.illustrative)


_MONEY = ("paid_device", "paid_holding", "paid", "charged", "currency", "prices_of", "illustrative_prices")
FORMULA_SIGNS = frozenset("=+-@＝＋－＠")  # some read the wide forms as well
_TIERS = ("host", "device")
REQUEST_COLUMNS = (*RequestUsage.__struct_fields__, *_MONEY)


def to_csv(report: UsageReport | RequestReport, *, header: bool = True) -> str:
    """One line per row; without a header the lines continue another page."""
    note = report.prices
    if isinstance(report, UsageReport):
        columns = (report.by, "idle", *NUMBERS, *(f"{tier}_byte_s" for tier in _TIERS), "rungs", *_MONEY)
        lines = ([*_sum_cells(row.usage), *_money_cells(row.money, note)] for row in report.rows)
    else:
        columns = REQUEST_COLUMNS
        lines = ([*msgspec.structs.astuple(row.usage), *_money_cells(row.money, note)] for row in report.rows)
    file = io.StringIO()
    writer = csv.writer(file)
    if header:
        writer.writerow(columns)
    writer.writerows(map(_neutral, lines))
    return file.getvalue()


def _sum_cells(row: UsageRow) -> Iterable[Any]:
    yield from (row.key, row.idle)
    yield from (getattr(row, name) for name in NUMBERS)
    yield from (row.byte_s.get(tier, 0.0) for tier in _TIERS)
    yield " ".join(f"{rung}={count}" for rung, count in sorted(row.rungs.items()))


def _money_cells(money: Money, note: PriceNote) -> Iterable[Any]:
    yield from (money.device, money.holding, money.paid, money.charged)
    yield from (note.currency, note.date, note.illustrative)


def _neutral(cells: Iterable[Any]) -> list[Any]:
    return [neutralised(cell) if isinstance(cell, str) else cell for cell in cells]


def neutralised(text: str) -> str:
    """Text no spreadsheet takes for a formula; white space before the sign stops only some of them."""
    runs = text.lstrip()[:1] in FORMULA_SIGNS or text[:1] in ("\t", "\r")
    return f"'{text}" if runs else text
