"""Taking turns on a device: one worker steps at a time, with every core to itself, in the order in which they asked.

Two thread pools that compute at once on the same cores make each other many times slower (barriers wait for
descheduled threads), so a step is done in a turn. A single lock would not do: the kernel wakes everybody who waits for
it and promises no order, and a worker that steps in a loop takes it again before anybody has woken up.

So workers queue, each behind one other, as in the lock of Craig and of Landin and Hagersten (CLH), with byte ranges of
one anonymous file in the place of spinning on memory. Whoever wants a turn draws the next ticket, locks the byte of
that ticket, and waits until the byte of the ticket before is free; then it locks the byte that stands for the device.
When a turn ends only the next one wakes. The kernel frees the locks of a process that dies, however it dies: who stood
behind a dead holder goes on, who stood behind a dead waiter moves up and waits for the device itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator

RECENT_S = 0.05  # who ended a turn so long ago has sent its results by now and would be back

_DOOR, _DEVICE, _FIRST_TICKET = 0, 1, 2  # bytes: of drawing a ticket, of the turn itself, of ticket 0
_SIZE = mmap.PAGESIZE  # holds what all know; locks may lie far beyond the end
_NUM_DRAWN = struct.Struct("q")  # tickets; at 0
_ENDED_AT = struct.Struct("d")  # of the last turn, by CLOCK_MONOTONIC; at 8
_FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, length, pid


class DeviceLease:
    def __init__(self, fd: int | None) -> None:
        """`fd` may be shared with other processes; None is a device nobody else uses."""
        # Locks belong to the open file description: re-opening gives this process one of its own.
        self._fd = None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._shared = None if self._fd is None else mmap.mmap(self._fd, _SIZE)
        self._ticket = -1
        self._others_are_active = False

    @contextlib.contextmanager
    def turn(self) -> Iterator[float]:
        """Yields for how many seconds it was waited for."""
        if self._fd is None:
            yield 0.0
            return
        began = time.monotonic()
        ticket = self._draw()
        try:
            if ticket > 0:
                before = _FIRST_TICKET + ticket - 1
                self._lock(before, fcntl.F_RDLCK)
                self._lock(before, fcntl.F_UNLCK)
            self._lock(_DEVICE)
            self._others_are_active = ticket != self._ticket + 1 and began - self._ended_at < RECENT_S
            self._ticket = ticket
            yield time.monotonic() - began
            self._ended_at = time.monotonic()
        finally:
            self._lock(_DEVICE, fcntl.F_UNLCK)
            self._lock(_FIRST_TICKET + ticket, fcntl.F_UNLCK)

    def is_contended(self) -> bool:
        """In a turn: others wait, or had one until a moment ago and will be back when they have sent its results."""
        return self._shared is not None and (self._others_are_active or self._num_drawn > self._ticket + 1)

    def close(self) -> None:
        if self._fd is not None and self._shared is not None:
            self._shared.close()
            os.close(self._fd)
            self._fd = self._shared = None

    @property
    def _num_drawn(self) -> int:
        assert self._shared is not None
        count: int = _NUM_DRAWN.unpack_from(self._shared, 0)[0]
        return count

    @property
    def _ended_at(self) -> float:
        assert self._shared is not None
        seconds: float = _ENDED_AT.unpack_from(self._shared, 8)[0]
        return seconds

    @_ended_at.setter
    def _ended_at(self, seconds: float) -> None:
        assert self._shared is not None
        _ENDED_AT.pack_into(self._shared, 8, seconds)

    def _draw(self) -> int:
        """Take the next ticket; its byte is locked before anybody can stand behind it."""
        assert self._shared is not None
        self._lock(_DOOR)
        try:
            ticket = self._num_drawn
            self._lock(_FIRST_TICKET + ticket)
            _NUM_DRAWN.pack_into(self._shared, 0, ticket + 1)
            return ticket
        finally:
            self._lock(_DOOR, fcntl.F_UNLCK)

    def _lock(self, byte: int, kind: int = fcntl.F_WRLCK) -> None:
        assert self._fd is not None
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def create_lease_fd() -> int:
    """An anonymous file to lock; nothing is left behind when its last holder ends."""
    fd = os.memfd_create("serverlesslora-lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _SIZE)
    # Every worker maps it: one that cut it short would end all others.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
