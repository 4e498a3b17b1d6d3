"""`serverlesslora top`: a live table of who runs where."""

from __future__ import annotations

import argparse
import time

import msgspec
from rich.console import Group
from rich.live import Live
from rich.table import Table

from serverlesslora.cli.client import add_client_flags, call, plain_console
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
        status: FleetStatus = call(arguments, "GET", "/admin/state", type=FleetStatus)
        return status

    if arguments.json:
        print(msgspec.json.encode(look()).decode())
        return 0
    if arguments.once:
        plain_console().print(render(look()))
        return 0
    with Live(render(look()), console=plain_console(), refresh_per_second=10, screen=True) as live:
        while True:
            time.sleep(arguments.interval)
            live.update(render(look()))


def render(status: FleetStatus) -> Group:
    backbones = _table("BACKBONE", "STATE", "MB", "HOST", "LAUNCHER", "RESTARTS", "SHARING")
    for b in status.backbones:
        pids = (str(b.host_pid), str(b.launcher_pid))
        backbones.add_row(b.name, b.state, f"{b.size_bytes / 1e6:.0f}", *pids, str(b.restarts), b.sharing)
    workers = _table("WORKER OF", "STATE", "PID", "OPEN", "RUN", "WAIT", "KV %", "LORA", "BUSY", "IDLE")
    for w in sorted(status.workers, key=lambda worker: worker.domain):
        s = w.stats
        kv = f"{100 * s.kv_used_blocks / s.kv_total_blocks:.0f}" if s and s.kv_total_blocks else "-"
        counts = (str(w.open_requests), str(s.running if s else 0), str(s.waiting if s else 0))
        busy = f"{s.busy_s:.1f}" if s else "-"
        workers.add_row(w.domain, w.state, str(w.pid), *counts, kv, str(len(w.adapters)), busy, f"{w.idle_s:.0f}")
    asleep = set(status.domains.values()) - {w.domain for w in status.workers}
    return Group(backbones, "", workers, "", f"{len(status.functions)} functions, {len(asleep)} domains at zero")


def _table(first: str, *columns: str) -> Table:
    """Eighty columns are enough; a long domain is what gets cut."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="ellipsis", no_wrap=True)
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=max(len(column), 5))
    return table
