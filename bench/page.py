"""What the live page costs: first paint in a real browser, its weight, and the size and CPU time of one /live.

    python bench/page.py --functions 1000

The server is the real HTTP layer in this process, over a backend that has so many functions and an hour of history.
The browser is Debian's chromium through playwright; without it `first_paint_ms` is null. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from harness import setup

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' backend

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.history import BUCKET_S, NUM_BUCKETS, History
from serverlesslora.gateway.live import LivePage
from serverlesslora.gateway.live_state import LiveFunction, LiveState, LiveWorker
from serverlesslora.gateway.page_files import PAGE_PATHS
from tests.backend_fake import FakeBackend
from tests.server import running

CHROMIUM = Path("/usr/bin/chromium")
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


class Many(FakeBackend):
    def __init__(self, functions: int) -> None:
        super().__init__()
        names = [f"customer-{number:05d}" for number in range(functions)]
        self._state = LiveState(
            tuple(LiveFunction(name, "demo", f"demo/tenant:{name}", tenant=name) for name in names),
            tuple(LiveWorker(name, f"demo/tenant:{name}", "demo", "cpu", "serving") for name in names[:50]),
        )

    def live(self) -> LiveState:
        return self._state


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def an_hour(functions: int) -> History:
    clock, rng = Clock(), random.Random(0)
    history = History(clock=clock)
    for bucket in range(NUM_BUCKETS):
        clock.now = bucket * BUCKET_S
        for _ in range(20):
            name = f"customer-{rng.randrange(functions):05d}"
            history.first_token((name, name), rng.lognormvariate(-3, 1))
            history.ended((name, name), tokens=20, failed=False)
            history.cost((name, name), 1e-5)
    return history


def first_paints(url: str, rounds: int) -> list[float]:
    from playwright.sync_api import sync_playwright

    paints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for _ in range(rounds):
            context = browser.new_context()  # nothing cached
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#connection[data-state=live]")
            paints.append(float(page.evaluate(PAINT)))
            context.close()
        browser.close()
    return paints


def measure(functions: int, rounds: int) -> dict[str, Any]:
    backend = Many(functions)
    calls = 20
    live = LivePage(backend, an_hour(functions))
    document = msgspec.json.encode(live.document(None))
    began = time.process_time()
    for _ in range(calls):
        msgspec.json.encode(live.document(None))  # what `encoded` keeps for half a second
    cpu_ms = (time.process_time() - began) / calls * 1000
    with running(create_app(backend)) as url:
        weight = sum(len(httpx.get(url + path).content) for path in PAGE_PATHS)
        paints = first_paints(url, rounds) if CHROMIUM.exists() else []
    return {
        "bench": "page",
        "first_paint_ms": round(statistics.median(paints), 1) if paints else None,
        "first_paint_rounds": len(paints),
        "page_bytes": weight,
        "page_files": len(PAGE_PATHS),
        "live_bytes": len(document),
        "live_cpu_ms": round(cpu_ms, 3),
        "functions": functions,
        "setup": setup(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(json.dumps(measure(options.functions, options.rounds), indent=2))
