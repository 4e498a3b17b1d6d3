"""`serverlesslora plan`: what lies in memory, what it is worth, and what would be loaded or moved out next, and why."""

from __future__ import annotations

import argparse
import re

import msgspec
from rich.console import Console
from rich.table import Table

from serverlesslora.cli.client import add_client_flags, call, plain_console
from serverlesslora.cli.serve import Subparsers
from serverlesslora.gateway.plan_view import PlanView


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "plan",
        help="what lies in memory and why, and what would be loaded or moved out next",
        description="Density is what an artifact saves: seconds of waiting per second and GB of memory held.",
    )
    parser.add_argument("--all", action="store_true", help="also what was left out [the 20 densest of it]")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    view: PlanView = call(arguments, "GET", "/admin/plan", type=PlanView)
    if arguments.json:
        print(msgspec.json.encode(view).decode())
    else:
        show(view, plain_console(), limit=None if arguments.all else 20)
    return 0


def show(view: PlanView, console: Console, *, limit: int | None) -> None:
    measured = "" if view.measured_bytes is None else f", /proc says {_mb(view.measured_bytes)}"
    share = view.counted_bytes / max(1, view.capacity_bytes)
    console.print(
        f"{view.place}: {_mb(view.counted_bytes)} of {_mb(view.capacity_bytes)} MB held ({share:.0%}; "
        f"moves out above {view.watermark:.0%}){measured}",
    )
    console.print(" ".join(f"{name}={value}" for name, value in view.policies.items()))
    artifacts = Table("artifact", "state", "MB", "s/s per GB", "why", box=None, padding=(0, 1, 0, 0))
    left_out = [verdict for verdict in view.verdicts if verdict.state == "left out"]
    for verdict in [v for v in view.verdicts if v.state != "left out"] + left_out[:limit]:
        artifacts.add_row(
            shortened(verdict.artifact_id),
            verdict.state,
            _mb(verdict.size_bytes),
            f"{verdict.density * 1e9:.2g}",
            shortened(verdict.reason),
        )
    console.print(artifacts)
    if limit is not None and len(left_out) > limit:
        console.print(f"… and {len(left_out) - limit} more left out (--all)")
    console.print(f"next to load: {shortened(view.next_load or 'nothing')}")
    console.print(f"next to move out: {shortened(view.next_evict or 'nothing')}")
    if view.last_offload is not None:
        console.print(f"last moved out for memory: {view.last_offload.reason}")
    domains = Table("domain", "state", "req/s", "kept idle", "why", "queue", box=None, padding=(0, 1, 0, 0))
    for each in view.domains:
        wakes = "" if each.wakes_in_s is None else f" (starts again in {each.wakes_in_s:.0f} s)"
        domains.add_row(
            each.domain,
            each.state + wakes,
            f"{each.rate:.2g}",
            f"{each.keep_alive_s:.0f} s",
            each.keep_alive_reason,
            each.queue,
        )
    console.print(domains)


def shortened(text: str) -> str:
    """Digests by their first twelve digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"
