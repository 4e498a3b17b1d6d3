"""What is counted is what the kernel measures: with faked readings, and with real processes that share memory."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.gateway import proc_memory
from serverlesslora.gateway.memory import MemoryLedger, MemoryMap, Process, SharedMemory, own_bytes
from serverlesslora.gateway.proc_memory import Counters, Machine, Reading, Walk
from serverlesslora_ipc import sealed
from tests.server import ROOT

MB = 1 << 20


class FakeKernel:
    """Processes as plain numbers, and what was asked about them."""

    def __init__(self) -> None:
        self.counters: dict[int, Counters] = {}
        self.walks: dict[int, Walk] = {}
        self.children: dict[int, int] = {}
        self.walked: list[set[int]] = []
        self.cpu_s = 0.0

    def set(self, pid: int, *, anon: int, private: int | None = None, pss: int | None = None, shmem: int = 0) -> None:
        private = anon if private is None else private
        self.counters[pid] = Counters(anon * MB, shmem * MB)
        self.walks[pid] = Walk(private * MB, (private if pss is None else pss) * MB, shmem * MB // 2)

    def read(self, pids: Collection[int], walk: Collection[int]) -> Reading:
        self.walked.append(set(walk))
        return Reading(
            Machine(1000 * MB, 700 * MB),
            {pid: self.counters[pid] for pid in pids if pid in self.counters},
            {pid: self.walks[pid] for pid in walk if pid in self.walks},
            self.cpu_s,
        )

    def find_children(self, parents: Collection[int]) -> dict[int, int]:
        return {pid: parent for pid, parent in self.children.items() if parent in parents}

    def ledger(self) -> MemoryLedger:
        return MemoryLedger(read=self.read, find_children=self.find_children)


def look(ledger: MemoryLedger, processes: list[Process], shared: list[SharedMemory], now: float) -> MemoryMap:
    return asyncio.run(ledger.look(processes, shared, now=now))


GATEWAY = Process(1, "gateway")
LAUNCHER = Process(2, "launcher", "llama")
BACKBONE = SharedMemory("llama", 100 * MB)


def worker(pid: int, domain: str, *, adapter_mb: int = 0, kv_mb: int = 0) -> Process:
    adapters = {"d1": adapter_mb * MB} if adapter_mb else {}
    return Process(pid, "worker", "llama", domain, adapters=adapters, kv_bytes=kv_mb * MB)


def sizes(found: MemoryMap) -> dict[str, int]:
    assert found.counted_bytes == sum(entry.size_bytes for entry in found.entries)
    return {entry.artifact_id: entry.size_bytes // MB for entry in found.entries}


def test_a_worker_is_split_into_what_it_says_it_holds_and_the_rest() -> None:
    kernel = FakeKernel()
    kernel.set(1, anon=50)
    kernel.set(2, anon=80, private=10, pss=45, shmem=100)  # 70 MB are shared with the worker
    kernel.set(3, anon=110, private=40, pss=75, shmem=100)
    found = look(kernel.ledger(), [GATEWAY, LAUNCHER, worker(3, "acme", adapter_mb=8, kv_mb=12)], [BACKBONE], 0.0)
    assert sizes(found) == {
        "backbone:llama": 100,
        "shared:libraries": 70,
        "process:gateway": 50,
        "process:llama/launcher:2": 10,
        "adapter:llama/acme:d1": 8,
        "kv:llama/acme": 12,
        "worker:llama/acme": 20,
    }
    assert found.measured_bytes == found.counted_bytes == 270 * MB
    assert found.difference_percent == 0
    assert found.bytes_of("adapter", "acme") == 8 * MB and found.bytes_of("adapter", "other") == 0
    assert (found.capacity_bytes, found.available_bytes) == (1000 * MB, 700 * MB)


def test_what_is_claimed_but_not_there_shows_as_a_difference() -> None:
    kernel = FakeKernel()
    kernel.set(3, anon=40)
    found = look(kernel.ledger(), [worker(3, "acme", adapter_mb=60)], [], 0.0)
    assert found.measured_bytes == 40 * MB
    assert found.difference_percent == pytest.approx(50.0)


def test_page_tables_are_walked_rarely_and_growth_is_followed_by_the_counters() -> None:
    kernel = FakeKernel()
    kernel.set(3, anon=110, private=40)
    ledger = kernel.ledger()
    look(ledger, [worker(3, "acme")], [], 0.0)
    look(ledger, [worker(3, "acme")], [], 5.0)  # processes had come: walked again once they have settled
    kernel.set(3, anon=130, private=60)
    assert sizes(look(ledger, [worker(3, "acme")], [], 29.0))["worker:llama/acme"] == 60
    assert kernel.walked == [{3}, set(), set()]
    # One more worker: it alone is looked at closely, the others soon.
    kernel.set(4, anon=100, private=30)
    both = [worker(3, "acme"), worker(4, "other")]
    assert sizes(look(ledger, both, [], 29.5))["worker:llama/other"] == 30
    assert kernel.walked[-1] == {4}
    kernel.set(4, anon=120, private=65)  # 15 MB that the counters could not show
    found = look(ledger, both, [], 34.6)
    assert kernel.walked[-1] == {3, 4}
    assert found.measured_bytes == 125 * MB
    assert found.difference_percent == pytest.approx(100 * (110 / 125 - 1))
    assert sizes(found)["worker:llama/other"] == 65
    assert look(ledger, both, [], 60.0).measured_at == 34.6


def test_walking_never_takes_more_than_its_share() -> None:
    kernel = FakeKernel()
    kernel.cpu_s = 1.0
    ledger = kernel.ledger()
    now, full = 0.0, 0
    for i in range(400):  # processes come and go all the time
        kernel.set(10 + i, anon=10)
        look(ledger, [GATEWAY, worker(10 + i, "acme")], [], now)
        full += 1 in kernel.walked[-1] or i == 0
        kernel.set(1, anon=10)
        now += 10.0
    assert full <= 2 + now * 0.002 / 1.0


def test_spares_are_found_and_those_who_left_are_forgotten() -> None:
    kernel = FakeKernel()
    kernel.set(2, anon=10)
    kernel.set(7, anon=90, private=20)
    kernel.set(8, anon=90)
    kernel.children = {7: 2, 8: 99}  # 8 is somebody else's
    ledger = kernel.ledger()
    assert sizes(look(ledger, [LAUNCHER], [], 0.0))["process:llama/spare:7"] == 20
    taken = sizes(look(ledger, [LAUNCHER, worker(7, "acme")], [], 1.0))  # it became a worker
    assert taken["worker:llama/acme"] == 20 and "process:llama/spare:7" not in taken
    del kernel.counters[7]
    gone = look(ledger, [LAUNCHER, worker(7, "acme")], [], 2.0)
    assert gone.unread == (7,)
    assert "worker:llama/acme" not in sizes(gone)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(2, 20), st.integers(0, 100))
def test_own_memory_leaves_out_the_backbone_however_it_is_shared(private: int, alone: int, n: int, shared: int) -> None:
    # `alone` MB of the backbone are mapped by this process only, `shared` MB by all n.
    mapped = (alone + shared) * MB
    walk = Walk((private + alone) * MB, (private + 5) * MB, alone * MB + shared * MB // n)
    assert own_bytes(walk, mapped, n) == pytest.approx(private * MB, abs=2 * n)
    if not shared:
        assert own_bytes(walk, mapped, 1.0) == private * MB


# --- reading


def test_control_groups_of_both_versions_limit_what_is_available(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:   1000 kB\nMemFree:  500 kB\nMemAvailable:  800 kB\n")
    assert proc_memory.read_machine(tmp_path) == Machine(1000 << 10, 800 << 10)
    write("proc/self/cgroup", "4:cpu,memory:/none/such\n0::/a/b\n1:name=systemd:/a\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "1024\n")
    write("sys/fs/cgroup/a/memory.max", f"{600 << 10}\n")
    write("sys/fs/cgroup/a/memory.current", f"{500 << 10}\n")
    write("sys/fs/cgroup/a/memory.stat", f"anon 7\ninactive_file {50 << 10}\n")
    assert proc_memory.read_machine(tmp_path) == Machine(600 << 10, 150 << 10)
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{400 << 10}\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{390 << 10}\n")
    assert proc_memory.read_machine(tmp_path) == Machine(400 << 10, 10 << 10)
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{1 << 62}\n")
    assert proc_memory.read_machine(tmp_path) == Machine(600 << 10, 150 << 10)


def test_a_process_that_is_gone_is_left_out() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still listed
    try:
        reading = proc_memory.read([pid, os.getpid()], [pid, os.getpid()])
        assert set(reading.counters) == set(reading.walks) == {os.getpid()}
        assert proc_memory.find_children([os.getpid()])[pid] == os.getpid()
    finally:
        os.waitpid(pid, 0)
    assert reading.machine.available_bytes <= reading.machine.capacity_bytes


class Child:
    """A forked process that fills as many megabytes as it is told."""

    def __init__(self, backbone_fd: int, map_first_mb: int) -> None:
        self._orders, theirs = os.pipe()[::-1], os.pipe()
        orders, answers = self._orders[1], theirs[1]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                region = sealed.map_readonly(backbone_fd)
                for offset in range(0, map_first_mb * MB, mmap.PAGESIZE):
                    region[offset]
                held = []
                os.write(answers, b".")
                while order := os.read(orders, 1):
                    held.append(mmap.mmap(-1, order[0] * MB, mmap.MAP_PRIVATE))
                    held[-1].write(b"x" * (order[0] * MB))
                    os.write(answers, b".")
            finally:
                os._exit(0)
        os.close(orders)
        os.close(answers)
        self._done = theirs[0]
        assert os.read(self._done, 1) == b"."

    def grow(self, megabytes: int) -> None:
        os.write(self._orders[0], bytes([megabytes]))
        assert os.read(self._done, 1) == b"."

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._orders[0])
        os.close(self._done)


@contextmanager
def children(*arguments: tuple[int, int]) -> Iterator[list[Child]]:
    with ExitStack() as stack:
        found = []
        gc.collect()
        gc.disable()  # a collection touches our whole heap, and so makes it ours a second time
        stack.callback(gc.enable)
        for fd, megabytes in arguments:
            child = Child(fd, megabytes)
            stack.callback(child.end)
            found.append(child)
        yield found


def page_by_page(pids: list[int], memfd_bytes: int) -> int:
    """The same by another road: Pss of every mapping, the shared file left out and added once."""
    total = memfd_bytes
    for pid in pids:
        is_backbone = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                is_backbone = "memfd:ledger" in line
            elif line.startswith("Pss:") and not is_backbone:
                total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this kernel has no smaps_rollup")
def test_forked_processes_that_share_memory_are_counted_once_within_5_percent() -> None:
    """In a process of its own: this one may hold what hundreds of tests before it have left."""
    here = "tests.test_memory_ledger"
    code = f"import {here}; {here}.check_forked_processes()"
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc", "kernels", "loadgen"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": roots}
    )
    assert done.returncode == 0, done.stderr


def check_forked_processes() -> None:
    # We are the launcher: 60 MB that our children share with us until somebody writes.
    heap = mmap.mmap(-1, 60 * MB, mmap.MAP_PRIVATE)
    heap.write(b"h" * (60 * MB))
    with sealed.Draft("ledger", 64 * MB) as draft:
        for offset in range(0, 64 * MB, MB):
            draft.map[offset : offset + MB] = b"b" * MB
        fd = draft.seal()
    me = os.getpid()
    with children((fd, 64), (fd, 64), (fd, 10)) as forked:
        one, other, spare = forked
        processes = [
            Process(me, "launcher", "b"),
            Process(one.pid, "worker", "b", "one", adapters={"d": 16 * MB}, kv_bytes=8 * MB),
            Process(other.pid, "worker", "b", "other"),
        ]
        shared = [SharedMemory("b", 64 * MB, fd)]
        pids = [me, one.pid, other.pid, spare.pid]
        one.grow(30)
        other.grow(20)
        ledger = MemoryLedger(settle_s=0.0)
        found = look(ledger, processes, shared, 0.0)

        # Our own heap grows while we look, a page for every object that is touched: so looks are framed by truths.
        truth = page_by_page(pids, 64 * MB)
        assert found.measured_bytes == pytest.approx(truth, rel=0.02)
        assert found.counted_bytes == pytest.approx(truth, rel=0.05)
        assert abs(found.difference_percent) < 5
        held = {entry.artifact_id: entry.size_bytes for entry in found.entries}
        assert held["shared:libraries"] > 60 * MB  # once, not four times
        assert held["adapter:b/one:d"] == 16 * MB and held["kv:b/one"] == 8 * MB
        assert 6 * MB < held["worker:b/one"] < 16 * MB
        assert 20 * MB < held["worker:b/other"] < 30 * MB
        assert held[f"process:b/spare:{spare.pid}"] < 10 * MB

        other.grow(40)  # seen by the counters alone
        quick = look(ledger, processes, shared, 1.0)
        assert quick.measured_at == 0.0
        truth = page_by_page(pids, 64 * MB)
        assert quick.counted_bytes == pytest.approx(truth, rel=0.05)
        full = look(ledger, processes, shared, 100.0)
        assert 0.98 * truth < full.measured_bytes < 1.02 * page_by_page(pids, 64 * MB)
        assert abs(full.difference_percent) < 5
    os.close(fd)
    heap.close()


def test_a_backbone_nobody_maps_is_there_all_the_same() -> None:
    fd = sealed.seal_bytes("ledger", b"b" * (32 * MB))
    try:
        found = look(MemoryLedger(), [Process(os.getpid(), "gateway")], [SharedMemory("b", 32 * MB, fd)], 0.0)
        without = look(MemoryLedger(), [Process(os.getpid(), "gateway")], [], 0.0)
        assert found.measured_bytes - without.measured_bytes == pytest.approx(32 * MB, rel=0.1)
        assert abs(found.difference_percent) < 5
    finally:
        os.close(fd)
