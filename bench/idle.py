"""What a server costs that nobody asks anything: processor time of the gateway and of everybody else, workers alive.

    python bench/idle.py [--model demo] [--functions 24] [--seconds 60]

Every function has answered once and its worker is kept. Times are the kernel's, in nanoseconds, over all threads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from harness import report
from meter import members
from replay import Arrival, HttpSender
from serving import deployment, find_model, function_names

SETTLE_S = 20.0  # spares are rehearsed, caches given back


def cpu_ns(pid: int) -> int:
    """Time on a core of all threads that live."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return next((word for word in words if word.startswith("serverlesslora")), words[0])
    return "gone"


def spent(before: dict[int, int], after: dict[int, int], pids: Sequence[int]) -> int:
    return sum(after[pid] - before.get(pid, 0) for pid in pids)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a shape written by make_models.py [demo]")
    parser.add_argument("--functions", type=int, default=24, help="all with a living worker [24]")
    parser.add_argument("--seconds", type=float, default=60.0, help="of idleness that are measured [60]")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help=f"before that, seconds [{SETTLE_S:g}]")
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    functions = function_names(arguments.functions)
    stay = 10 * (arguments.seconds + arguments.settle)
    settings = {"keep-alive-min": stay, "keep-alive-max": 2 * stay}
    with deployment(model, functions, settings) as deployed:
        async with HttpSender(deployed.running.url, token_ids=model.token_ids) as send:
            for name in functions:
                done = await send(Arrival(0.0, name, 16, 4), time.monotonic())
                if not done.is_answered:
                    raise SystemExit(f"{name} did not answer: {done.status} {done.error}")
        await asyncio.sleep(arguments.settle)
        workers = deployed.workers()
        gateway = deployed.running.pid
        before, began = {pid: cpu_ns(pid) for pid in members(gateway)}, time.monotonic()
        await asyncio.sleep(arguments.seconds)
        after, seconds = {pid: cpu_ns(pid) for pid in members(gateway)}, time.monotonic() - began
        others = [pid for pid in after if pid != gateway]
        percent = {
            "gateway": 100 * spent(before, after, [gateway]) / 1e9 / seconds,
            "others": 100 * spent(before, after, others) / 1e9 / seconds,
        }
        busiest = sorted(others, key=lambda pid: -spent(before, after, [pid]))[:5]
        report(
            "idle",
            model=model.name,
            functions=arguments.functions,
            workers=workers,
            workers_after=deployed.workers(),
            seconds=seconds,
            percent_of_a_core=percent,
            busiest_others=[[name_of(pid), 100 * spent(before, after, [pid]) / 1e9 / seconds] for pid in busiest],
            server=deployed.settings,
            unknown_flags=deployed.unknown,
            bar="gateway <= 0.5 % of a core",
        )


if __name__ == "__main__":
    asyncio.run(main())
