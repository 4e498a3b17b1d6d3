"""Taking turns on a device: one worker steps at a time, with every core to itself.

Two thread pools that compute at once on the same cores make each other many times slower (barriers wait for
descheduled threads), so a step is done under an exclusive `flock` on a descriptor every worker of the device shares.
The kernel releases it when its holder dies, so a killed worker frees its lease by construction.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


class DeviceLease:
    def __init__(self, fd: int | None) -> None:
        """`fd` may be shared with other processes; None is a device nobody else uses."""
        # A lock belongs to the open file description: re-opening gives this process one of its own.
        self._fd = None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        if self._fd is None:
            yield
            return
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def create_lease_fd() -> int:
    """An anonymous file to lock; nothing is left behind when its last holder ends."""
    return os.memfd_create("serverlesslora-lease", os.MFD_CLOEXEC)
