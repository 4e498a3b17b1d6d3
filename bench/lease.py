"""What taking turns on the cores is worth: busy domains with the device lease and without it, in alternation.

    python bench/lease.py [--models DIR] [--shape M] [--rounds 3]

Two servers of the same model, one with SERVERLESSLORA_LEASE=off; only one has requests at a time. Three scenes:

- `one`: a burst in one domain: output tokens/s, what the device can do;
- `two`: the same burst halved over two domains, so that their steps compete;
- `light`: one domain floods (streams of long prompts that never pause), another asks something short now and then: its
  time to the first token and per output token, and what the flood gets done beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import harness
from harness import Client, Timed, report, require_models, server, spread

VARIABLE = "SERVERLESSLORA_LEASE"
FLOODS, LIGHT = ("flood", "second"), "light"


@contextlib.contextmanager
def environment(value: str | None) -> Iterator[None]:
    """For a process that is started inside."""
    before = os.environ.pop(VARIABLE, None)
    if value is not None:
        os.environ[VARIABLE] = value
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


@contextlib.asynccontextmanager
async def flood(client: Client, arguments: argparse.Namespace) -> AsyncIterator[list[tuple[float, Timed]]]:
    """Streams that never pause; lists what has ended, and when."""
    ended: list[tuple[float, Timed]] = []

    async def stream() -> None:
        while True:
            prompt = client.prompt(arguments.flood_prompt)
            done = await client.complete(FLOODS[0], prompt, tokens=arguments.flood_tokens)
            ended.append((time.perf_counter(), done))

    tasks = [asyncio.create_task(stream()) for _ in range(arguments.flood_streams)]
    try:
        yield ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def light(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    async def ask() -> Timed:
        await asyncio.sleep(arguments.pause)
        return await client.complete(LIGHT, client.prompt(arguments.light_prompt), tokens=arguments.light_tokens)

    alone = [await ask() for _ in range(3)]
    async with flood(client, arguments) as ended:
        while not ended:  # the flood stands
            await asyncio.sleep(0.05)
        began = time.perf_counter()
        beside = [await ask() for _ in range(arguments.requests)]
        seconds = time.perf_counter() - began
        tokens = sum(done.tokens for at, done in ended if at > began)
    return {
        "ttft_s": [one.ttft for one in beside],
        "tpot_s": [one.tpot for one in beside],
        "alone_ttft_s": [one.ttft for one in alone],
        "flood_tokens_per_s": [tokens / seconds],
    }


async def scenes(client: Client, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Every number of one round, by name."""
    half = arguments.streams // 2
    shape = {"prompt": arguments.prompt, "tokens": arguments.tokens}
    one, _ = await client.burst([FLOODS[0]] * (2 * half), **shape)
    two, _ = await client.burst([*FLOODS] * half, **shape)
    return {"one_tokens_per_s": [one], "two_tokens_per_s": [two], **await light(client, arguments)}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=harness.MODELS, help="where make_models.py has written to")
    parser.add_argument("--shape", default="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8, help="of a burst [8]")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--flood-streams", type=int, default=8)
    parser.add_argument("--flood-prompt", type=int, default=256)
    parser.add_argument("--flood-tokens", type=int, default=16)
    parser.add_argument("--light-prompt", type=int, default=32)
    parser.add_argument("--light-tokens", type=int, default=8)
    parser.add_argument("--requests", type=int, default=12, help="of the light tenant in one round [12]")
    parser.add_argument("--pause", type=float, default=0.5, help="between them, seconds [0.5]")
    parser.add_argument("--server", type=shlex.split, default=["--slo-ttft", "600"], help="more flags [--slo-ttft 600]")
    arguments = parser.parse_args()
    harness.MODELS = arguments.models
    model = require_models(arguments.shape)
    flags = [f"base={model}", *arguments.server]
    for index, name in enumerate((*FLOODS, LIGHT)):
        flags += ["--adapter", f"{name}={arguments.models / f'{arguments.shape}-lora' / f'a{index:02d}'}"]
    found: dict[str, dict[str, list[float]]] = {"on": {}, "off": {}}
    async with contextlib.AsyncExitStack() as stack:
        clients: dict[str, Client] = {}
        for mode in found:
            with environment(None if mode == "on" else mode):
                running = stack.enter_context(server(*flags))
            clients[mode] = await stack.enter_async_context(Client(running.url))
            for name in (*FLOODS, LIGHT):  # workers up, adapters loaded
                await clients[mode].complete(name, clients[mode].prompt(16), tokens=2)
        for _ in range(arguments.rounds):
            for mode, client in clients.items():
                for name, values in (await scenes(client, arguments)).items():
                    found[mode].setdefault(name, []).extend(values)
    ratios = {
        name: statistics.median(found["on"][name]) / statistics.median(found["off"][name]) for name in found["on"]
    }
    report(
        "lease",
        shape=arguments.shape,
        settings={name: value for name, value in vars(arguments).items() if name not in ("models", "shape")},
        **{mode: {name: spread(values) for name, values in numbers.items()} for mode, numbers in found.items()},
        on_over_off=ratios,
        bar="two_tokens_per_s > 1, ttft_s < 1, flood_tokens_per_s not far below 1",
    )


if __name__ == "__main__":
    asyncio.run(main())
