"""Counts what the processes of this machine hold of an emulated device, the way a GPU's driver would know it."""

from __future__ import annotations

import os
from contextlib import suppress


def link_of(file_name: str) -> str:
    return f"/memfd:{file_name} (deleted)"


def held_anywhere(file_name: str) -> dict[int, int]:
    """Inode -> size of every memory file of this name that any process of the machine has open or mapped.

    One whose only descriptor is on its way through a socket is missed until it arrives.
    """
    held: dict[int, int] = {}
    link = link_of(file_name)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it ended, or belongs to somebody else
            _add_open(f"/proc/{pid}/fd", link, held)
        with suppress(OSError):
            _add_mapped(f"/proc/{pid}/maps", link.encode(), held)
    return held


def _add_open(folder: str, link: str, held: dict[int, int]) -> None:
    for fd in os.listdir(folder):
        path = f"{folder}/{fd}"
        with suppress(OSError):  # closed since
            if os.readlink(path) == link:
                status = os.stat(path)
                held[status.st_ino] = status.st_size


def _add_mapped(path: str, link: bytes, held: dict[int, int]) -> None:
    with open(path, "rb") as file:
        text = file.read()
    if link not in text:
        return
    for line in text.splitlines():
        if not line.endswith(b" " + link):
            continue
        addresses, _, offset, _, inode, _ = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in addresses.split(b"-"))
        # Whole files are mapped, in one piece or in several of different access: the last one ends where the file does.
        held[int(inode)] = max(held.get(int(inode), 0), int(offset, 16) + end - start)
