"""The admin API's usage: what functions, tenants, domains and single requests took and cost, as JSON or CSV."""

from __future__ import annotations

import datetime
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serverlesslora.errors import ConfigError, InvalidRequest, Unavailable
from serverlesslora.metering.export import RequestReport, UsageReport, report_requests, report_usage, to_csv
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import Prices
from serverlesslora.metering.usage import BYS, By

DEFAULT_PAGE = 100
LARGEST_PAGE = 10_000

Format = Literal["json", "csv"]
FORMATS: tuple[Format, ...] = ("json", "csv")
T = TypeVar("T", bound=str)
Grouping = By | Literal["request"]
GROUPINGS: tuple[Grouping, ...] = (*BYS, "request")

_SPANS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9}(?:\.\d+)?)([smhdw])", re.ASCII)


class Question(msgspec.Struct, frozen=True):
    """A query string, understood. Times are unix seconds."""

    by: Grouping = "function"
    format: Format = "json"
    since: float | None = None
    until: float | None = None
    limit: int | None = None
    after: str | None = None


async def nothing_to_add() -> None:
    """For a ledger that is told everything at once."""


def usage_routes(
    ledger: Ledger,
    prices: Prices,
    *,
    up_to_now: Callable[[], Awaitable[None]] = nothing_to_add,
    clock: Callable[[], float] = time.time,
) -> list[Route]:
    """`up_to_now` writes down what the ledger is otherwise told only now and then."""

    async def usage(request: Request) -> Response:
        question = parse(request.query_params, clock())
        await up_to_now()
        try:
            report = await _answer(ledger, prices, question)
        except ConfigError as error:  # the server could start with this file; it was damaged later
            raise Unavailable(error.message) from error
        if question.format == "json":
            return Response(msgspec.json.encode(report), media_type="application/json")
        headers = {"content-disposition": f'attachment; filename="usage-by-{question.by}.csv"'}
        if isinstance(report, RequestReport) and report.next is not None:
            headers["x-next-page"] = report.next
        return Response(to_csv(report), headers=headers, media_type="text/csv")

    return [Route("/admin/usage", usage, methods=["GET"])]


async def _answer(ledger: Ledger, prices: Prices, question: Question) -> UsageReport | RequestReport:
    since, until, problem = question.since, question.until, ledger.problem
    if question.by == "request":
        limit = question.limit or DEFAULT_PAGE
        page = await ledger.requests(since=since, until=until, limit=limit, after=question.after)
        return report_requests(page, prices, since=since, until=until, problem=problem)
    rows = await ledger.usage(by=question.by, since=since, until=until)
    return report_usage(rows, prices, by=question.by, since=since, until=until, limit=question.limit, problem=problem)


def parse(query: QueryParams, now: float) -> Question:
    """Raises InvalidRequest naming the parameter."""
    known = Question.__struct_fields__
    for name in query:
        if name not in known:
            raise InvalidRequest(f"unknown parameter {name!r}; known are {', '.join(known)}", param=name)
    by = _choice(query, "by", GROUPINGS, "function")
    since, until = (parse_time(query[name], now, name) if name in query else None for name in ("since", "until"))
    if since is not None and until is not None and since >= until:
        raise InvalidRequest(f"since={query['since']!r} is not before until={query['until']!r}", param="since")
    if "after" in query and by != "request":
        raise InvalidRequest("`after` continues a page of by=request; sums have no pages", param="after")
    return Question(
        by=by,
        format=_choice(query, "format", FORMATS, "json"),
        since=since,
        until=until,
        limit=_limit(query["limit"]) if "limit" in query else None,
        after=query.get("after"),
    )


def _choice(query: QueryParams, name: str, choices: tuple[T, ...], default: T) -> T:
    value = query.get(name, default)
    for choice in choices:
        if value == choice:
            return choice
    raise InvalidRequest(f"{name}={value!r} is none of {', '.join(choices)}", param=name)


def _limit(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= LARGEST_PAGE:
        raise InvalidRequest(f"limit={text!r} is not a number from 1 to {LARGEST_PAGE}", param="limit")
    return int(text)


def parse_time(text: str, now: float, param: str) -> float:
    """Unix seconds from unix seconds, from ISO 8601 (UTC unless it says otherwise), or from a span ago like 7d."""
    if span := _SPAN.fullmatch(text):
        return now - float(span[1]) * _SPANS_S[span[2]]
    try:
        seconds = float(text)
    except ValueError:
        pass
    else:
        if math.isfinite(seconds):
            return seconds
    try:
        moment = datetime.datetime.fromisoformat(text)
        return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{param}={text!r} is not a time; give unix seconds, ISO 8601 (2026-01-31T12:00Z; + is %2B in a URL) "
            "or a span ago (30m, 1h, 7d)",
            param=param,
        ) from None
