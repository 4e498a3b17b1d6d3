"""The cold-start ladder: first token of a 32-token prompt on every rung, against the warm first token.

    python bench/cold.py [--shape M] [--rounds 10]

hot: worker alive, adapter loaded. adapter-disk: worker alive, adapter only in the store. worker: the domain at zero.
Also the start of the whole server with the embedded demo, from exec to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import aiohttp
from harness import MODELS, Client, admin_get, report, require_models, server, spread

IDLE_S = 1.0


async def until_at_zero(running, domain: str) -> None:  # type: ignore[no-untyped-def]
    while any(worker["domain"].endswith(domain) for worker in admin_get(running, "/admin/state")["workers"]):
        await asyncio.sleep(0.05)


async def ladder(shape: str, rounds: int, warm_pool: int, settle_s: float) -> dict[str, list[float]]:
    model = require_models(shape)
    lora = MODELS / f"{shape}-lora"
    times: dict[str, list[float]] = {"hot": [], "adapter-disk": [], "worker": []}
    # `stay` keeps the tenant's worker busy enough to live; `lone` is a domain of its own that falls to zero.
    flags = (f"base={model}", "--adapter", f"t/stay={lora / 'a00'}", "--adapter", f"lone={lora / 'a01'}")
    with server(*flags, "--idle-timeout", str(IDLE_S), "--warm-pool", str(warm_pool)) as running:
        async with Client(running.url) as client, aiohttp.ClientSession() as session:
            for round_ in range(rounds):
                await until_at_zero(running, "function:lone")
                await asyncio.sleep(settle_s)  # a request after a pause, as cold ones are
                done = await client.complete("lone", client.prompt(32), tokens=1)
                assert done.cold.startswith("worker"), done.cold
                times["worker"].append(done.ttft)
                for _ in range(2):
                    done = await client.complete("lone", client.prompt(32), tokens=1)
                    assert done.cold.startswith("hot"), done.cold
                times["hot"].append(done.ttft)
                fresh = f"fresh{round_}"
                body = {"name": fresh, "adapter": str(lora / f"a{2 + round_ % 14:02d}"), "tenant": "t"}
                async with session.post(f"{running.admin}/admin/functions", json={"function": body}) as answer:
                    assert answer.status == 201, await answer.text()
                await client.complete("stay", client.prompt(32), tokens=1)
                done = await client.complete(fresh, client.prompt(32), tokens=1)
                # A digest that an earlier round loaded is not on disk only any more.
                if done.cold.startswith("adapter-disk"):
                    times["adapter-disk"].append(done.ttft)
                async with session.delete(f"{running.admin}/admin/functions/{fresh}") as answer:
                    assert answer.status == 204
    return times


async def demo_start() -> float:
    with server(wait=False) as running:
        async with Client(running.url) as client:
            while True:
                try:
                    await client.complete("upper", "hello", tokens=1)
                    return time.perf_counter() - running.started_at
                except (RuntimeError, aiohttp.ClientError):
                    await asyncio.sleep(0.02)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--warm-pool", type=int, default=1, help="spare workers kept warm [1]; 0 measures the bare fork"
    )
    parser.add_argument("--settle", type=float, default=3.0, help="pause before each cold request, seconds [3]")
    arguments = parser.parse_args()
    times = await ladder(arguments.shape, arguments.rounds, arguments.warm_pool, arguments.settle)
    hot = statistics.median(times["hot"])
    starts = [await demo_start() for _ in range(3)]
    report(
        "cold",
        shape=arguments.shape,
        warm_pool=arguments.warm_pool,
        settle_s=arguments.settle,
        milliseconds={
            rung: {k: v if k == "n" else 1000 * v for k, v in spread(v).items()} for rung, v in times.items()
        },
        over_hot_ms={rung: 1000 * (statistics.median(v) - hot) for rung, v in times.items() if rung != "hot"},
        demo_start_to_first_token_s=spread(starts),
        bar="worker <= +150 ms, adapter-disk <= +60 ms, demo start <= 8 s",
    )


if __name__ == "__main__":
    asyncio.run(main())
