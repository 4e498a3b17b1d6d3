"""Sixteen streams at once over HTTP: on the base, on one adapter, on sixteen adapters of one domain.

    python bench/throughput.py [--shape M] [--rounds 3] [--peer 'COMMAND with {port}' --peer-base NAME ...]

A burst of C simultaneous requests (random prompts of 128 tokens, 64 tokens out); output tokens per second of the whole
burst. A peer is any server with an OpenAI completions endpoint that is started by COMMAND; its bursts are interleaved
with ours and only one side computes at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import statistics
from collections.abc import Callable
from typing import Any

from harness import MODELS, Client, report, require_models, server, spread


def _as_transformers(arguments: argparse.Namespace) -> dict[str, Any]:
    """`transformers serve` takes text only, and lengths in a field of its own."""
    length = {"min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens, "do_sample": False}
    return {"as_text": True, "generation_config": json.dumps(length), "min_tokens": None, "ignore_eos": None}


PEER_STYLES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "transformers": _as_transformers,
    "vllm": lambda arguments: {},
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--isolated", action="store_true", help="also every adapter in a domain of its own")
    parser.add_argument("--peer", help="command line of another server; {port} is filled in")
    parser.add_argument("--peer-base", help="what the peer calls the base model")
    parser.add_argument(
        "--peer-adapters", action="store_true", help="the peer serves the adapters as a00, a01, ... too"
    )
    parser.add_argument("--peer-style", choices=PEER_STYLES, default="vllm")
    arguments = parser.parse_args()
    model = require_models(arguments.shape)
    names = [f"a{i:02d}" for i in range(arguments.streams)]
    flags: list[str] = [f"base={model}"]
    for name in names:
        path = MODELS / f"{arguments.shape}-lora" / name
        flags += ["--adapter", f"tenant/{name}={path}"]
        if arguments.isolated:
            flags += ["--adapter", f"own-{name}={path}"]
    cases = {"base": ["base"] * arguments.streams, "one": ["a00"] * arguments.streams, "mixed": names}
    if arguments.isolated:
        cases["isolated"] = [f"own-{name}" for name in names]
    rates: dict[str, list[float]] = {}
    ttft: dict[str, list[float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        running = stack.enter_context(server(*flags))
        client = await stack.enter_async_context(Client(running.url))
        peer = None
        if arguments.peer:
            other = stack.enter_context(server(command=shlex.split(arguments.peer)))
            peer = await stack.enter_async_context(Client(other.url, seed=1))
        peer_cases: dict[str, list[str]] = {}
        if peer is not None:
            peer_cases["peer_base"] = [arguments.peer_base] * arguments.streams
            if arguments.peer_adapters:
                peer_cases["peer_mixed"] = names
        for models in cases.values():  # workers up, adapters loaded
            await client.burst(models, prompt=16, tokens=2)
        for _ in range(arguments.rounds):
            for case, models in cases.items():
                rate, done = await client.burst(models, prompt=arguments.prompt, tokens=arguments.tokens)
                rates.setdefault(case, []).append(rate)
                ttft.setdefault(case, []).append(statistics.median(one.ttft for one in done))
            for case, models in peer_cases.items():
                assert peer is not None
                rate, done = await peer.burst(
                    models,
                    prompt=arguments.prompt,
                    tokens=arguments.tokens,
                    **PEER_STYLES[arguments.peer_style](arguments),
                )
                rates.setdefault(case, []).append(rate)
                ttft.setdefault(case, []).append(statistics.median(one.ttft for one in done))
    median = {case: statistics.median(values) for case, values in rates.items()}
    report(
        "throughput",
        shape=arguments.shape,
        streams=arguments.streams,
        prompt=arguments.prompt,
        output=arguments.tokens,
        tokens_per_s={case: spread(values) for case, values in rates.items()},
        ttft_p50_s={case: statistics.median(values) for case, values in ttft.items()},
        mixed_over_base=median["mixed"] / median["base"],
        base_over_peer=median["base"] / median["peer_base"] if "peer_base" in median else None,
        mixed_over_peer=median["mixed"] / median["peer_mixed"] if "peer_mixed" in median else None,
        peer=arguments.peer,
        bar="mixed/base >= 0.65; base/(transformers serve) >= 1.2; mixed/(vLLM mixed) >= 2",
    )


if __name__ == "__main__":
    asyncio.run(main())
