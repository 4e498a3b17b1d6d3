"""`serverlesslora versions`, `canary` and `rollback`: which version of a function who gets."""

from __future__ import annotations

import argparse
import datetime
import urllib.parse

import msgspec
from rich.table import Table
from rich.text import Text

from serverlesslora.cli.client import add_client_flags, call, plain, plain_console
from serverlesslora.cli.serve import Subparsers
from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.functions_view import FunctionView, VersionsView
from serverlesslora.registry.entries import shown


def add_parsers(commands: Subparsers) -> None:
    versions = commands.add_parser("versions", help="list a function's versions, who gets them, and what happened")
    versions.add_argument("name")
    versions.set_defaults(run=run_versions)

    canary = commands.add_parser(
        "canary",
        help="give some per cent of a function's requests to a version",
        description="The versions that are named get so many per cent; the rest stays with the one that most get. A "
        "user (`user` or `safety_identifier` of a request) stays on one version.",
    )
    canary.add_argument("name")
    canary.add_argument(
        "weights", nargs="+", metavar="VERSION=PERCENT", help="such as v4=10; v4=100 promotes, v4=0 ends"
    )
    canary.set_defaults(run=run_canary)

    rollback = commands.add_parser("rollback", help="go back to what was in force before, or to a version")
    rollback.add_argument("name")
    rollback.add_argument("--to", metavar="VERSION", help="all requests to this version, such as v3")
    rollback.set_defaults(run=run_rollback)

    for parser in (versions, canary, rollback):
        add_client_flags(parser)


def run_versions(arguments: argparse.Namespace) -> int:
    path = f"/admin/versions/{urllib.parse.quote(arguments.name, safe='')}"
    found: VersionsView = call(arguments, "GET", path, type=VersionsView)
    if arguments.json:
        print(msgspec.json.encode(found).decode())
        return 0
    table = Table("version", "gets", "adapter", "backbone", "created (UTC)", "rank", "MB", "source", "problem")
    for v in found.versions:
        numbers = (str(v.facts.rank), f"{v.facts.size_bytes / 1e6:.1f}")
        gets = f"{v.weight} %" if v.weight else ""
        texts = (v.digest[:16], v.backbone, when(v.created), *numbers)
        table.add_row(f"v{v.number}", gets, *texts, plain(v.source), plain(v.problem or ""))
    console = plain_console()
    console.print(table)
    before = "nothing is known of what was before" if found.previous is None else f"before: {shown(found.previous)}"
    console.print(Text(before), "")
    events = Table("when (UTC)", "what", "who", "details")
    for event in found.history[:20]:
        events.add_row(when(event.at), event.action, event.who, plain(event.detail))
    console.print(events)
    return 0


def run_canary(arguments: argparse.Namespace) -> int:
    weights = dict(map(parse_weight, arguments.weights))
    body = {"name": arguments.name, "weights": weights, "canary": True}
    return _tell(arguments, call(arguments, "POST", "/admin/route", body, type=FunctionView))


def run_rollback(arguments: argparse.Namespace) -> int:
    body = {"name": arguments.name, "to": arguments.to}
    return _tell(arguments, call(arguments, "POST", "/admin/rollback", body, type=FunctionView))


def parse_weight(text: str) -> tuple[str, int]:
    """Of "v4=10". Raises InvalidRequest."""
    version, equals, weight = text.partition("=")
    weight = weight.removesuffix("%")
    if not equals or not (weight.isascii() and weight.isdigit() and int(weight) <= 100):
        raise InvalidRequest(f"{text!r}: say VERSION=PERCENT, such as v4=10")
    return version, int(weight)


def _tell(arguments: argparse.Namespace, function: FunctionView) -> int:
    print(msgspec.json.encode(function).decode() if arguments.json else f"{function.name}: {shown(function.weights)}")
    return 0


def when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
