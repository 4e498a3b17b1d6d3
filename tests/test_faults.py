"""Any process may be killed at any time: what is lost is visible and belongs to it alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from serverlesslora.demo import TASKS
from tests.live import Live, live
from tests.server import wait_until

TEXT = "the quick brown fox"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("--demo") as running:
        yield running


class Broken(Exception):
    """The stream ended with an error event."""


async def stream(client: httpx.AsyncClient, url: str, model: str, *, tokens: int = 400) -> AsyncIterator[str]:
    """Pieces of a long completion; min_tokens keeps it going."""
    body = {"model": model, "prompt": TEXT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Broken(event["error"]["code"])
            yield event["choices"][0]["text"]


async def run_to_end(client: httpx.AsyncClient, url: str, model: str) -> str:
    return "".join([piece async for piece in stream(client, url, model)])


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))


async def kill_during(server: Live, pid: int, victim: str, others: list[str]) -> tuple[list[str], str]:
    """Kill `pid` once the victim's stream runs. Returns what the others said, and how the victim's stream ended."""
    async with client() as http:
        running = [asyncio.ensure_future(run_to_end(http, server.url, model)) for model in others]
        ending = "finished"
        count = 0
        try:
            async for _ in stream(http, server.url, victim):
                count += 1
                if count == 5:
                    os.kill(pid, signal.SIGKILL)
        except Broken as error:
            ending = str(error)
        return list(await asyncio.gather(*running)), ending


def test_a_killed_worker_fails_its_own_requests_and_no_others(server: Live) -> None:
    async def alone() -> list[str]:
        async with client() as http:
            return [await run_to_end(http, server.url, model) for model in ("reverse", "demo")]

    golden = asyncio.run(alone())
    for _ in range(3):
        server.answer("upper", "a")
        said, ending = asyncio.run(
            kill_during(server, server.workers()["function:upper"]["pid"], "upper", ["reverse", "demo"])
        )
        assert ending == "worker_lost"
        assert said == golden
        assert server.answer("upper", TEXT) == TASKS["upper"](TEXT)


def test_requests_not_yet_started_are_retried_on_a_new_worker(server: Live) -> None:
    server.answer("rot13", "a")
    pid = server.workers()["function:rot13"]["pid"]
    os.kill(pid, signal.SIGSTOP)  # nothing it is sent will start

    async def ask() -> str:
        async with client() as http:
            body = {"model": "rot13", "messages": [{"role": "user", "content": "abc"}], "temperature": 0}
            answer = asyncio.ensure_future(http.post(f"{server.url}/v1/chat/completions", json=body))
            while server.workers()["function:rot13"]["open_requests"] == 0:
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            content: str = (await answer).json()["choices"][0]["message"]["content"]
            return content

    assert asyncio.run(ask()) == "nop"


@pytest.mark.parametrize("role", ["launcher_pid", "host_pid"])
def test_launcher_and_host_are_replaced_unnoticed(server: Live, role: str) -> None:
    before = server.backbone()
    _, ending = asyncio.run(kill_during(server, before[role], "upper", ["reverse"]))
    assert ending == "finished"
    wait_until(
        lambda: server.backbone()["state"] == "ready" and server.backbone()[role] not in (None, before[role]), 60
    )
    # What the gateway remembers proves nothing: the new host reads the memory it holds.
    verified = httpx.post(f"{server.admin}/admin/verify/demo", timeout=10).json()
    assert verified == {"content_digest": before["content_digest"], "intact": True}
    assert server.answer("leet", "hello world") == TASKS["leet"]("hello world")


def test_an_aborted_stream_frees_its_place_at_once(server: Live) -> None:
    async def leave_early() -> None:
        async with client() as http:
            async for _ in stream(http, server.url, "upper", tokens=1500):
                return

    asyncio.run(leave_early())
    wait_until(lambda: server.workers()["function:upper"]["open_requests"] == 0, 2)
    wait_until(lambda: server.workers()["function:upper"]["stats"]["running"] == 0, 2)


def test_a_worker_that_hangs_is_killed_and_frees_the_others() -> None:
    with live("--demo", "--stall-timeout", "3") as server:
        server.answer("upper", "a")
        server.answer("reverse", "ab")

        async def hang() -> str:
            async with client() as http:
                count = 0
                try:
                    async for _ in stream(http, server.url, "upper", tokens=1500):
                        count += 1
                        if count == 5:
                            os.kill(server.workers()["function:upper"]["pid"], signal.SIGSTOP)
                except Broken as error:
                    return str(error)
                return "finished"

        assert asyncio.run(hang()) == "worker_lost"
        assert server.answer("reverse", "hello world") == TASKS["reverse"]("hello world")
        assert server.answer("upper", "hello world") == TASKS["upper"]("hello world")


def test_a_signal_during_start_up_is_a_clean_exit() -> None:
    command = [sys.executable, "-m", "serverlesslora", "serve", "--port", "0", "--admin-port", "-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        wait_until(lambda: len(Live("", "", process, Path()).pids()) >= 3, 30)
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert b"Traceback" not in output


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def memfd_holders() -> set[str]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("/memfd:") and "serverlesslora" in target:
            found.add(link.parts[2])
    return found


@pytest.mark.parametrize("round_", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 20))])
def test_kill_everything_leaves_nothing_behind(round_: int) -> None:
    shm, holders = shared_memory(), memfd_holders()
    with live("--demo") as server:
        server.answer("upper", "a")
        pids = server.pids()
        assert len(pids) >= 4, "gateway, host, launcher, worker"
        if round_ % 2:
            os.kill(server.process.pid, signal.SIGKILL)  # the gateway alone: the others must follow it
        else:
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        wait_until(lambda: not server.pids(), 5)
        leftovers = set(os.listdir(server.log.parent)) - {"log", "state"}
    assert leftovers == set()
    assert shared_memory() == shm
    assert memfd_holders() <= holders


def test_sigterm_lets_running_streams_finish_and_exits_zero() -> None:
    with live("--demo") as server:
        server.answer("upper", "a")

        async def finish() -> str:
            async with client() as http:
                pieces: list[str] = []
                async for piece in stream(http, server.url, "upper"):
                    if not pieces:
                        server.process.terminate()
                    pieces.append(piece)
                return "".join(pieces)

        assert len(asyncio.run(finish())) > 100
        assert server.process.wait(10) == 0
        wait_until(lambda: not server.pids(), 5)
