"""Single-stream decode, base and with one adapter, against a bare transformers loop in the same run.

    python bench/decode.py [--shape M] [--rounds 5] [--tokens 32]

The loop is what a user writes first: `model(ids, past_key_values=cache)` token by token, without HTTP. Ours is measured
by an HTTP client, streaming included. Rounds are interleaved, and only one side computes at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

from harness import MODELS, Client, report, require_models, server, spread


def transformers_loop(model_dir: str, threads: int, pipe: Connection) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        prompt, tokens = job
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            logits = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits
            stamps = []
            for _ in range(tokens):
                token = logits[:, -1].argmax(-1, keepdim=True)
                stamps.append(time.perf_counter())
                logits = model(token, past_key_values=cache, use_cache=True).logits
        pipe.send([after - before for before, after in itertools.pairwise(stamps)])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = require_models(arguments.shape)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    loop = multiprocessing.get_context("spawn").Process(
        target=transformers_loop, args=(str(model), arguments.threads, theirs), daemon=True
    )
    loop.start()
    assert ours.recv() == "ready"
    times: dict[str, list[float]] = {"transformers": [], "base": [], "adapter": []}
    adapter = MODELS / f"{arguments.shape}-lora" / "a00"
    with server(f"base={model}", "--adapter", f"t/a00={adapter}", "--threads", str(arguments.threads)) as running:
        async with Client(running.url) as client:
            for name in ("base", "a00"):
                await client.complete(name, client.prompt(arguments.prompt), tokens=4)
            for _ in range(arguments.rounds):
                ours.send((client.prompt(arguments.prompt), arguments.tokens))
                times["transformers"].append(statistics.median(ours.recv()))
                for name, key in (("base", "base"), ("a00", "adapter")):
                    done = await client.complete(name, client.prompt(arguments.prompt), tokens=arguments.tokens)
                    times[key].append(statistics.median(done.gaps))
    ours.send(None)
    medians = {key: statistics.median(values) for key, values in times.items()}
    report(
        "decode",
        shape=arguments.shape,
        milliseconds={
            key: {k: v if k == "n" else 1000 * v for k, v in spread(values).items()} for key, values in times.items()
        },
        ratio_base=medians["base"] / medians["transformers"],
        ratio_adapter=medians["adapter"] / medians["transformers"],
        bar="both ratios <= 0.80",
    )


if __name__ == "__main__":
    asyncio.run(main())
