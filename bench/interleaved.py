"""Correctness under interleaving: concurrent greedy requests over base and 16 adapters, each equal to its solo run.

    python bench/interleaved.py [--shape S] [--requests 64] [--seeds 0 1 2]

float32, `--isolation shared`, so that one worker mixes every adapter and the base in its steps. A wrong adapter, a
stale or shared KV block, or a row mixed up in the batch shows as a different token.
"""

from __future__ import annotations

import argparse
import asyncio
import random

from harness import MODELS, Client, report, require_models, server


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--isolation", default="shared")
    arguments = parser.parse_args()
    model = require_models(arguments.shape)
    flags = [f"base={model}", "--dtype", "float32", "--isolation", arguments.isolation, "--kv-memory-mb", "2048"]
    names = ["base"]
    for i in range(16):
        flags += ["--adapter", f"a{i:02d}={MODELS / f'{arguments.shape}-lora' / f'a{i:02d}'}"]
        names.append(f"a{i:02d}")
    wrong: list[dict[str, object]] = []
    outputs: set[str] = set()
    with server(*flags) as running:
        for seed in arguments.seeds:
            rng = random.Random(seed)
            async with Client(running.url, seed=seed) as client:
                # Few distinct prompts, so that adapters meet the same prefix and would show a shared cache.
                prompts = [client.prompt(rng.randrange(4, 200)) for _ in range(8)]
                jobs = [(rng.choice(names), rng.choice(prompts)) for _ in range(arguments.requests)]

                async def ask(job: tuple[str, list[int]], client: Client = client) -> tuple[int, ...]:
                    done = await client.complete(job[0], job[1], tokens=arguments.tokens, return_token_ids=True)
                    return done.token_ids

                solo = [await ask(job) for job in jobs]
                together = await asyncio.gather(*map(ask, jobs))
                for job, alone, mixed in zip(jobs, solo, together, strict=True):
                    outputs.add(str(alone))
                    if alone != mixed:
                        wrong.append({"seed": seed, "model": job[0], "alone": alone, "together": mixed})
    report(
        "interleaved",
        shape=arguments.shape,
        requests=arguments.requests * len(arguments.seeds),
        distinct_outputs=len(outputs),
        different=len(wrong),
        first_differences=wrong[:3],
        bar="different == 0",
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    asyncio.run(main())
