"""The demo on an emulated device: the real server, every process of it, and its answers; then each is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import httpx
import pytest

from serverlesslora.demo import TASKS, adapter_paths, backbone_path, completion_prompt
from serverlesslora.devices import SENTENCES
from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.cuda.emulated import DEVICE_VARIABLE, REFUSES_VARIABLE
from tests.live import Live, live
from tests.server import wait_until

TEXT = "ab"
LONGER = "hello world"
NUM_TOKENS = 8  # the interpreter needs some hundreds of milliseconds for each on a busy machine
REVERSED = TASKS["reverse"](LONGER)[:NUM_TOKENS]  # one character is one token
# Few graphs to record and no spare: one that becomes a worker is `test_launcher_device`'s.
SMALL = ("--dtype", "float32", "--max-running", "1", "--max-model-len", "96", "--kv-memory-mb", "4", "--warm-pool", "0")


@contextmanager
def own_device(name: str, refuses: str = "") -> Iterator[Driver]:
    """A device that only this test and the servers it starts see."""
    with mock.patch.dict(os.environ, {DEVICE_VARIABLE: f"live-{name}-{os.getpid()}", REFUSES_VARIABLE: refuses}):
        driver = open_driver("emulated")
        driver.start()
        yield driver
        driver.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with own_device("server") as driver:
        adapters = [f"--adapter={name}={adapter_paths()[name]}" for name in ("upper", "reverse")]
        with live(f"demo={backbone_path()}", *adapters, "--device", "emulated", *SMALL) as running:
            assert driver.memory().free_bytes < driver.memory().total_bytes
            yield running
        assert driver.memory().free_bytes == driver.memory().total_bytes, "all of it went back"


async def stream(client: httpx.AsyncClient, server: Live, model: str) -> AsyncIterator[str]:
    """Pieces of a completion; the last says how it ended if that was an error."""
    body = {
        "model": model,
        "prompt": completion_prompt(LONGER),
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                yield event["error"]["code"] if "error" in event else event["choices"][0]["text"]


async def run_to_end(server: Live, model: str) -> list[str]:
    async with httpx.AsyncClient(timeout=60) as client:
        return [piece async for piece in stream(client, server, model)]


async def kill_during(server: Live, pid: int, model: str, *, beside: str | None = None) -> list[list[str]]:
    """Kill `pid` once the model's stream runs. Returns what it said, and what the one beside it said."""
    others = [asyncio.ensure_future(run_to_end(server, beside))] if beside else []
    pieces: list[str] = []
    async with httpx.AsyncClient(timeout=60) as client:
        async for piece in stream(client, server, model):
            pieces.append(piece)
            if len(pieces) == 2:
                os.kill(pid, signal.SIGKILL)
    return [pieces, *await asyncio.gather(*others)]


def test_answers_are_the_cpus(server: Live) -> None:
    for model in ("upper", "reverse"):
        assert server.answer(model, TEXT) == TASKS[model](TEXT)
    assert server.answer("demo", TEXT) == TEXT


def test_health_says_what_it_runs_on(server: Live) -> None:
    server.answer("upper", TEXT)
    health = httpx.get(f"{server.url}/health").json()["backbones"]["demo"]
    assert health["state"] == "ready"
    assert health["device"].startswith("emulated (")
    assert health["sharing"] == SENTENCES["vmm"]
    assert health["graphs"].startswith("on")


def test_a_killed_worker_ends_alone(server: Live) -> None:
    server.answer("upper", TEXT)
    pid = server.workers()["function:upper"]["pid"]
    upper, reverse = asyncio.run(kill_during(server, pid, "upper", beside="reverse"))
    assert upper[-1] == "worker_lost"
    assert "".join(reverse) == REVERSED
    assert server.answer("upper", TEXT) == TASKS["upper"](TEXT)


@pytest.mark.parametrize("role", ["launcher_pid", "host_pid"])
def test_launcher_and_host_are_replaced_unnoticed(server: Live, role: str) -> None:
    before = server.backbone()
    (said,) = asyncio.run(kill_during(server, before[role], "reverse"))
    assert "".join(said) == REVERSED
    wait_until(
        lambda: server.backbone()["state"] == "ready" and server.backbone()[role] not in (None, before[role]), 60
    )
    verified = httpx.post(f"{server.admin}/admin/verify/demo", timeout=10).json()
    assert verified == {"content_digest": before["content_digest"], "intact": True}


def test_killing_the_gateway_gives_all_memory_back(server: Live) -> None:
    """The last one: the others follow the gateway, and so does the memory."""
    server.answer("upper", TEXT)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not server.pids(), 10)
    driver = open_driver("emulated")
    driver.start()
    assert driver.memory().free_bytes == driver.memory().total_bytes
    driver.stop()


def test_memory_that_workers_could_write_is_watched_and_dies_with_its_host() -> None:
    with own_device("writable", refuses="fds") as driver:
        with live(f"demo={backbone_path()}", "--device", "emulated", *SMALL) as server:
            assert server.answer("demo", TEXT) == TEXT
            before, (worker,) = server.backbone(), server.workers().values()
            assert before["sharing"] == SENTENCES["cuda-ipc"]
            os.kill(before["host_pid"], signal.SIGKILL)
            wait_until(lambda: worker["pid"] not in server.pids(), 10)
            wait_until(lambda: server.backbone()["state"] == "ready", 60)
            assert server.answer("demo", TEXT) == TEXT
            flip_a_byte(server.backbone()["host_pid"])
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 30)
            assert httpx.get(f"{server.url}/health").json()["backbones"]["demo"]["state"] == "altered"
            refused = server.chat("demo", TEXT)
            assert refused.status_code == 503
            assert "altered in memory" in refused.json()["error"]["message"]
            said = " ".join(server.log.read_text().split())
            assert "shared by a fallback" in said
            assert "ALTERED" in said
        assert driver.memory().free_bytes == driver.memory().total_bytes


def flip_a_byte(host_pid: int) -> None:
    """What a worker could do to memory it has mapped for writing."""
    (memory,) = (
        fd for fd in Path(f"/proc/{host_pid}/fd").iterdir() if os.readlink(fd).startswith("/memfd:emulated-live-")
    )
    fd = os.open(memory, os.O_RDWR)
    os.pwrite(fd, bytes([os.pread(fd, 1, 1000)[0] ^ 1]), 1000)
    os.close(fd)
