"""`sweep`: the highest rate with enough good answers."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

import msgspec

from serverlesslora_loadgen.cli.arguments import add_target, add_trace, shaped, target
from serverlesslora_loadgen.cli.running import (
    INVALID,
    MISSED,
    PASSED,
    add_judging,
    add_observing,
    add_output,
    make_folder,
    settings_of,
)
from serverlesslora_loadgen.errors import ObjectiveError
from serverlesslora_loadgen.result import KneePoint, Limits, Result
from serverlesslora_loadgen.units import show_seconds

Subparsers = Any  # argparse has no public name for it


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "sweep",
        help="SATURATION SEARCH: the highest rate with enough good answers",
        description="The same trace, compressed more and more (time, never thinned), until too few answers are good.",
    )
    add_target(parser)
    add_trace(parser)
    add_judging(parser)
    parser.add_argument("--attainment", type=float, default=0.95, metavar="SHARE", help="that must be good [0.95]")
    parser.add_argument("--precision", type=float, default=1.1, metavar="RATIO", help="of the rate found [1.1]")
    parser.add_argument("--max-trials", type=int, default=12, metavar="N", help="[12]")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="one per core that is free [1]")
    add_observing(parser)
    add_output(parser)
    parser.set_defaults(run=run_sweep)


def run_sweep(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.output import write_outputs
    from serverlesslora_loadgen.progress import RunProgress
    from serverlesslora_loadgen.run import Finished, run
    from serverlesslora_loadgen.sweep import compressed, sweep

    asked = target(parsed)
    requests, notes = shaped(parsed, asked.url, asked.headers)
    settings = settings_of(parsed, notes)
    if settings.limits == Limits():
        raise ObjectiveError("a sweep needs to know what is good: give --limit, such as ttft=500ms,tpot=50ms")
    if parsed.out is not None:
        make_folder(parsed.out)
    seconds = requests[-1].timestamp / 1000
    rate_rps = len(requests) / seconds if seconds else float(len(requests))
    kept: dict[int, Finished] = {}

    async def trial(speedup: float) -> Result:
        faster = compressed(requests, speedup)
        with RunProgress(len(faster), f"{rate_rps * speedup:.3g}/s") as told:
            done = await run(faster, msgspec.structs.replace(settings, speedup=settings.speedup * speedup), told)
        kept[id(done.result)] = done
        return done.result

    def tell(point: KneePoint) -> None:
        share, n = point.attainment.value, point.attainment.n
        verdict = "" if point.valid else ", INVALID: the client fell behind"
        print(
            f"{point.rate_rps:8.3g} requests/s: {100 * share:5.1f} % good (n {n}), "
            f"first token p99 {show_seconds(point.ttft_p99_s)}{verdict}",
            file=sys.stderr,
            flush=True,
        )

    found = asyncio.run(
        sweep(
            trial,
            rate_rps=rate_rps,
            attainment=parsed.attainment,
            precision=parsed.precision,
            max_trials=parsed.max_trials,
            on_point=tell,
        )
    )
    done = kept[id(found.last)]
    points = sorted(found.points, key=lambda point: point.rate_rps)
    result = msgspec.structs.replace(done.result, mode="sweep", knee=points)
    if parsed.out is not None:
        speedup = result.setup.trace.speedup / settings.speedup
        write_outputs(parsed.out, result, done.records, compressed(requests, speedup), html=not parsed.no_html)
        print(f"written to {parsed.out}", file=sys.stderr)
    if found.best is None:
        print(f"no rate down to {points[0].rate_rps:.3g}/s had {100 * parsed.attainment:g} % good answers")
        return MISSED if any(point.valid for point in points) else INVALID
    print(
        f"SATURATION SEARCH: {found.best.rate_rps:.4g} requests/s is the highest rate tried with at least "
        f"{100 * parsed.attainment:g} % good answers ({len(points)} trials, known within a factor {parsed.precision:g})"
    )
    return PASSED
