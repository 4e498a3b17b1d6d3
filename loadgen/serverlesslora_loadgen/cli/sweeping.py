"""`sweep`: the highest rate with enough good answers."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from serverlesslora_loadgen.cli.arguments import add_target, add_trace, positive, shaped, target, whole
from serverlesslora_loadgen.cli.running import (
    INVALID,
    MISSED,
    add_judging,
    add_observing,
    add_output,
    exit_code,
    make_folder,
    settings_of,
)
from serverlesslora_loadgen.errors import ObjectiveError
from serverlesslora_loadgen.result import KneePoint, Limits, Result
from serverlesslora_loadgen.units import show_seconds

if TYPE_CHECKING:
    from serverlesslora_loadgen.run import Finished, Settings
    from serverlesslora_loadgen.sweep import Found

MARK = "SATURATION SEARCH"  # which every number of a sweep has to be shown with

Subparsers = Any  # argparse has no public name for it


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "sweep",
        help=f"{MARK}: the highest rate with enough good answers",
        description="The same trace, compressed more and more (time, never thinned), until too few answers are good.",
    )
    add_target(parser)
    add_trace(parser)
    add_judging(parser)
    parser.add_argument("--attainment", type=share, default=0.95, metavar="SHARE", help="that must be good [0.95]")
    parser.add_argument("--precision", type=ratio, default=1.1, metavar="RATIO", help="of the rate found [1.1]")
    parser.add_argument("--max-trials", type=whole(1), default=12, metavar="N", help="[12]")
    parser.add_argument("--processes", type=whole(1), default=1, metavar="N", help="one per core that is free [1]")
    add_observing(parser)
    add_output(parser)
    parser.set_defaults(run=run_sweep)


def share(text: str) -> float:
    if (value := positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than all; a share is written as 0.95")
    return value


def ratio(text: str) -> float:
    if (value := positive(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio to come within; give more than 1, such as 1.1")
    return value


def run_sweep(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.output import write_outputs
    from serverlesslora_loadgen.progress import RunProgress
    from serverlesslora_loadgen.run import run
    from serverlesslora_loadgen.sweep import compressed, sweep

    asked = target(parsed)
    requests, notes = shaped(parsed, asked.url, asked.headers)
    settings = settings_of(parsed, notes)
    if settings.limits == Limits() and all(request.deadline_ms is None for request in requests):
        raise ObjectiveError("a sweep needs to know what is good: give --limit, such as ttft=500ms,tpot=50ms")
    if parsed.out is not None:
        make_folder(parsed.out)
    seconds = requests[-1].timestamp / 1000
    rate_rps = len(requests) / seconds if seconds else float(len(requests))
    kept: dict[int, Finished] = {}

    async def trial(speedup: float) -> Result:
        faster = compressed(requests, speedup)
        with RunProgress(len(faster), f"{rate_rps * speedup:.3g}/s") as told:
            done = await run(faster, of_trial(settings, speedup), told)
        if done.interrupted:
            raise KeyboardInterrupt  # half a trial finds nothing, and whoever pressed the keys wants no other
        kept[id(done.result)] = done
        return done.result

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
    result = msgspec.structs.replace(done.result, mode="sweep", knee=points, title=f"{done.result.title} ({MARK})")
    if parsed.out is not None:
        speedup = result.setup.trace.speedup / settings.speedup
        write_outputs(parsed.out, result, done.records, compressed(requests, speedup), html=not parsed.no_html)
        print(f"written to {parsed.out}", file=sys.stderr)
    return told_to_person(found, result, parsed)


def of_trial(settings: Settings, speedup: float) -> Settings:
    """The server's timers stay where they are while trials compress the trace further, and the result says so."""
    if speedup == 1:
        return settings
    note = (
        f"the search divided time by {speedup:.4g} once more, and the server's timers stayed what they were: at this"
        f" rate cold starts are {'rarer' if speedup > 1 else 'more frequent'} than the trace would make them with every"
        " idle and keep-alive timer divided by it too"
    )
    return msgspec.structs.replace(
        settings,
        speedup=settings.speedup * speedup,
        timer_speedup=settings.speedup,
        notes=(*settings.notes, note),
    )


def tell(point: KneePoint, result: Result) -> None:
    from serverlesslora_loadgen.sweep import incorrect

    good, n = point.attainment.value, point.attainment.n
    said = "" if point.valid else ", INVALID: the client fell behind"
    if wrong := incorrect(result):
        said += f", {wrong} answers were not correct"
    print(
        f"{point.rate_rps:8.3g} requests/s: {100 * good:5.1f} % good (n {n}), "
        f"first token p99 {show_seconds(point.ttft_p99_s)}{said}",
        file=sys.stderr,
        flush=True,
    )


def told_to_person(found: Found, result: Result, parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.export import vllm_keys

    say: Callable[..., None] = print
    if parsed.json:
        print(msgspec.json.format(msgspec.json.encode(vllm_keys(result) | {"knee": result.knee}), indent=1).decode())
        say = to_stderr
    say(sentence(found, parsed.attainment))
    if found.best is None:
        return MISSED if any(point.valid for point in found.points) else INVALID
    if not result.verdict.passed:
        say(f"its best trial did not pass: {'; '.join(result.verdict.reasons)}")
    return exit_code(result)


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def sentence(found: Found, attainment: float) -> str:
    """What was found, and no more than that."""
    enough = f"{100 * attainment:g} % good answers"
    if found.best is None:
        least = min(point.rate_rps for point in found.points)
        client = "; the client was too slow for it" if not any(point.valid for point in found.points) else ""
        return f"{MARK}: no rate down to {least:.3g} requests/s had {enough}{client}"
    rate, trials = f"{found.best.rate_rps:.4g} requests/s", f"{len(found.points)} trials"
    if found.bound is None:
        return f"{MARK}: at least {rate} with {enough}: none of the {trials} found a rate that is too high"
    known = f"{trials}, known within a factor {math.ceil(1000 * found.ratio) / 1000:g}"
    if not found.bound.valid:
        return (
            f"{MARK}: at least {rate} with {enough}, and that is the client's limit, not the server's: at"
            f" {found.bound.rate_rps:.4g} requests/s it fell behind ({known})"
        )
    return f"{MARK}: {rate} is the highest rate tried with at least {enough} ({known})"
