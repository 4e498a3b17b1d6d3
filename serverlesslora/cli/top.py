"""`serverlesslora top`: a live table of who runs where."""

from __future__ import annotations

import argparse
import time

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from serverlesslora.cli.client import add_client_flags, call
from serverlesslora.cli.serve import Subparsers
from serverlesslora.gateway.fleet import FleetStatus


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser("top", help="live table of backbones and workers; with --json one snapshot")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between refreshes [1.0]")
    parser.add_argument("--once", action="store_true", help="print one table and leave")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    def look() -> FleetStatus:
        status: FleetStatus = call(arguments.server, "GET", "/admin/state", type=FleetStatus)
        return status

    if arguments.json:
        print(msgspec.json.encode(look()).decode())
        return 0
    if arguments.once:
        Console().print(render(look()))
        return 0
    with Live(render(look()), refresh_per_second=10, screen=True) as live:
        while True:
            time.sleep(arguments.interval)
            live.update(render(look()))


def render(status: FleetStatus) -> Group:
    backbones = Table("backbone", "state", "MB", "sharing", "host", "launcher", "restarts", title="backbones")
    for b in status.backbones:
        backbones.add_row(
            b.name,
            b.state,
            f"{b.size_bytes / 1e6:.0f}",
            b.sharing,
            str(b.host_pid),
            str(b.launcher_pid),
            str(b.restarts),
        )
    workers = Table(
        "domain", "state", "pid", "open", "running", "waiting", "kv", "adapters", "busy s", "idle s", title="workers"
    )
    for w in sorted(status.workers, key=lambda worker: worker.domain):
        s = w.stats
        kv = f"{100 * s.kv_used_blocks / s.kv_total_blocks:.0f} %" if s and s.kv_total_blocks else "-"
        workers.add_row(
            w.domain,
            w.state,
            str(w.pid),
            str(w.open_requests),
            str(s.running if s else 0),
            str(s.waiting if s else 0),
            kv,
            str(len(w.adapters)),
            f"{s.busy_s:.1f}" if s else "-",
            f"{w.idle_s:.0f}",
        )
    asleep = sorted(set(status.domains.values()) - {w.domain for w in status.workers})
    return Group(backbones, workers, f"{len(status.functions)} functions, {len(asleep)} domains at zero")
