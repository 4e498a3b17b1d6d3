"""Shared and preloaded against one process per function: the same trace, the same memory, the same machine, one run.

    python bench/serverless.py [--model M] [--all] [--rounds 1]

Each system is a server started anew with the same functions, memory bound and time limits; only its policy differs.
The window of the trace is compressed until it is `--load` of what one hot function after another can do here (measured
first), and the server's keep-alives are compressed by the same factor. Rounds are interleaved.

Memory is measured from outside (`meter.py`), device-seconds by the server. All pay the same illustrative prices:

    cost = GB-seconds held by all processes of the server * --price-gb-second + device-seconds * --price-device-second

`private` starts a process, its libraries and a copy of the backbone when a request needs them, and keeps them for the
longest keep-alive or until the memory is needed: what platforms that know nothing of models do.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from harness import report, spread
from meter import metered
from replay import (
    Arrival,
    HttpSender,
    Progress,
    Replay,
    cut,
    factor,
    find_trace,
    percentile,
    read_trace,
    rename,
    replay,
    scale,
    summary,
)
from serving import Deployed, Model, Settings, deployment, find_model, function_names

SYSTEMS: dict[str, Settings] = {
    "all-on": {"sharing": "on", "preload": "on", "offload": "on", "batching": "on"},
    "private": {"sharing": "off", "preload": "off", "offload": "on", "batching": "on"},
    "no-sharing": {"sharing": "off", "preload": "on", "offload": "on", "batching": "on"},
    "no-preload": {"sharing": "on", "preload": "off", "offload": "on", "batching": "on"},
    "lru-preload": {"sharing": "on", "preload": "lru", "offload": "on", "batching": "on"},
    "no-offload": {"sharing": "on", "preload": "on", "offload": "off", "batching": "on"},
    "no-batching": {"sharing": "on", "preload": "on", "offload": "on", "batching": "off"},
}
OURS, BASELINE = "all-on", "private"
KEEP_ALIVE_S = (5.0, 600.0)  # of the trace's own time
SETTLE_S = 5.0  # after the start of a server, before the first request
RUNG_COLD = ("backbone", "worker", "adapter-disk", "adapter-ram")


@dataclass(frozen=True)
class Scenario:
    trace: str
    length_scale: Fraction
    memory_mb: int
    slo_s: float  # attainment is measured at this
    deadline_s: float  # what the server is told: a request that cannot make it is refused


SCENARIOS = {
    "M": Scenario("azf2019_mixed_24ad_60min", Fraction(1, 64), 12_000, 2.5, 10.0),
    "demo": Scenario("azf2019_mixed_24ad_60min", Fraction(1, 8), 3_000, 2.5, 10.0),
}


@dataclass(frozen=True)
class Workload:
    arrivals: list[Arrival]
    functions: list[str]
    compress: float
    minutes: tuple[float, float]
    seconds: float
    request_s: float  # one hot request after another, on average
    load: float  # offered, of what they could do


async def measure_request_s(model: Model, arrivals: Sequence[Arrival], count: int = 24) -> float:
    """Mean duration of requests of these lengths, one after another on one hot function."""
    lengths = random.Random(0).choices(arrivals, k=count)
    with deployment(model, ["probe"], {"idle-timeout": 600.0}) as deployed:
        async with HttpSender(deployed.running.url, token_ids=model.token_ids) as send:
            times = []
            for number, like in enumerate([*lengths[:3], *lengths]):
                done = await replay([like._replace(at_s=0.0, model="probe")], send)
                if error := done.outcomes[0].error:
                    raise SystemExit(f"the probe of {like} failed: {error}")
                if number >= 3:  # the first ones started the worker and loaded the adapter
                    times.append(done.outcomes[0].e2e_s or 0.0)
    return statistics.fmean(times)


async def make_workload(arguments: argparse.Namespace, model: Model, scenario: Scenario) -> Workload:
    trace = read_trace(find_trace(arguments.trace or scenario.trace))
    functions = function_names(len({each.model for each in trace}))
    length = float(arguments.length_scale or scenario.length_scale)
    scaled = scale(rename(trace, functions), compress=1.0, length=length, max_tokens=model.max_tokens)
    request_s = await measure_request_s(model, scaled)
    begin_s = 60 * arguments.from_minute

    def window(compress: float) -> list[Arrival]:
        return cut(scaled, begin_s, begin_s + compress * arguments.seconds)

    compress = arguments.compress
    if compress is None:  # the rate differs from minute to minute: try again with that of the window found
        compress = 1.0
        for _ in range(10):
            rate = len(window(compress)) / (compress * arguments.seconds)
            compress = min(arguments.load / (request_s * rate), (trace[-1].at_s - begin_s) / arguments.seconds)
    arrivals = scale(window(compress), compress=compress, length=1.0)
    load = len(arrivals) / arguments.seconds * request_s
    minutes = (arguments.from_minute, arguments.from_minute + compress * arguments.seconds / 60)
    return Workload(arrivals, functions, compress, minutes, arguments.seconds, request_s, load)


async def run(
    system: str, model: Model, workload: Workload, scenario: Scenario, arguments: argparse.Namespace
) -> dict[str, Any]:
    keep_min, keep_max = (each / workload.compress for each in KEEP_ALIVE_S)
    settings: dict[str, str | float] = {
        **SYSTEMS[system],
        "memory-mb": arguments.memory_mb or scenario.memory_mb,
        "keep-alive-min": keep_min,
        "keep-alive-max": keep_max,
        "slo-ttft": scenario.deadline_s,
        "cold-timeout": 300.0,  # a process that starts slowly is waited for, and counts with all its time
        "warm-pool": 0 if SYSTEMS[system]["preload"] == "off" else 1,
    }
    if arguments.profile_out:
        arguments.profile_out.mkdir(parents=True, exist_ok=True)
        settings["profile-out"] = str(arguments.profile_out / f"{model.name}-{system}.json")
    with deployment(model, workload.functions, settings) as deployed, metered(deployed.running.pid) as meter:
        if deployed.unknown and not arguments.allow_unknown:
            raise SystemExit(f"this server has no {', '.join('--' + name for name in deployed.unknown)}")
        await asyncio.sleep(SETTLE_S)
        began_unix, device_before = time.time(), deployed.device_seconds()
        async with HttpSender(deployed.running.url, token_ids=model.token_ids) as send:
            done = await replay(workload.arrivals, send, Progress(len(workload.arrivals)))
        # Held until the window ends, or until the last answer when a server falls behind.
        until = max(done.ended_at, done.began_at + workload.seconds)
        await asyncio.sleep(max(0.0, until - time.monotonic()) + 0.1)
        numbers = summary(done, slo_s=scenario.slo_s)
        numbers["cold_starts"] = {rung: numbers["rungs"].get(rung, 0) for rung in RUNG_COLD}
        numbers["ttft_by_rung_s"] = by_rung(done)
        numbers["gb_seconds"] = meter.gb_seconds(done.began_at, until)
        numbers["mean_gb"] = numbers["gb_seconds"] / (until - done.began_at)
        numbers["peak_gb"] = meter.peak_gb(done.began_at, until)
        numbers["ledger"] = ledger(deployed, began_unix)
        numbers["device_seconds"] = (
            numbers["ledger"]["device_s"] if numbers["ledger"] else deployed.device_seconds() - device_before
        )
        numbers["device_busy"] = numbers["device_seconds"] / (until - done.began_at)
        numbers["workers_at_the_end"] = deployed.workers()
        numbers["cost"] = (
            numbers["gb_seconds"] * arguments.price_gb_second
            + numbers["device_seconds"] * arguments.price_device_second
        )
        numbers["server"], numbers["unknown_flags"] = deployed.settings, deployed.unknown
    return numbers


def by_rung(done: Replay) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {}
    for each in done.outcomes:
        if each.is_answered and each.ttft_s is not None:
            found.setdefault(each.rung, []).append(each.ttft_s)
    return {
        rung: {"n": len(v), "mean": statistics.fmean(v), "p50": percentile(v, 50), "p99": percentile(v, 99)}
        for rung, v in sorted(found.items())
    }


def ledger(deployed: Deployed, since: float) -> dict[str, Any] | None:
    """What the server itself has written down since then, of all functions together."""
    answer = deployed.usage(by="function", since=since)
    if answer is None:
        return None
    usage = answer["total"]["usage"]
    return {
        **{key: usage[key] for key in ("requests", "finished", "failed", "aborted", "refused", "device_s", "rungs")},
        "gb_seconds": sum(usage["byte_s"].values()) / 1e9,
        "paid": answer["total"]["money"]["paid"],
    }


def middle(runs: Sequence[dict[str, Any]], *path: str) -> float:
    """The median over the rounds of one number."""
    values = []
    for numbers in runs:
        value: Any = numbers
        for key in path:
            value = value[key]
        values.append(float(value))
    return statistics.median(values)


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What each system pays and how long its clients wait, and by how much ours is below the others, in percent."""
    figures = {
        "ttft_mean_s": ("ttft_s", "mean"),
        "ttft_p50_s": ("ttft_s", "p50"),
        "ttft_p99_s": ("ttft_s", "p99"),
        "slo_attainment": ("slo_attainment",),
        "answered": ("answered",),
        "shed": ("shed",),
        "failed": ("failed",),
        "gb_seconds": ("gb_seconds",),
        "device_seconds": ("device_seconds",),
        "cost": ("cost",),
    }
    table = {system: {name: middle(each, *path) for name, path in figures.items()} for system, each in runs.items()}
    reductions = {}
    if OURS in table:
        ours = table[OURS]
        for system, theirs in table.items():
            if system != OURS:
                below = {
                    name: round(100 * (1 - ours[name] / theirs[name]), 1)
                    for name in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "gb_seconds", "device_seconds", "cost")
                    if theirs[name]
                }
                # The one that answers less is not cheaper for it.
                if ours["answered"] and theirs["answered"]:
                    per_answer = (ours["cost"] / ours["answered"]) / (theirs["cost"] / theirs["answered"])
                    below["cost_per_answer"] = round(100 * (1 - per_answer), 1)
                reductions[f"{OURS} below {system}, %"] = below
    return {"systems": table, "reductions": reductions}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="M", help="demo, or a shape written by make_models.py [M]")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[OURS, BASELINE], metavar="SYSTEM")
    parser.add_argument("--all", action="store_true", help=f"all of {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=1, help="of all systems, interleaved [1]")
    parser.add_argument("--seconds", type=float, default=360.0, help="length of one run [360]")
    parser.add_argument("--load", type=factor, default=0.42, help="offered, of what hot requests one by one use [0.42]")
    parser.add_argument("--compress", type=factor, help="of time; default: whatever gives --load")
    parser.add_argument("--from-minute", type=float, default=0.0, help="where the window of the trace begins [0]")
    parser.add_argument("--trace", help="default: by model")
    parser.add_argument("--length-scale", type=factor, help="default: by model")
    parser.add_argument("--memory-mb", type=int, help="bound of every system alike; default: by model")
    parser.add_argument("--price-gb-second", type=float, default=2.5e-6, help="illustrative [2.5e-6]")
    parser.add_argument("--price-device-second", type=float, default=4.8e-5, help="illustrative, two cores [4.8e-5]")
    parser.add_argument(
        "--profile-out", type=Path, metavar="DIR", help="servers write what they measured, for simulate"
    )
    parser.add_argument("--allow-unknown", action="store_true", help="leave out flags that this server does not have")
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    scenario = SCENARIOS.get(arguments.model, SCENARIOS["M"])
    workload = await make_workload(arguments, model, scenario)
    told = {key: value for key, value in asdict(workload).items() if key not in ("arrivals", "functions")}
    told |= {
        "trace": arguments.trace or scenario.trace,
        "length_scale": str(arguments.length_scale or scenario.length_scale),
        "requests": len(workload.arrivals),
        "functions": len(workload.functions),
        "active_functions": len(Counter(each.model for each in workload.arrivals)),
        "prompt_tokens_mean": statistics.fmean(each.prompt_tokens for each in workload.arrivals),
        "output_tokens_mean": statistics.fmean(each.output_tokens for each in workload.arrivals),
        "keep_alive_s": [each / workload.compress for each in KEEP_ALIVE_S],
        "memory_mb": arguments.memory_mb or scenario.memory_mb,
        "slo_s": scenario.slo_s,
        "deadline_s": scenario.deadline_s,
        "formula": f"cost = GB-seconds * {arguments.price_gb_second:g} + device-seconds * "
        f"{arguments.price_device_second:g} (illustrative)",
    }
    print(f"workload: {told}", file=sys.stderr, flush=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(arguments.rounds):
        for system in SYSTEMS if arguments.all else arguments.systems:
            print(f"{system}, round {round_ + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            numbers = await run(system, model, workload, scenario, arguments)
            runs.setdefault(system, []).append(numbers)
            report("serverless run", model=model.name, system=system, round=round_, workload=told, **numbers)
    report(
        "serverless",
        model=model.name,
        workload=told,
        valid=all(numbers["valid"] for each in runs.values() for numbers in each),
        **compared(runs),
        ttft_mean_s={s: spread([numbers["ttft_s"]["mean"] for numbers in each]) for s, each in runs.items()},
        bar="mean TTFT at least 86 % below private, cost at least 89 % below (the paper's best cases, on GPUs)",
    )


if __name__ == "__main__":
    asyncio.run(main())
