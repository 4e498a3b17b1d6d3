"""More than it can do: what is still answered in time at half, once, twice and five times the capacity.

    python bench/overload.py [--model demo] [--domains 8 | --one-domain] [--seconds 40]

Capacity is measured first: requests answered per second with `--streams` clients that each wait for their answer. Then
requests come open loop, as a Poisson process. Goodput is what was answered within the objective for its first token,
per second; it should not fall when more is offered. What is shed must say when to come back. The last offer is made
twice: memory must not be more after the second time than after the first.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

from harness import lines_of, report
from meter import Meter, metered, sample
from replay import Arrival, HttpSender, Outcome, Replay, percentile, poisson, replay, summary
from serving import Deployed, deployment, find_model, function_names

FACTORS = (0.5, 1.0, 2.0, 5.0)
RETRY_AFTER = range(1, 61)
SHAPES = {"M": (32, 8), "demo": (64, 64)}
REST_S = 3.0  # between two offers, so that the queues of one are not the start of the next


async def closed_loop(
    send: HttpSender, functions: Sequence[str], shape: tuple[int, int], streams: int, seconds: float
) -> float:
    """Requests answered per second with so many clients, each on its functions in turn; the first third is not counted,
    in which the batches fill."""
    answered = 0
    began = time.monotonic()
    counts_from, end = began + seconds / 3, began + seconds

    async def client(number: int) -> None:
        nonlocal answered
        for turn in itertools.count(number):
            if time.monotonic() >= end:
                return
            done = await send(Arrival(0.0, functions[turn % len(functions)], *shape), time.monotonic())
            answered += done.is_answered and counts_from <= time.monotonic() < end

    await asyncio.gather(*(client(number) for number in range(streams)))
    return answered / (end - counts_from)


def resident_mb(pid: int) -> float:
    return next(int(line.split()[1]) for line in lines_of(f"/proc/{pid}/status") if line.startswith("VmRSS:")) / 1024


def bad_retry_after(outcomes: Sequence[Outcome]) -> list[str | None]:
    """The Retry-After of sheds that is no whole number of seconds from 1 to 60."""
    return [
        each.retry_after
        for each in outcomes
        if each.is_shed
        and not (each.retry_after and each.retry_after.isdigit() and int(each.retry_after) in RETRY_AFTER)
    ]


def stage(done: Replay, *, slo_s: float, seconds: float) -> dict[str, Any]:
    in_time = sum(each.is_answered and (each.ttft_s or slo_s + 1) <= slo_s for each in done.outcomes)
    shed_s = [each.e2e_s for each in done.outcomes if each.is_shed and each.e2e_s is not None]
    wrong = bad_retry_after(done.outcomes)
    return {
        "goodput": in_time / seconds,
        "shed_after_p99_s": percentile(shed_s, 99) if shed_s else None,
        "retry_after": sorted({each.retry_after or "none" for each in done.outcomes if each.is_shed}),
        "wrong_retry_after": len(wrong),
        "drained_s": max(0.0, done.ended_at - done.began_at - seconds),
        **summary(done, slo_s=slo_s),
    }


async def offer(deployed: Deployed, send: HttpSender, rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    shape = (arguments.prompt, arguments.tokens)
    arrivals = poisson(rate, arguments.seconds, deployed.functions, shape, seed=round(1000 * rate))
    numbers = stage(await replay(arrivals, send), slo_s=arguments.slo, seconds=arguments.seconds)
    await asyncio.sleep(REST_S)
    pid = deployed.running.pid
    return {
        "offered": len(arrivals) / arguments.seconds,
        **numbers,
        "held_gb_after": sample(pid).held / 1e9,
        "gateway_mb_after": resident_mb(pid),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a shape written by make_models.py [demo]")
    parser.add_argument("--domains", type=int, default=8, help="functions, each a domain of its own [8]")
    parser.add_argument("--one-domain", action="store_true", help="the same functions as one tenant")
    parser.add_argument("--streams", type=int, default=128, help="clients that measure the capacity [128]")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt; default: by model")
    parser.add_argument("--tokens", type=int, help="tokens of an output; default: by model")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each offer [40]")
    parser.add_argument("--slo", type=float, default=2.5, help="objective for the first token, seconds [2.5]")
    parser.add_argument("--memory-mb", type=int, help="what the server may take; default: its own")
    # A prefix cache keeps what it has until it is full; only a full one shows whether anything else grows.
    parser.add_argument("--kv-memory-mb", type=int, default=64, help="of each worker [64]")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="of the capacity [0.5 1 2 5]")
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    shape = SHAPES.get(arguments.model, SHAPES["M"])
    arguments.prompt, arguments.tokens = arguments.prompt or shape[0], arguments.tokens or shape[1]
    shape = (arguments.prompt, arguments.tokens)
    functions = function_names(arguments.domains)
    tenants = dict.fromkeys(functions, "all") if arguments.one_domain else None
    settings: dict[str, str | float] = {
        "slo-ttft": arguments.slo,
        "keep-alive-max": 600.0,
        "kv-memory-mb": arguments.kv_memory_mb,
    }
    if arguments.memory_mb:
        settings["memory-mb"] = arguments.memory_mb
    with deployment(model, functions, settings, tenants=tenants) as deployed, metered(deployed.running.pid) as meter:
        # Warm: every worker is there, and nothing is refused while it starts.
        async with HttpSender(deployed.running.url, token_ids=model.token_ids, slo_s=60.0) as patient:
            await closed_loop(patient, functions, shape, len(functions), 5.0)
            capacity = await closed_loop(patient, functions, shape, arguments.streams, 0.75 * arguments.seconds)
        if not capacity:
            raise SystemExit("no request was answered while the capacity was measured")
        print(f"capacity: {capacity:.2f} requests/s", file=sys.stderr, flush=True)
        await asyncio.sleep(REST_S)
        before = {"held_gb": sample(deployed.running.pid).held / 1e9, "gateway_mb": resident_mb(deployed.running.pid)}
        stages = {}
        async with HttpSender(deployed.running.url, token_ids=model.token_ids, seed=1) as send:
            last = arguments.factors[-1]
            for name, factor in [*((f"{each:g}x", each) for each in arguments.factors), (f"{last:g}x again", last)]:
                numbers = stages[name] = await offer(deployed, send, factor * capacity, arguments)
                line = f"{numbers['goodput']:.2f}/s in time, {numbers['shed']} shed, {numbers['failed']} failed"
                print(f"{name}: {numbers['offered']:.2f}/s offered, {line}", file=sys.stderr, flush=True)
        summarise(arguments, deployed, meter, capacity, before, stages)


def summarise(
    arguments: argparse.Namespace,
    deployed: Deployed,
    meter: Meter,
    capacity: float,
    before: dict[str, float],
    stages: dict[str, dict[str, Any]],
) -> None:
    peak = max(numbers["goodput"] for numbers in stages.values())
    first, again = list(stages.values())[-2:]
    report(
        "overload",
        model=deployed.model.name,
        domains=1 if arguments.one_domain else arguments.domains,
        prompt=arguments.prompt,
        output=arguments.tokens,
        slo_ttft_s=arguments.slo,
        capacity_per_s=capacity,
        capacity_streams=arguments.streams,
        goodput_per_s={name: numbers["goodput"] for name, numbers in stages.items()},
        goodput_over_peak={name: numbers["goodput"] / peak if peak else None for name, numbers in stages.items()},
        valid=all(numbers["valid"] for numbers in stages.values()),
        wrong_retry_after=sum(numbers["wrong_retry_after"] for numbers in stages.values()),
        failed=sum(numbers["failed"] for numbers in stages.values()),
        held_growth_mb=1e3 * (again["held_gb_after"] - first["held_gb_after"]),
        gateway_growth_mb=again["gateway_mb_after"] - first["gateway_mb_after"],
        before=before,
        peak_gb=meter.peak_gb(0.0, time.monotonic()),
        stages=stages,
        server=deployed.settings,
        unknown_flags=deployed.unknown,
        bar="goodput at 5x >= 0.9 of its peak; every Retry-After in 1..60; nothing failed; memory does not grow",
    )


if __name__ == "__main__":
    asyncio.run(main())
