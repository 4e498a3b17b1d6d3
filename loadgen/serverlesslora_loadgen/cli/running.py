"""`run`: a trace against a server, as it was meant to be sent, or as fast as so many clients can."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from serverlesslora_loadgen.cli.arguments import (
    add_target,
    add_trace,
    login,
    pair,
    positive,
    seconds,
    shaped,
    target,
    timer,
    whole,
)
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.privacy import without_secrets
from serverlesslora_loadgen.result import Limits, Result

PASSED, MISSED, INVALID = 0, 3, 4

Subparsers = Any  # argparse has no public name for it


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "run",
        help="replay a trace and report what happened",
        description="Every request leaves at its time, whatever became of those before it. Latencies count from when "
        "it was meant to leave. What was shed or failed met no objective.",
    )
    add_target(parser)
    add_trace(parser)
    add_judging(parser)
    group = parser.add_argument_group("the client")
    group.add_argument("--processes", type=whole(1), default=1, metavar="N", help="one per core that is free [1]")
    group.add_argument(
        "--closed",
        type=whole(1),
        metavar="N",
        help="CLOSED LOOP instead: N at a time, times ignored; for finding out what a server can take, not latencies",
    )
    add_observing(parser)
    add_output(parser)
    parser.set_defaults(run=run_run)


def add_judging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is good")
    group.add_argument(
        "--limit",
        metavar="LIMITS",
        help="that a request has to meet to be good, such as ttft=500ms,tpot=50ms,e2e=10s; default: those of --slo",
    )
    group.add_argument(
        "--slo",
        action="append",
        default=[],
        metavar="OBJECTIVE",
        help="sets the exit code: ttft=500ms:p99, tpot=50ms:p95, errors=0, shed=1%%, attainment=99%%; may be repeated",
    )
    group.add_argument("--verify", type=Path, metavar="FILE", help="golden answers, made by `golden`")
    group.add_argument("--warmup", type=seconds, metavar="TIME", help="[until each adapter has been asked once]")
    group.add_argument("--calibration", type=Path, metavar="FILE", help="of this machine, made by `calibrate`")


def add_observing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the server's side", "memory, workers and money; all of it optional")
    group.add_argument("--admin", metavar="URL", help="admin API of a server of ours: workers, memory, its ledger")
    group.add_argument(
        "--admin-header", type=pair, action="append", default=[], metavar="NAME=VALUE", help="sent to it; never kept"
    )
    group.add_argument("--meter-group", type=int, metavar="PGID", help="processes whose memory is counted, by /proc")
    group.add_argument("--interval", type=seconds, default=1.0, metavar="TIME", help="between two looks [1s]")
    group.add_argument("--prices", type=Path, metavar="TOML", help="default: illustrative")
    group.add_argument(
        "--instance-gb", type=positive, metavar="GB", help="one full model with its process, for baselines"
    )
    group.add_argument("--baseline-keep-alive", type=seconds, default=600.0, metavar="TIME", help="raw [10m]")
    group.add_argument(
        "--timer", type=timer, action="append", default=[], metavar="NAME=TIME", help="of the server, raw; shown scaled"
    )
    group.add_argument("--note", type=pair, action="append", default=[], metavar="NAME=TEXT", help="of the server")
    group.add_argument("--no-check-models", action="store_true", help="do not ask the server what it serves")


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="result.json, requests.csv, summary.md, report.html"
    )
    group.add_argument("--title")
    group.add_argument("--no-html", action="store_true")
    group.add_argument("--json", action="store_true", help="print the keys that `vllm bench serve` writes")


def settings_of(parsed: argparse.Namespace, notes: list[str]) -> Any:
    from serverlesslora_loadgen.calibrate import read_calibration
    from serverlesslora_loadgen.run import Settings

    admin, admin_headers = (None, {}) if parsed.admin is None else login(parsed.admin)
    return Settings(
        target=target(parsed),
        trace_name=parsed.trace.name,
        speedup=parsed.speedup,
        length_scale=parsed.length_scale,
        notes=tuple(notes),
        seed=parsed.seed,
        processes=parsed.processes,
        concurrency=getattr(parsed, "closed", None),
        limits=limits_of(parsed.limit, parsed.slo),
        objectives=tuple(parsed.slo),
        warmup_s=parsed.warmup,
        goldens=parsed.verify,
        check_models=not parsed.no_check_models,
        admin=admin,
        admin_headers=admin_headers | dict(parsed.admin_header),
        meter_group=parsed.meter_group,
        interval_s=parsed.interval,
        prices=parsed.prices,
        instance_bytes=None if parsed.instance_gb is None else round(parsed.instance_gb * 1e9),
        keep_alive_s=parsed.baseline_keep_alive,
        calibration=None if parsed.calibration is None else read_calibration(parsed.calibration),
        timers=dict(parsed.timer),
        said=dict(parsed.note),
        title=parsed.title or "",
        command=("serverlesslora-loadgen", *without_secrets(sys.argv[1:])),
    )


def limits_of(text: str | None, objectives: list[str]) -> Limits:
    """What a request has to meet to be good: what is said, else what the objectives ask of a percentile.

    Of several for one latency the loosest: what only half of the requests have to meet makes no other one bad.
    """
    from serverlesslora_loadgen.analysis.objectives import parse_limits, parse_objective

    if text is not None:
        return parse_limits(text)
    found: dict[str, float] = {}
    for each in map(parse_objective, objectives):
        if each.name in ("ttft", "tpot", "e2e"):
            found[each.name] = max(each.limit, found.get(each.name, 0.0))
    return Limits(ttft_s=found.get("ttft"), tpot_s=found.get("tpot"), e2e_s=found.get("e2e"))


def run_run(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.output import write_outputs
    from serverlesslora_loadgen.progress import RunProgress
    from serverlesslora_loadgen.run import run

    asked = target(parsed)
    requests, notes = shaped(parsed, asked.url, asked.headers)
    settings = settings_of(parsed, notes)
    if parsed.out is not None:
        make_folder(parsed.out)
    with RunProgress(len(requests), parsed.trace.name) as told:
        done = asyncio.run(run(requests, settings, told))
    if parsed.out is not None:
        write_outputs(parsed.out, done.result, done.records, requests, html=not parsed.no_html)
    return told_to_person(done.result, parsed)


def make_folder(path: Path) -> None:
    """Before the run: nobody wants to learn after an hour that its results cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise LoadgenError(f"cannot write results to {path}: {error}") from error


def told_to_person(result: Result, parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.export import vllm_keys
    from serverlesslora_loadgen.report.markdown import summary

    if parsed.json:
        print(msgspec.json.format(msgspec.json.encode(vllm_keys(result)), indent=1).decode())
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        if sys.stdout.isatty():
            Console().print(Markdown(summary(result)))
        else:
            print(summary(result))
        if parsed.out is not None:
            print(f"\nwritten to {parsed.out}")
    return exit_code(result)


def exit_code(result: Result) -> int:
    verdict = result.verdict
    return INVALID if not verdict.valid else PASSED if verdict.passed else MISSED
