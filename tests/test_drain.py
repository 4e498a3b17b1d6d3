"""SIGTERM: the port says no before it closes, what runs ends well or hears why, and the exit status is 0 every time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serverlesslora.demo import TASKS
from serverlesslora.gateway.orphans import Orphans
from tests.live import Live, live
from tests.server import ROOT, wait_until
from tests.test_faults import Broken, client, stream

NUM_STREAMS = 16


async def until_first_piece(pieces: AsyncIterator[str], told: asyncio.Event) -> str:
    """Everything the stream says."""
    said = ""
    async for piece in pieces:
        said += piece
        told.set()
    return said


def zombies_of(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = entry.read_text().rpartition(") ")[2].split()
            if state == "Z" and int(parent) == pid:
                found.add(int(entry.parent.name))
    return found


def is_gone(server: Live) -> None:
    assert server.process.wait(15) == 0, server.log.read_text()
    wait_until(lambda: not server.pids(), 5)
    assert "Traceback" not in server.log.read_text()


def test_streams_finish_while_the_port_refuses_others() -> None:
    with live("--demo", "--drain-delay", "1.5", "--drain-timeout", "60") as server:
        assert "function:leet" not in server.workers()

        async def play() -> list[str]:
            async with client() as http:
                started = [asyncio.Event() for _ in range(NUM_STREAMS)]
                streams = [
                    asyncio.ensure_future(until_first_piece(stream(http, server.url, "upper", tokens=150), event))
                    for event in started
                ]
                for event in started:
                    await event.wait()
                body = {"model": "leet", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
                cold = asyncio.ensure_future(http.post(f"{server.url}/v1/chat/completions", json=body))
                while "function:leet" not in server.workers():  # its start is under way
                    await asyncio.sleep(0.005)
                server.process.terminate()
                while (ready := await http.get(f"{server.url}/ready")).status_code == 200:
                    await asyncio.sleep(0.005)
                assert ready.json()["status"] == "draining"
                refused = await http.post(f"{server.url}/v1/chat/completions", json=body)
                assert refused.status_code == 503
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert refused.headers["connection"] == "close"
                assert (await cold).json()["choices"][0]["message"]["content"] == TASKS["leet"]("hello")
                return list(await asyncio.gather(*streams))

        said = asyncio.run(play())
        assert len(set(said)) == 1 and len(said[0]) > 50
        is_gone(server)


def test_the_port_stays_open_for_the_delay_although_nothing_runs() -> None:
    with live("--demo", "--drain-delay", "1") as server:
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/version").headers["connection"] == "close"
        is_gone(server)


@pytest.mark.parametrize(
    ("arguments", "signals"),
    [(["--drain-timeout", "0.3"], [signal.SIGTERM]), ([], [signal.SIGTERM, signal.SIGINT])],
    ids=["timeout", "second signal"],
)
def test_a_stream_that_does_not_end_in_time_hears_why(arguments: list[str], signals: list[signal.Signals]) -> None:
    with live("--demo", *arguments) as server:
        server.answer("upper", "a")

        async def play() -> str:
            async with client() as http:
                count = 0
                try:
                    async for _ in stream(http, server.url, "upper", tokens=1900):
                        count += 1
                        if count == 3:
                            for place, each in enumerate(signals):
                                if place:  # after the last one the port may be closed before anybody has looked
                                    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
                                server.process.send_signal(each)
                except Broken as error:
                    return str(error)
                return "finished"

        assert asyncio.run(play()) == "shutting_down"
        is_gone(server)


def test_orphans_are_reaped_and_children_of_ours_are_not() -> None:
    """In a process of its own that gets orphans, as process 1 of a container does."""
    code = """
import os, subprocess, sys, time
from serverlesslora.gateway.orphans import Orphans
from serverlesslora_ipc import process
process.take_orphans()
parent = subprocess.Popen([sys.executable, "-c", "import os; print(os.fork() and 1)"], stdout=subprocess.DEVNULL)
parent.wait()
orphans, reaped = Orphans(), 0
ours = subprocess.Popen(["true"])
while not reaped:
    orphan_seen = orphans.look()
    reaped = orphan_seen or 0
    if ours.returncode is None:
        assert ours.wait() == 0
    time.sleep(0.01)
assert reaped not in (ours.pid, parent.pid)
assert orphans.look() is None
"""
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, env=os.environ | {"PYTHONPATH": roots})


def test_nothing_is_reaped_that_was_not_seen_twice() -> None:
    child = subprocess.Popen(["true"])
    orphans = Orphans()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert orphans.look() is None
    assert child.wait() == 0
    assert orphans.look() is None


def test_workers_of_a_killed_launcher_leave_no_zombies() -> None:
    """The server gets orphans, as process 1 would."""
    become = "from serverlesslora_ipc import process; process.take_orphans()"
    code = f"import os, sys; {become}; os.execv(sys.argv[1], sys.argv[1:])"
    with live("--demo", "--idle-timeout", "0.5", through=[sys.executable, "-c", code]) as server:
        server.answer("upper", "a")
        worker, launcher = server.workers()["function:upper"]["pid"], server.backbone()["launcher_pid"]
        os.kill(launcher, signal.SIGKILL)
        wait_until(lambda: server.backbone()["launcher_pid"] not in (None, launcher), 60)
        wait_until(lambda: not Path(f"/proc/{worker}").exists() and not zombies_of(server.process.pid), 20)
        server.process.terminate()
        is_gone(server)


def test_as_process_1() -> None:
    """Where a container's process 1 has no default handlers, the first SIGTERM must still end it."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    with live("--demo", through=unshare) as server:
        (inner,) = [pid for pid in server.pids() if _parent(pid) == server.process.pid]
        with contextlib.closing(socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 80))):
            os.kill(inner, signal.SIGTERM)
            assert server.process.wait(15) == 0, server.log.read_text()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
