"""The observer sees what a server holds: by /proc, by the server's own pages, by both; and reads its ledger."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from serverlesslora_loadgen import lifetimes
from serverlesslora_loadgen.admin_pages import Admin, Backbone, Gauges, State, Worker, WorkerStats, read_gauges
from serverlesslora_loadgen.errors import TargetError
from serverlesslora_loadgen.fetching import HasNone, get
from serverlesslora_loadgen.ledger import read_ledger
from serverlesslora_loadgen.lifetimes import Held
from serverlesslora_loadgen.observe import DeviceClock, Observer, Sample, memory_of
from tests.live import live
from tests.server import free_port, running, wait_until

MIB = 1 << 20

# --- /proc

HOLDER = """
import mmap, os, sys
fd = os.memfd_create("weights")
os.ftruncate(fd, 64 << 20)
shared = mmap.mmap(fd, 64 << 20)
shared[:] = bytes(64 << 20)
private = bytearray(b"x") * (32 << 20)
if sys.argv[1] == "mapped": os.close(fd)
if sys.argv[1] == "open": shared.close()
if sys.argv[1] == "anonymous":
    shared.close(); os.close(fd)
    shared = mmap.mmap(-1, 1 << 30)  # a reach of 1 GiB, of which 64 MiB exist
    shared[:64 << 20] = bytes(64 << 20)
