"""Scale to zero and back: one start however many ask, nothing lost during tear-down, domains kept apart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serverlesslora.demo import TASKS, adapter_paths
from tests.live import Live, live
from tests.server import wait_until

IDLE_S = 0.4


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    paths = adapter_paths()
    tenants = [f"acme/acme-{name}={paths[name]}" for name in ("upper", "reverse")]
    flags = [flag for each in tenants for flag in ("--adapter", each)]
    with live("--demo", *flags, "--idle-timeout", str(IDLE_S)) as running:
        yield running


async def ask(client: httpx.AsyncClient, url: str, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    answer = await client.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def test_functions_answer_as_themselves(server: Live) -> None:
    for name in ("upper", "reverse", "rot13"):
        assert server.answer(name, "hello world") == TASKS[name]("hello world")
    assert server.answer("demo", "hello world") == "hello world"


def test_a_hundred_requests_to_a_cold_function_are_one_start(server: Live) -> None:
    wait_until(lambda: "function:rot13" not in server.workers())
    seen: set[str] = set()

    async def herd() -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            requests = [asyncio.ensure_future(ask(client, server.url, "rot13", "abc")) for _ in range(100)]
            while not all(request.done() for request in requests):
                state = (await client.get(f"{server.admin}/admin/state")).json()
                seen.update(w["worker_id"] for w in state["workers"] if w["domain"].endswith("function:rot13"))
                await asyncio.sleep(0.01)
            assert {request.result() for request in requests} == {"nop"}

    asyncio.run(herd())
    assert len(seen) == 1


def test_requests_around_the_tear_down_are_all_served(server: Live) -> None:
    async def taps() -> set[str]:
        answers = set()
        async with httpx.AsyncClient(timeout=60) as client:
            for i in range(40):
                answers.add(await ask(client, server.url, "upper", "ab"))
                # Gaps on both sides of the idle timeout; the reaper looks every quarter of it.
                await asyncio.sleep(IDLE_S * (0.8 + 0.02 * (i % 30)))
        return answers

    assert asyncio.run(taps()) == {"AB"}


def test_domains_and_tenants(server: Live) -> None:
    server.answer("acme-upper", "a")
    server.answer("acme-reverse", "ab")
    server.answer("upper", "a")
    workers = server.workers()
    assert len(workers["tenant:acme"]["adapters"]) == 2
    assert workers["tenant:acme"]["pid"] != workers["function:upper"]["pid"]


def test_an_idle_domain_falls_to_zero_and_says_which_rung_it_met(server: Live) -> None:
    server.answer("reverse", "abc")
    assert server.chat("reverse", "abc").headers["x-serverlesslora-cold"].startswith("hot")
    wait_until(lambda: "function:reverse" not in server.workers())
    answer = server.chat("reverse", "abc")
    assert answer.headers["x-serverlesslora-cold"].startswith("worker;dur=")
    assert answer.headers["x-serverlesslora-adapter"] == next(
        f["digest"] for f in server.state()["functions"] if f["name"] == "reverse"
    )


def test_redeploying_a_name_answers_with_the_new_weights_at_once(server: Live) -> None:
    paths = adapter_paths()
    assert server.deploy("swap", paths["upper"]).status_code == 201
    for _ in range(5):
        for task in ("upper", "reverse"):
            # The same prompt each time: its prefix is warm under the name, and must not be found under the new digest.
            assert server.deploy("swap", paths[task], replace=True).status_code == 201
            assert server.answer("swap", "Cold start") == TASKS[task]("Cold start")
            assert server.answer("swap", "Cold start") == TASKS[task]("Cold start")
    assert server.deploy("swap", paths["upper"]).status_code == 400


def field_mb(path: str, name: str) -> float:
    """A field of a /proc file that counts kilobytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def pss_mb(pids: set[int]) -> float:
    """Proportional memory of the processes: a page shared by n of them counts 1/n in each."""
    return sum(field_mb(f"/proc/{pid}/smaps_rollup", "Pss") for pid in pids)


def test_more_workers_do_not_mean_more_copies(tmp_path: Path) -> None:
    names = ["upper", "rot13", "leet", "reverse"]
    with live("--demo") as server:
        totals = []
        for name in names:
            server.answer(name, "hello world")
            totals.append(pss_mb(server.pids()))
        assert len({worker["pid"] for worker in server.workers().values()}) == len(names)
        # Libraries and weights of one process are far more than what each further worker may add.
        assert (totals[-1] - totals[0]) / (len(names) - 1) < 120


def test_the_gateway_stays_small(server: Live) -> None:
    server.answer("upper", "hello world")
    assert field_mb(f"/proc/{server.process.pid}/status", "VmRSS") < 120
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
