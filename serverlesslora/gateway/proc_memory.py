"""What /proc and the control groups say of memory, as plain values. `root` is where tests put their own."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import msgspec


class Counters(msgspec.Struct, frozen=True):
    """Of /proc/<pid>/status: cheap, but shared pages count in full."""

    anon_bytes: int
    shmem_bytes: int


class Walk(msgspec.Struct, frozen=True):
    """Of /proc/<pid>/smaps_rollup: exact. Pss splits every page among those that map it."""

    private_bytes: int
    pss_unshared_bytes: int  # anonymous memory and files
    pss_shmem_bytes: int


class Machine(msgspec.Struct, frozen=True):
    capacity_bytes: int  # the machine's, or the least a control group above us allows
    available_bytes: int  # of that, without swapping


class Reading(msgspec.Struct, frozen=True):
    machine: Machine
    counters: dict[int, Counters]  # by pid; processes that are gone or not ours to look at are missing
    walks: dict[int, Walk]
    cpu_s: float = 0.0  # what reading took


def read(pids: Collection[int], walk: Collection[int], root: Path = Path("/")) -> Reading:
    """Counters of `pids`, page tables of `walk`. Blocks for milliseconds per gigabyte: run it on a thread."""
    began = time.thread_time()
    counters = {pid: found for pid in pids if (found := _read_counters(root, pid)) is not None}
    walks = {pid: walked for pid in walk if (walked := _read_walk(root, pid)) is not None}
    return Reading(read_machine(root), counters, walks, time.thread_time() - began)


def read_machine(root: Path = Path("/")) -> Machine:
    """Memory of the machine, or what the control groups (version 1 or 2) above this process leave of it."""
    meminfo = _fields((root / "proc/meminfo").read_text(errors="replace"))
    capacity, available = meminfo["MemTotal"], meminfo.get("MemAvailable", meminfo["MemFree"])
    for group, names in _control_groups(root):
        limit, used = _number(group / names.limit), _number(group / names.usage)
        if limit is None or used is None or limit >= meminfo["MemTotal"]:
            continue
        capacity = min(capacity, limit)
        # File pages not used lately count as used, yet are dropped before anything is refused.
        available = min(available, limit - used + _reclaimable(group / "memory.stat", names.inactive_file))
    return Machine(capacity, max(0, available))


class _Names(NamedTuple):
    limit: str
    usage: str
    inactive_file: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def _control_groups(root: Path) -> list[tuple[Path, _Names]]:
    """This process's memory groups, innermost first. In a container the path may be one of the host's: the mount's
    root is then its group."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        inside = mount / path.lstrip("/")
        groups += [(group, names) for group in (inside, *inside.parents) if group.is_relative_to(mount)]
    return groups


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(errors="replace"))
    except (OSError, ValueError):  # no such controller; "max"
        return None


def _reclaimable(path: Path, name: str) -> int:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _read_counters(root: Path, pid: int) -> Counters | None:
    try:
        fields = _fields((root / f"proc/{pid}/status").read_text(errors="replace"))
    except OSError:
        return None
    if "RssAnon" not in fields:  # it has ended and waits for its parent
        return None
    return Counters(fields["RssAnon"], fields["RssShmem"])


def _read_walk(root: Path, pid: int) -> Walk | None:
    try:
        fields = _fields((root / f"proc/{pid}/smaps_rollup").read_text(errors="replace"))
    except OSError:  # it is gone, or another user's
        return None
    if "Pss" not in fields:
        return None
    private = fields["Private_Clean"] + fields["Private_Dirty"]
    shmem = fields.get("Pss_Shmem", 0)
    return Walk(private, fields["Pss"] - shmem, shmem)


def allocated_bytes(fd: int) -> int:
    """Pages of a memory file that exist, mapped or not. Does not block."""
    return os.fstat(fd).st_blocks * 512


def find_children(parents: Collection[int], root: Path = Path("/")) -> dict[int, int]:
    """Processes whose parent is one of `parents`, with that parent. Reads every process of the machine."""
    children = {}
    for name in os.listdir(root / "proc"):
        if name.isdecimal():
            try:
                stat = (root / "proc" / name / "stat").read_text(errors="replace")
            except OSError:  # it has just ended
                continue
            parent = int(stat.rpartition(")")[2].split()[1])  # the name before may hold anything
            if parent in parents:
                children[int(name)] = parent
    return children


def _fields(text: str) -> dict[str, int]:
    """`Name:   123 kB` lines as bytes."""
    found = {}
    for line in text.splitlines():
        if line.endswith(" kB"):
            name, value, _ = line.rsplit(None, 2)
            found[name.rstrip(":")] = int(value) << 10
    return found
