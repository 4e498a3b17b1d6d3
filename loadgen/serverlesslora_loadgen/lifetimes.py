"""How much memory a group of processes really holds, by /proc alone: whatever server it is, and whatever it says.

held = private and file pages of every process (proportional: a page that n processes map counts 1/n in each, also those
outside of the group) + every shared memory file once, whether anybody maps it or only keeps it open.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

MEMORY_FILES = ("/memfd:", "/dev/shm/", "/dev/zero (deleted)", "/SYSV")
_IS_SHARED = re.compile("|".join(map(re.escape, MEMORY_FILES)))


class Held(NamedTuple):
    """Bytes of a group at one moment."""

    pids: dict[int, int]  # process → its private and file pages
    shared_bytes: int  # memory files, each once

    @property
    def total_bytes(self) -> int:
        return sum(self.pids.values()) + self.shared_bytes


def members(group: int, root: Path = Path("/proc")) -> list[int]:
    """Living processes of the group, also those whose parent is gone."""
    found = []
    for entry in os.scandir(root):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, its_group = (
                    Path(entry.path, "stat").read_text("utf-8", "replace").rpartition(") ")[2].split()[:3]
                )
                if int(its_group) == group and state != "Z":
                    found.append(int(entry.name))
    return sorted(found)


def look(group: int, root: Path = Path("/proc")) -> Held | None:
    """Walks page tables: milliseconds per gigabyte, without the interpreter's lock. None: nobody of the group lives.

    Processes of other users are invisible to us and count nothing.
    """
    pids: dict[int, int] = {}
    mapped_shared = 0  # proportional
    files = _Files()
    for pid in members(group, root):
        with contextlib.suppress(OSError):  # it may end while it is looked at
            sizes = _rollup((root / str(pid) / "smaps_rollup").read_text())
            pids[pid] = sizes["Pss_Anon"] + sizes["Pss_File"]
            mapped_shared += sizes["Pss_Shmem"]
            files.add_open(root / str(pid) / "fd")
            files.add_mapped(root / str(pid) / "maps")
    return Held(pids, files.total_bytes(mapped_shared)) if pids else None


class _Files:
    """Shared memory by (device, inode): a file that ten processes have is there once."""

    def __init__(self) -> None:
        self._allocated: dict[tuple[int, int], int] = {}  # of files somebody has open: pages that exist
        self._mapped: dict[tuple[int, int], int] = {}  # of the others only how far they reach is known

    def add_open(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith(MEMORY_FILES):
                        self._add_allocated(os.stat(entry.path))

    def add_mapped(self, maps: Path) -> None:
        with contextlib.suppress(OSError):
            for line in maps.read_text("utf-8", "replace").splitlines():
                if not _IS_SHARED.search(line):  # processes with large libraries have thousands of lines
                    continue
                addresses, _, offset, device, inode, *path = line.split(None, 5)
                if path and path[0].startswith(MEMORY_FILES):
                    begin, end = (int(each, 16) for each in addresses.split("-"))
                    key = os.makedev(*(int(each, 16) for each in device.split(":"))), int(inode)
                    self._mapped[key] = max(self._mapped.get(key, 0), int(offset, 16) + end - begin)
                    if path[0].startswith("/dev/shm/"):
                        with contextlib.suppress(OSError):
                            self._add_allocated(os.stat(path[0]))

    def _add_allocated(self, facts: os.stat_result) -> None:
        self._allocated[facts.st_dev, facts.st_ino] = 512 * facts.st_blocks

    def total_bytes(self, mapped_shared: int) -> int:
        """`mapped_shared`: proportional pages of shared memory, of all processes. A mapping may reach far beyond the
        pages that exist, so what nobody has open counts no more than that."""
        reach = sum(size for key, size in self._mapped.items() if key not in self._allocated)
        return sum(self._allocated.values()) + min(reach, mapped_shared)


def _rollup(text: str) -> dict[str, int]:
    """Bytes by name; kernels before 5.0 do not split `Pss`, then all of it counts as private."""
    sizes = {"Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
    whole = 0
    for line in text.splitlines():
        kind, _, rest = line.partition(":")
        if kind in sizes:
            sizes[kind] = int(rest.split()[0]) << 10
        elif kind == "Pss":
            whole = int(rest.split()[0]) << 10
    return sizes if any(sizes.values()) else sizes | {"Pss_Anon": whole}
