"""`serverlesslora simulate`: a trace played on a cluster under several systems, as a table or JSON."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from serverlesslora.cli.serve import Subparsers
from serverlesslora.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from serverlesslora.simulator.report import Report

DESCRIPTION = """\
Play a trace of requests on a simulated cluster with the live server's own policies, and with those of other systems.
TRACE is JSON lines {"timestamp": ms, "model": name, "input_length": tokens, "output_length": tokens} or a csv table of
invocations per minute (Azure Functions 2019); either may be gzipped. The same input and seed give the same output.

Money is counted twice: by the share of devices' memory that is held, and by whole devices while anything is on them.
This server's rows refuse whom the SLO cannot be kept for, as it does live; the other systems know no SLO and refuse by
the cluster's patience_s alone. `deadline` in the cluster file makes all refuse alike."""


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "simulate",
        help="play a trace on a simulated cluster and compare systems",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", nargs="?", metavar="TRACE", help=".jsonl, .csv, or one of them with .gz")
    parser.add_argument(
        "--cluster", metavar="FILE.toml", help="devices, prices, SLO [16 devices of 48 GB, 8B backbone]"
    )
    parser.add_argument("--systems", metavar="A,B", help="by name; all without it")
    parser.add_argument("--list-systems", action="store_true", help="say what each system is, then leave")
    parser.add_argument("--functions", type=int, metavar="N", help="so many at random of those that qualify")
    parser.add_argument("--max-per-day", type=int, metavar="N", help="functions called more often do not qualify")
    parser.add_argument("--trigger", metavar="NAME", help="only rows of a csv table with this trigger, such as http")
    parser.add_argument("--start-hour", type=float, default=0.0, metavar="H", help="where the window begins [0]")
    parser.add_argument("--hours", type=float, metavar="H", help="length of the window [all]")
    parser.add_argument(
        "--lengths", metavar="FILE|IN,OUT", help="token counts for a csv table: pairs drawn from a file [1024,200]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random choice [0]")
    parser.add_argument("--json", action="store_true", help="one JSON object per system and line")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # Only here: whoever asks for --help or another command need not wait for numpy.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from serverlesslora.simulator.cluster import SHIPPED, read_cluster
    from serverlesslora.simulator.report import make_report, render
    from serverlesslora.simulator.simulation import Simulation
    from serverlesslora.simulator.systems import choose_systems
    from serverlesslora.simulator.trace import Choice, read_trace

    systems = choose_systems(arguments.systems)
    if arguments.list_systems:
        for system in systems:
            print(f"{system.name}: {system.summary}")
        return 0
    if arguments.trace is None:
        raise InvalidRequest("no TRACE: name a file, or say --list-systems")
    cluster = read_cluster(arguments.cluster or SHIPPED / "clusters" / "illustrative_16x48gb.toml")
    choice = Choice(
        functions=arguments.functions,
        max_per_day=arguments.max_per_day,
        start_hour=arguments.start_hour,
        hours=arguments.hours,
        trigger=arguments.trigger,
        seed=arguments.seed,
    )
    trace = read_trace(arguments.trace, choice, lengths=arguments.lengths)
    reports: list[Report] = []
    walls: list[float] = []
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True) as progress:
        for system in systems:
            task = progress.add_task(system.name, total=trace.num_requests)
            began = time.perf_counter()
            simulation = Simulation(trace, cluster, system, on_progress=functools.partial(_advance, progress, task))
            reports.append(make_report(trace, cluster, system, simulation.run()))
            walls.append(time.perf_counter() - began)
            progress.update(task, completed=trace.num_requests)
            if arguments.json:
                print(msgspec.json.encode(reports[-1]).decode(), flush=True)
    if not arguments.json:
        print(f"{trace.description}\nprofile: {cluster.profile.measured_on}", file=sys.stderr)
        Console(width=None if sys.stdout.isatty() else 160).print(
            render(reports, walls, prices_are=cluster.config.prices_are)
        )
    return 0


def _advance(progress: Progress, task: TaskID, num_done: int) -> None:
    progress.update(task, completed=num_done)
