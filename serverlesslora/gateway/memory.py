"""What every process of the server holds in the host's memory, counted so that the sum is what the kernel says.

Three kinds of memory, each counted once:

- the backbones: shared memory of known size, whoever maps it;
- what is a process's own: its private pages, of a worker split into adapters, KV cache and the rest;
- what processes share without asking: libraries, and pages a launcher had before it forked (copied on write).

Walking the page tables of a process that maps gigabytes takes 4 ms per GB (`smaps_rollup`), reading its counters 10 us
(`status`). So all tables are walked rarely, those of a new worker once, and in between the counters say how much each
process has grown. Whenever everything is walked again, what was counted up to then is compared with it: that is
`difference_percent`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from serverlesslora.gateway.proc_memory import Counters, Reading, Walk, allocated_bytes, find_children, read

Role = Literal["gateway", "host", "launcher", "worker", "spare"]
EntryKind = Literal["process", "backbone", "worker", "adapter", "kv", "shared"]


class Process(msgspec.Struct, frozen=True):
    """One process of the server, and what a worker says it holds (`Stats`)."""

    pid: int
    role: Role
    backbone: str = ""  # of the gateway: none
    domain: str | None = None  # of workers
    adapters: Mapping[str, int] = {}  # digest -> bytes in this process's host memory
    kv_bytes: int = 0  # of its KV cache in host memory

    @property
    def artifact_id(self) -> str:
        if self.role == "gateway":
            return "process:gateway"
        owner = self.domain if self.role == "worker" else f"{self.role}:{self.pid}"
        return f"{'worker' if self.role == 'worker' else 'process'}:{self.backbone}/{owner}"


class SharedMemory(msgspec.Struct, frozen=True):
    """A backbone in host memory. `fd` is this process's descriptor of it; without one only what is mapped is seen."""

    backbone: str
    size_bytes: int
    fd: int | None = None


class Entry(msgspec.Struct, frozen=True):
    artifact_id: str
    kind: EntryKind
    owner: str | None  # the domain
    size_bytes: int


class MemoryMap(msgspec.Struct, frozen=True):
    """One host's memory. The last three are of the last time all page tables were walked."""

    capacity_bytes: int
    available_bytes: int
    entries: tuple[Entry, ...]
    counted_bytes: int  # the sum of the entries
    measured_bytes: int
    difference_percent: float  # of what was counted at that time from what was measured
    measured_at: float
    place_id: str = "host"
    unread: tuple[int, ...] = ()  # processes nothing could be learned about

    def bytes_of(self, kind: EntryKind, owner: str | None = None) -> int:
        return sum(e.size_bytes for e in self.entries if e.kind == kind and owner in (None, e.owner))


class Own(NamedTuple):
    """A process's own memory when its page tables were walked, and its counter then."""

    own_bytes: int
    anon_bytes: int


def own_bytes(walk: Walk, shmem_bytes: int, sharers: float) -> int:
    """Private pages without those of the backbone, which are private to whoever is the only one to map them.

    Where a page of the backbone is mapped by this process alone or by n: Pss = alone + (mapped - alone)/n. `sharers` is
    the n of an average page; the error is small because most pages are mapped by all workers or by one.
    """
    n = max(2.0, sharers)
    alone = max(0, round((n * walk.pss_shmem_bytes - shmem_bytes) / (n - 1)))
    return min(max(0, walk.private_bytes - alone), walk.pss_unshared_bytes)


def measured_bytes(reading: Reading, allocated: int) -> int:
    """All of it by the kernel's own sums, each page once.

    `reading` has every process's walk; `allocated` is the size of the shared memory we hold descriptors of, of which
    pages may exist that nobody maps.
    """
    mapped = sum(walk.pss_shmem_bytes for walk in reading.walks.values())
    unshared = sum(walk.pss_unshared_bytes for walk in reading.walks.values())
    return unshared + max(mapped, allocated)


def count(
    processes: Sequence[Process],
    shared: Sequence[SharedMemory],
    counters: Mapping[int, Counters],
    owns: Mapping[int, Own],
    common_bytes: int,
) -> tuple[Entry, ...]:
    """What each part holds. A process that has not been walked yet counts with all its anonymous memory."""
    entries = [Entry(f"backbone:{memory.backbone}", "backbone", None, memory.size_bytes) for memory in shared]
    entries.append(Entry("shared:libraries", "shared", None, common_bytes))
    for process in processes:
        now = counters.get(process.pid)
        if now is None:
            continue
        own = owns.get(process.pid, Own(now.anon_bytes, now.anon_bytes))
        rest = max(0, own.own_bytes + now.anon_bytes - own.anon_bytes)
        for digest, size in process.adapters.items():
            artifact_id = f"adapter:{process.backbone}/{process.domain}:{digest}"
            entries.append(Entry(artifact_id, "adapter", process.domain, size))
            rest -= size
        if process.kv_bytes:
            entries.append(Entry(f"kv:{process.backbone}/{process.domain}", "kv", process.domain, process.kv_bytes))
            rest -= process.kv_bytes
        kind: EntryKind = "worker" if process.role == "worker" else "process"
        entries.append(Entry(process.artifact_id, kind, process.domain, max(0, rest)))
    return tuple(entries)


