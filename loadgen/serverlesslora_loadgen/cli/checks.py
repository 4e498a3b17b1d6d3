"""`calibrate`, `null-server` and `golden`: what makes other measurements believable."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serverlesslora_loadgen import null_server
from serverlesslora_loadgen.cli.arguments import add_target, add_trace, seconds, shaped, target, whole
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.units import show_seconds

if TYPE_CHECKING:
    from serverlesslora_loadgen.calibrate import Trial
    from serverlesslora_loadgen.record import Record

Subparsers = Any  # argparse has no public name for it


def add_parsers(commands: Subparsers) -> None:
    calibrating = commands.add_parser("calibrate", help="what this client adds on this machine, and what it can bear")
    calibrating.add_argument("-o", "--out", type=Path, metavar="FILE", help="for `run --calibration`")
    calibrating.add_argument(
        "--processes", type=whole(1), default=1, metavar="N", help="of the client, as many as `run` will have [1]"
    )
    calibrating.add_argument("--seconds", type=seconds, default=5.0, metavar="TIME", help="of each trial [5s]")
    calibrating.add_argument("--quick", action="store_true", help="no search for the largest rate and most streams")
    calibrating.set_defaults(run=run_calibrate)

    server = commands.add_parser("null-server", help="a server that answers at a fixed cadence and computes nothing")
    null_server.add_arguments(server)
    server.set_defaults(run=run_null_server)

    golden = commands.add_parser(
        "golden",
        help="ask a server that nobody else is asking, and keep its answers for `run --verify`",
        description="The same trace and seed make the same prompts: a run of them is then held to these answers.",
    )
    add_target(golden)
    add_trace(golden)
    golden.add_argument("-o", "--out", type=Path, required=True, metavar="FILE")
    golden.add_argument("--per-adapter", type=whole(0), default=2, metavar="N", help="different prompts; 0: all [2]")
    golden.set_defaults(run=run_golden)


def run_calibrate(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.calibrate import calibrate, missed, write_calibration

    def tell(trial: Trial) -> None:
        what = "requests/s" if trial.kind == "rate" else "streams at once"
        print(
            f"{trial.asked:7d} {what}: lag p99 {show_seconds(trial.lag_p99_s)}, added to first tokens p99 "
            f"{show_seconds(trial.added_p99_s)}, client {100 * trial.client_cpu:.0f} % and server "
            f"{100 * trial.server_cpu:.0f} % of a core{'' if trial.is_borne else ', too much'}",
            file=sys.stderr,
            flush=True,
        )

    found = asyncio.run(
        calibrate(processes=parsed.processes, seconds=parsed.seconds, search=not parsed.quick, on_trial=tell)
    )
    if parsed.out is not None:
        try:
            write_calibration(parsed.out, found)
        except OSError as error:
            raise LoadgenError(f"cannot write {parsed.out}: {error}") from error
    most = ", ".join(
        f"at most {number} {what}"
        for number, what in ((found.max_rps, "requests/s"), (found.max_streams, "streams at once"))
        if number
    )
    print(
        f"at {found.rate_rps:g} requests/s: requests leave {show_seconds(found.lag_p99_s)} late (p99), "
        f"the client adds {show_seconds(found.added_ttft_p50_s)} to first tokens "
        f"(p99 {show_seconds(found.added_ttft_p99_s)}){'; ' + most if most else ''}"
    )
    for sentence in (short := missed(found)):
        print(f"  {sentence}")
    return 3 if short else 0


def run_null_server(parsed: argparse.Namespace) -> int:
    null_server.run(parsed)
    return 0


def run_golden(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.client.golden import record_goldens, write_goldens
    from serverlesslora_loadgen.client.prompts import plan

    asked = target(parsed)
    requests, _ = shaped(parsed, asked.url, asked.headers)
    planned = plan(requests, asked, seed=parsed.seed, goldens=None)
    count = 0

    def tell(record: Record) -> None:
        nonlocal count
        count += 1
        if sys.stderr.isatty():
            print(f"\r{count} answers, now {record.model[:40]:40}", end="", file=sys.stderr, flush=True)

    answers = asyncio.run(record_goldens(asked, planned, per_adapter=parsed.per_adapter or None, on_answer=tell))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    try:
        write_goldens(parsed.out, answers)
    except OSError as error:
        raise LoadgenError(f"cannot write {parsed.out}: {error}") from error
    print(f"{parsed.out}: {len(answers)} golden answers of {len({answer.model for answer in answers})} adapters")
    return 0