if os.fork() == 0: sys.stdin.read(); os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(way: str) -> Iterator[int]:
    """A process group of two that share 64 MiB of a memory file and, since a fork, 32 MiB of private pages."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@pytest.mark.parametrize("way", ["mapped", "open", "both", "anonymous"])
def test_shared_memory_counts_once_and_private_memory_by_its_share(way: str) -> None:
    with holder(way) as group:
        held = lifetimes.look(group)
        assert held is not None and len(held.pids) == 2
        assert 64 * MIB <= held.shared_bytes < 65 * MIB
        assert 32 * MIB < sum(held.pids.values()) < 60 * MIB
        assert held.total_bytes == held.shared_bytes + sum(held.pids.values())
    wait_until(lambda: lifetimes.look(group) is None)


def test_an_old_kernel_does_not_split_and_a_zombie_holds_nothing(tmp_path: Path) -> None:
    for pid, state, group in ((7, "S", 7), (8, "Z", 7), (9, "S", 9)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) name) {state} 1 {group} 7 0")
        (tmp_path / str(pid) / "smaps_rollup").write_text("00-ff ---p 0 00:00 0 [rollup]\nRss: 9 kB\nPss: 4 kB\n")
    assert lifetimes.members(7, tmp_path) == [7]
    held = lifetimes.look(7, tmp_path)
    assert held is not None and held.pids == {7: 4096} and held.shared_bytes == 0


# --- what the server says


def worker(name: str, pid: int | None = None, **stats: Any) -> Worker:
    return Worker(name, pid, WorkerStats(**stats) if stats else None)


def state(*workers: Worker, backbone_bytes: int = 1000, device: str = "cpu") -> State:
    return State((Backbone("b", backbone_bytes, device=device),), workers)


def test_the_purpose_of_memory_is_the_servers_word_and_its_amount_the_kernels() -> None:
    now = state(worker("w1", 11, adapter_bytes=30, kv_bytes=50), worker("w2", 12, adapter_bytes=10), worker("w3"))
    held = Held({10: 500, 11: 200, 12: 100}, shared_bytes=1200)
    assert memory_of(now, Gauges(99, 0.0), held) == (
        2000,
        {"backbone": 1000, "adapters": 40, "kv": 50, "workers": 210, "other": 700},
    )
    assert memory_of(now, Gauges(1500, 0.0), None) == (
        1500,
        {"backbone": 1000, "adapters": 40, "kv": 50, "workers": 410, "other": 0},
    )
    assert memory_of(None, None, held) == (2000, {"other": 2000})
    assert memory_of(now, None, None) == (None, {})


def test_what_lies_on_a_device_is_not_taken_from_the_hosts_memory() -> None:
    now = state(worker("w1", 11, adapter_bytes=30, kv_bytes=50), backbone_bytes=0, device="cuda NVIDIA H200")
    assert memory_of(now, None, Held({11: 200}, 0)).parts == {
        "backbone": 0, "adapters": 0, "kv": 0, "workers": 200, "other": 0,
    }  # fmt: skip


SIZES = st.integers(0, 10_000)


@given(
    workers=st.lists(st.tuples(st.integers(1, 5), SIZES, SIZES), max_size=4),
    backbone=SIZES,
    gauge=SIZES,
    pids=st.dictionaries(st.integers(1, 5), SIZES, max_size=4),
    shared=SIZES,
    by_kernel=st.booleans(),
)
def test_parts_add_up_to_what_is_held(
    workers: list[tuple[int, int, int]], backbone: int, gauge: int, pids: dict[int, int], shared: int, by_kernel: bool
) -> None:
    """Also when the server's numbers are a moment older than the kernel's. Two workers are never one process."""
    of_pid = {pid: (adapters, kv) for pid, adapters, kv in workers}
    now = state(
        *(worker(f"w{pid}", pid, adapter_bytes=a, kv_bytes=kv) for pid, (a, kv) in of_pid.items()),
        backbone_bytes=backbone,
    )
    held = Held(pids, shared) if by_kernel else None
    memory = memory_of(now, Gauges(gauge, 0.0), held)
    assert memory.held_bytes == (gauge if held is None else held.total_bytes)
    assert sum(memory.parts.values()) == memory.held_bytes
    assert set(memory.parts) == {"backbone", "adapters", "workers", "kv", "other"}
    assert min(memory.parts.values()) >= 0


def test_device_seconds_come_from_whoever_has_counted_more() -> None:
    clock = DeviceClock()
    assert DeviceClock().update(None, None) is None
    assert clock.update(state(worker("w1", busy_s=5.0)), Gauges(0, 100.0)) == 0.0
    # A long request is not finished, but its worker is busy.
    assert clock.update(state(worker("w1", busy_s=8.0)), Gauges(0, 100.0)) == 3.0
    # A worker came and went without being seen; only the total has its requests.
    assert clock.update(state(worker("w1", busy_s=8.0)), Gauges(0, 110.0)) == 10.0
    # Workers that are gone are not forgotten, and a new one counts from nothing.
    assert clock.update(state(worker("w2", busy_s=9.0)), Gauges(0, 110.0)) == 12.0
    assert clock.update(state(), None) == 12.0


def test_gauges_are_read_from_a_real_page_of_metrics() -> None:
    registry = CollectorRegistry()
    Gauge("serverlesslora_memory_held_bytes", "Held.", registry=registry).set(3e9)
    Gauge("serverlesslora_memory_held_bytes_peak", "Another.", registry=registry).set(9e9)
    seconds = Counter("serverlesslora_device_seconds", "Share.", ("function",), registry=registry)
    assert read_gauges(generate_latest(registry).decode()) == Gauges(3_000_000_000, 0.0)
    seconds.labels('a "quoted} name').inc(1.5)
    seconds.labels("b").inc(2.0)
    assert read_gauges(generate_latest(registry).decode()) == Gauges(3_000_000_000, 3.5)
    assert read_gauges("vllm:num_requests_running 3\n") == Gauges(None, None)
    with pytest.raises(TargetError, match="metrics"):
        read_gauges("serverlesslora_memory_held_bytes{ x\n")


# --- looking


class Pages:
    """A server's pages; each look finds a larger server. `broken`: status of the state's page."""

    def __init__(self, **state: Any) -> None:
        self.looks = 0
        self.broken = 0
        self.state = state

    def app(self, *, metrics: bool = True) -> Starlette:
        async def show(request: Request) -> Response:
            assert request.headers["authorization"] == "Bearer key"
            self.looks += 1
            if self.broken:
                return PlainTextResponse("later, please", self.broken)
            workers = [
                {
                    "worker_id": f"w{n}",
                    "pid": os.getpid(),
                    "state": "serving",
                    "stats": {"type": "Stats", "busy_s": 1.0 * n},
                }
                for n in range(self.looks)
            ]
            backbones = [{"name": "b", "size_bytes": 100, "sharing": "shared", "content_digest": None}]
            return JSONResponse({"backbones": backbones, "workers": workers, "functions": [{}, {}], **self.state})

        async def page(request: Request) -> Response:
            return PlainTextResponse(f"serverlesslora_memory_held_bytes {1000 * self.looks}.0\n")

        routes = [Route("/admin/state", show)]
        return Starlette(routes=[*routes, Route("/metrics", page)] if metrics else routes)


def observer(url: str, **more: Any) -> Observer:
    return Observer(url=url, admin=url + "/", interval_s=0.01, headers={"authorization": "Bearer key"}, **more)


def test_a_server_is_looked_at_until_the_end_and_times_count_from_the_start_of_the_run() -> None:
    pages = Pages()
    with running(pages.app()) as url:
        watching = observer(url)
        began_at = time.monotonic()
        with watching:
            wait_until(lambda: len(watching.samples(began_at)) >= 3)
        seen = watching.samples(began_at)
        assert watching.samples(began_at - 5.0)[0].at_s == pytest.approx(seen[0].at_s + 5.0)
        assert watching.facts() == {
            "device": "cpu", "functions": 2, "backbones": {"b": {"bytes": 100, "sharing": "shared"}},
        }  # fmt: skip
    assert [sample.at_s for sample in seen] == sorted(sample.at_s for sample in seen)
    assert seen[0].at_s >= 0
    for look, sample in enumerate(seen, 1):
        workers = 1000 * look - 100
        parts = {"backbone": 100, "adapters": 0, "workers": workers, "kv": 0, "other": 0}
        assert sample == Sample(sample.at_s, look, 1000 * look, parts, sum(range(look)))
    assert watching.notes == []


def test_looks_that_fail_are_told_and_the_next_ones_go_on() -> None:
    pages = Pages()
    with running(pages.app(metrics=False)) as url, observer(url) as watching:
        wait_until(lambda: len(watching.samples(0.0)) >= 2)
        pages.broken = 503
        seen = pages.looks
        wait_until(lambda: pages.looks >= seen + 2 and bool(watching.notes))
        pages.broken = 0
        seen = len(watching.samples(0.0))
        wait_until(lambda: len(watching.samples(0.0)) >= seen + 2)
        (note,) = watching.notes
        assert "looks at the server failed" in note and "503: later, please" in note
        assert watching.samples(0.0)[-1].held_bytes is None  # it has no page of metrics


def test_a_process_group_alone_is_enough() -> None:
    with holder("both") as group:
        with Observer(group=group, interval_s=0.01) as watching:
            wait_until(lambda: len(watching.samples(0.0)) >= 2)
        assert str(group) in watching.how and watching.facts() == {}
        (note,) = watching.notes
        assert "workers were alive is not known" in note and "--admin" in note
    for sample in watching.samples(0.0):
        assert sample.workers is None and sample.device_s is None
        assert sample.held_bytes is not None and 96 * MIB < sample.held_bytes < 130 * MIB
        assert sample.parts == {"other": sample.held_bytes}


def test_what_cannot_be_observed_is_refused_before_the_run() -> None:
    with pytest.raises(TargetError, match=r"--admin URL.*--meter-group"):
        Observer(url="http://127.0.0.1:1")
    with pytest.raises(TargetError, match="every 0"):
        Observer(group=1, interval_s=0)
    with pytest.raises(TargetError, match=r"cannot ask http://127\.0\.0\.1"):
        Observer(admin=f"http://127.0.0.1:{free_port()}").start()
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait(10)
    with pytest.raises(TargetError, match=f"group {process.pid}"):
        Observer(group=process.pid).start()
    with pytest.raises(TargetError, match="begins with http"):
        get("file:///etc/passwd")
    with running(Pages(workers="many").app()) as url, pytest.raises(TargetError, match="not what this program reads"):
        observer(url).start()


def test_a_page_that_is_not_there_is_told_from_a_server_that_is_not() -> None:
    async def moved(request: Request) -> Response:
        return PlainTextResponse("x" * 1000, 500)

    with running(Starlette(routes=[Route("/broken", moved)])) as url:
        with pytest.raises(HasNone, match="404"):
            get(f"{url}/none")
        with pytest.raises(TargetError, match=r"answered 500: x{300}$") as caught:
            get(f"{url}/broken")
        assert not isinstance(caught.value, HasNone)
        assert Admin(url, url).gauges() is None and Admin(url, None).gauges() is None


# --- ours


def test_our_own_server_is_seen_and_its_ledger_read() -> None:
    with live("--demo", "--idle-timeout", "600") as server:
        began_unix = time.time()
        with Observer(url=server.url, admin=server.admin, group=server.process.pid, interval_s=0.1) as watching:
            began_at = time.monotonic()
            assert server.answer("upper", "hello") == "HELLO"
            assert server.answer("reverse", "hello") == "olleh"
            looks = len(watching.samples(began_at))
            wait_until(lambda: len(watching.samples(began_at)) >= looks + 2)
        ledger = read_ledger(server.admin, since=began_unix, until=time.time())
        empty = read_ledger(server.admin, since=began_unix - 2000, until=began_unix - 1000)
        facts = watching.facts()
        pids = server.pids()
    first, last = watching.samples(began_at)[0], watching.samples(began_at)[-1]
    assert first.at_s < 0 < last.at_s and watching.notes == []
    assert last.workers is not None and 2 <= last.workers < len(pids)
    assert last.held_bytes is not None and sum(last.parts.values()) == last.held_bytes
    assert all(last.parts[part] > 0 for part in ("backbone", "adapters", "workers", "kv", "other")), last.parts
    assert last.parts["backbone"] == sum(each["bytes"] for each in facts["backbones"].values())
    assert first.device_s == 0.0 and last.device_s is not None
    assert facts["device"] == "cpu" and facts["functions"] >= 3 and facts["policy.sharing"] == "on"

    usage = ledger.total.usage
    assert usage.requests == usage.finished == 2 and usage.completion_tokens > 0
    assert usage.device_s == pytest.approx(last.device_s, rel=0.05)
    seconds = last.at_s - first.at_s
    assert set(usage.byte_s) == {"host"} and 0 < usage.byte_s["host"] < 10e9 * seconds
    assert {row.usage.key for row in ledger.rows if row.usage.requests} == {"upper", "reverse"}
    assert ledger.prices.illustrative and ledger.problem is None
    assert empty.total.usage.requests == 0


def test_a_ledger_of_another_window_is_not_believed() -> None:
    async def usage(request: Request) -> Response:
        total: dict[str, Any] = {"usage": {}, "money": {}}
        prices = {"currency": "USD", "date": "2026-11-01"}
        return JSONResponse({"since": 5.0, "rows": [], "total": total, "prices": prices})

    with running(Starlette(routes=[Route("/admin/usage", usage)])) as url:
        assert read_ledger(url, since=5.0).total.usage.requests == 0
        with pytest.raises(TargetError, match="another window"):
            read_ledger(url, since=6.0)


def test_samples_can_be_written_down() -> None:
    sample = Sample(1.0, 2, 3, {"other": 3}, 0.5)
    assert msgspec.json.decode(msgspec.json.encode(sample), type=Sample) == sample
    assert json.loads(msgspec.json.encode(Sample(1.0)))["workers"] is None
