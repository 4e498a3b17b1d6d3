"""Processes that became ours because their own parent died, as they do where the gateway is process 1 of a container.

They are nobody's to wait for, and stay in the process table until somebody does. A child of ours is waited for by who
started it, and soon; so only what is still there at the second look is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from serverlesslora_ipc import process

log = logging.getLogger("serverlesslora.server")

INTERVAL_S = 1.0


class Orphans:
    def __init__(self) -> None:
        self._seen: int | None = None

    def look(self) -> int | None:
        """The pid of one that was reaped, if one was."""
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            ended = None
        pid = ended.si_pid if ended is not None else None
        if pid is None or pid != self._seen:
            self._seen = pid
            return None
        self._seen = None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return pid


async def reap_orphans(interval_s: float = INTERVAL_S) -> None:
    """Until cancelled; returns at once where orphans go to somebody else."""
    if os.getpid() != 1 and not process.gets_orphans():
        return
    orphans = Orphans()
    while True:
        await asyncio.sleep(interval_s)
        while (pid := orphans.look()) is not None:
            log.info("process %d, which had lost its parent, has ended", pid)
