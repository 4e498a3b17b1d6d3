"""A quiet tenant beside one that floods: how long the quiet one waits for its first token, alone and then not alone.

    python bench/fairness.py [--model demo] [--flood-streams 64 | --flood-rate 50] [--seconds 100]

Twice: with a domain for each (the two take turns on the cores), and in one shared domain (the two are in one batch and
one queue). The quiet tenant asks at `--rate`, open loop, as a Poisson process with the same times in every case.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from harness import report
from replay import Arrival, HttpSender, poisson, replay, summary
from serving import Deployed, Settings, deployment, find_model

QUIET, LOUD = "quiet", "loud"
SETUPS: dict[str, Settings] = {"separate": {}, "shared": {"isolation": "shared"}}
SHAPES = {"M": ((32, 8), (64, 32)), "demo": ((32, 16), (64, 64))}  # quiet, loud: tokens in, tokens out
FLOOD_AHEAD_S = 5.0  # the flood stands before the first quiet request comes


@contextlib.asynccontextmanager
async def flood(
    deployed: Deployed, arguments: argparse.Namespace, shape: tuple[int, int]
) -> AsyncIterator[Counter[str]]:
    """Requests of the loud tenant until the block ends; counts what became of them."""
    count: Counter[str] = Counter()
    token_ids = deployed.model.token_ids

    async with HttpSender(deployed.running.url, token_ids=token_ids, slo_s=arguments.flood_slo, seed=2) as send:

        async def one() -> None:
            done = await send(Arrival(0.0, LOUD, *shape), time.monotonic())
            count["answered" if done.is_answered else "shed" if done.is_shed else "failed"] += 1
            if not done.is_answered:  # a client that comes back at once, without burning the cores itself
                await asyncio.sleep(0.05)

        async def stream() -> None:
            while True:
                await one()

        async def at_rate() -> None:
            async with asyncio.TaskGroup() as group:
                began = time.monotonic()
                for number in itertools.count():
                    await asyncio.sleep(max(0.0, began + number / arguments.flood_rate - time.monotonic()))
                    group.create_task(one())

        sources = [at_rate] if arguments.flood_rate else [stream] * arguments.flood_streams
        tasks = [asyncio.create_task(source()) for source in sources]
        try:
            await asyncio.sleep(FLOOD_AHEAD_S)
            yield count
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def measure(setup: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = find_model(arguments.model)
    quiet_shape, loud_shape = SHAPES.get(arguments.model, SHAPES["M"])
    settings = {**SETUPS[setup], "slo-ttft": arguments.slo, "keep-alive-max": 600.0}
    tenants = {QUIET: "t-quiet", LOUD: "t-loud"}
    arrivals = poisson(arguments.rate, arguments.seconds, [QUIET], quiet_shape, seed=3)
    with deployment(model, [QUIET, LOUD], settings, tenants=tenants) as deployed:
        async with HttpSender(deployed.running.url, token_ids=model.token_ids) as send:
            for name in (QUIET, LOUD) * 2:  # both workers are there and both adapters loaded
                await send(Arrival(0.0, name, *quiet_shape), time.monotonic())
            alone = await replay(arrivals, send)
            async with flood(deployed, arguments, loud_shape) as count:
                beside = await replay(arrivals, send)
        numbers = {"alone": summary(alone, slo_s=arguments.slo), "beside": summary(beside, slo_s=arguments.slo)}
        ratio = {each: numbers["beside"]["ttft_s"][each] / numbers["alone"]["ttft_s"][each] for each in ("p50", "p99")}
        print(f"{setup}: first token of the quiet one {ratio} of what it is alone", file=sys.stderr, flush=True)
        return {
            **numbers,
            "ttft_ratio": ratio,
            "loud": dict(count),
            "loud_per_s": count["answered"] / (FLOOD_AHEAD_S + arguments.seconds),
            "server": deployed.settings,
            "unknown_flags": deployed.unknown,
        }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a shape written by make_models.py [demo]")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS), metavar="SETUP")
    parser.add_argument("--rate", type=float, default=1.0, help="of the quiet tenant, requests/s [1]")
    parser.add_argument("--seconds", type=float, default=100.0, help="of each case [100]")
    parser.add_argument(
        "--flood-streams", type=int, default=64, help="clients of the loud tenant that never pause [64]"
    )
    parser.add_argument("--flood-rate", type=float, help="instead: so many requests/s, whatever becomes of them")
    parser.add_argument("--slo", type=float, default=10.0, help="objective for the first token, seconds [10]")
    parser.add_argument(
        "--flood-slo",
        type=float,
        default=60.0,
        help="what the loud tenant asks for: patient, so its queue is long [60]",
    )
    arguments = parser.parse_args()
    setups = {setup: await measure(setup, arguments) for setup in arguments.setups}
    report(
        "fairness",
        model=arguments.model,
        rate=arguments.rate,
        flood=f"{arguments.flood_rate:g} requests/s" if arguments.flood_rate else f"{arguments.flood_streams} streams",
        shapes={
            "quiet": SHAPES.get(arguments.model, SHAPES["M"])[0],
            "loud": SHAPES.get(arguments.model, SHAPES["M"])[1],
        },
        ttft_ratio={setup: numbers["ttft_ratio"] for setup, numbers in setups.items()},
        valid=all(numbers[case]["valid"] for numbers in setups.values() for case in ("alone", "beside")),
        setups=setups,
        bar="the quiet tenant's p99 beside the flood, over its p99 alone",
    )


if __name__ == "__main__":
    asyncio.run(main())
