"""What one more worker costs: proportional memory of all processes as domains are added.

    python bench/memory.py [--shape M] [--workers 8]

Each worker has answered one request and is idle when it is counted. PSS splits shared pages among their users, so the
sum over all processes counts the backbone once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
from pathlib import Path

from harness import MODELS, Client, admin_get, pss_mb, report, require_models, server


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M")
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    model = require_models(arguments.shape)
    flags = [f"base={model}"]
    for i in range(arguments.workers):
        flags += ["--adapter", f"f{i}={MODELS / f'{arguments.shape}-lora' / f'a{i:02d}'}"]
    with server(*flags) as running:
        async with Client(running.url) as client:
            await asyncio.sleep(3.0)  # the spare worker has been rehearsed by then
            totals = [pss_mb(running.pid)]
            for i in range(arguments.workers):
                await client.complete(f"f{i}", client.prompt(128), tokens=8)
                await asyncio.sleep(2.5)  # ... and so has the one that took its place
                totals.append(pss_mb(running.pid))
            state = admin_get(running, "/admin/state")
            adapter_mb = state["functions"][0]["size_bytes"] / 2**20
            steps = [after - before for before, after in itertools.pairwise(totals)]
            report(
                "memory",
                shape=arguments.shape,
                backbone_mb=state["backbones"][0]["size_bytes"] / 2**20,
                adapter_mb=adapter_mb,
                no_worker_pss_mb=totals[0],
                pss_mb=totals[1:],
                per_extra_worker_mb={"median": statistics.median(steps), "max": max(steps)},
                gateway_rss_mb=rss_mb(running.pid),
                bar=f"per extra worker <= adapter + 120 = {adapter_mb + 120:.0f} MB; gateway <= 120 MB",
            )


if __name__ == "__main__":
    asyncio.run(main())