class MemoryLedger:
    """Call `look` as often as fresh numbers are wanted: it decides what has to be read for them.

    All page tables are walked every `walk_every_s`, and soon after processes came or went, but never so often that it
    takes more than `max_share` of a core.
    """

    def __init__(
        self,
        *,
        walk_every_s: float = 30.0,
        settle_s: float = 5.0,
        max_share: float = 0.002,
        read: Callable[[Collection[int], Collection[int]], Reading] = read,
        find_children: Callable[[Collection[int]], dict[int, int]] = find_children,
    ) -> None:
        self._walk_every_s = walk_every_s
        self._settle_s = settle_s
        self._max_share = max_share
        self._read = read
        self._find_children = find_children
        self._pids: frozenset[int] = frozenset()  # as told at the last look
        self._spares: tuple[Process, ...] = ()
        self._owns: dict[int, Own] = {}
        self._common_bytes = 0
        self._next_walk = self._soonest_walk = float("-inf")
        self._measured = (0, 0.0, float("-inf"))  # bytes, difference in percent, when
        self._turn = asyncio.Lock()

    async def look(self, processes: Sequence[Process], shared: Sequence[SharedMemory], *, now: float) -> MemoryMap:
        """`processes` are the server's, `now` is of a monotonic clock.

        Children of launchers that are not among them are counted as spares: nobody else knows their pids.
        """
        # Before anything is awaited: the descriptors are the caller's to close.
        allocated = sum(allocated_bytes(memory.fd) for memory in shared if memory.fd is not None)
        async with self._turn:
            told = frozenset(process.pid for process in processes)
            if told != self._pids:
                self._pids = told
                # Not at once: a launcher makes a new spare a moment after the last was taken.
                self._next_walk = min(self._next_walk, max(self._soonest_walk, now + self._settle_s))
            everything = now >= self._next_walk
            if everything:
                self._spares = await self._find_spares(processes)
            every = [*processes, *(spare for spare in self._spares if spare.pid not in told)]
            pids = [process.pid for process in every]
            walk = pids if everything else [pid for pid in pids if pid not in self._owns]
            reading = await asyncio.to_thread(self._read, pids, walk)
            self._owns = {pid: own for pid, own in self._owns.items() if pid in reading.counters}
            if everything:
                self._soonest_walk = now + reading.cpu_s / self._max_share
                self._next_walk = max(self._soonest_walk, now + self._walk_every_s)
                self._compare(every, shared, reading, allocated, now)
            else:
                self._learn(every, shared, reading)
            entries = count(every, shared, reading.counters, self._owns, self._common_bytes)
            measured, difference, measured_at = self._measured
            return MemoryMap(
                capacity_bytes=reading.machine.capacity_bytes,
                available_bytes=reading.machine.available_bytes,
                entries=entries,
                counted_bytes=sum(entry.size_bytes for entry in entries),
                measured_bytes=measured,
                difference_percent=difference,
                measured_at=measured_at,
                unread=tuple(pid for pid in pids if pid not in reading.counters),
            )

    async def _find_spares(self, processes: Sequence[Process]) -> tuple[Process, ...]:
        launchers = {process.pid: process for process in processes if process.role == "launcher"}
        if not launchers:
            return ()
        known = {process.pid for process in processes}
        children = await asyncio.to_thread(self._find_children, launchers.keys())
        return tuple(
            Process(pid, "spare", launchers[parent].backbone) for pid, parent in children.items() if pid not in known
        )

    def _learn(self, processes: Sequence[Process], shared: Sequence[SharedMemory], reading: Reading) -> None:
        mapped: dict[str, int] = {}
        for process in processes:
            if (counters := reading.counters.get(process.pid)) is not None:
                mapped[process.backbone] = mapped.get(process.backbone, 0) + counters.shmem_bytes
        sharers = {memory.backbone: mapped.get(memory.backbone, 0) / memory.size_bytes for memory in shared}
        for process in processes:
            walk, counters = reading.walks.get(process.pid), reading.counters.get(process.pid)
            if walk is not None and counters is not None:
                own = own_bytes(walk, counters.shmem_bytes, sharers.get(process.backbone, 0.0))
                self._owns[process.pid] = Own(own, counters.anon_bytes)

    def _compare(
        self,
        processes: Sequence[Process],
        shared: Sequence[SharedMemory],
        reading: Reading,
        allocated: int,
        now: float,
    ) -> None:
        """What would have been counted without this walk, against it; what processes share is then known anew."""
        known, common = dict(self._owns), self._common_bytes
        self._learn(processes, shared, reading)
        total = sum(walk.pss_unshared_bytes for walk in reading.walks.values())
        self._common_bytes = max(
            0, total - sum(self._owns[pid].own_bytes for pid in reading.walks if pid in self._owns)
        )
        if known:
            counted = count(processes, shared, reading.counters, {**self._owns, **known}, common)
        else:
            counted = count(processes, shared, reading.counters, self._owns, self._common_bytes)
        measured = measured_bytes(reading, allocated)
        difference = 100 * (sum(entry.size_bytes for entry in counted) / measured - 1) if measured else 0.0
        self._measured = (measured, difference, now)
