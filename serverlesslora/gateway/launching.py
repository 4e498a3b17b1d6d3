"""The launcher process of one backbone, and the workers it forks on request.

Its workers outlive it: a launcher that dies is replaced without loading anything, and who runs notices nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from serverlesslora.errors import Unavailable
from serverlesslora.gateway.child import Child, StartChild
from serverlesslora.gateway.commands import Command
from serverlesslora.gateway.memory_host import MemoryHost
from serverlesslora_ipc.channel import ChannelClosed
from serverlesslora_ipc.messages import (
    Exited,
    Fork,
    Forked,
    LauncherFailed,
    LauncherToGateway,
    Prepare,
    Prepared,
    WorkerLimits,
)

log = logging.getLogger("serverlesslora.backbone")


class LauncherOwner(Protocol):
    """Who is told whether workers can be had."""

    def launcher_prepared(self, prepared: Prepared) -> None: ...

    def launcher_failed(self, reason: str) -> None: ...

    def launcher_gone(self) -> None: ...


class Launcher:
    def __init__(
        self,
        name: str,
        owner: LauncherOwner,
        memory: MemoryHost,
        start: StartChild,
        command: Callable[[], Command],
        *,
        limits: WorkerLimits,
        num_spares: int,
    ) -> None:
        self._name = name
        self._owner = owner
        self._memory = memory
        self._start = start
        self._command = command
        self._limits = limits
        self._num_spares = num_spares
        self._launcher: Child[LauncherToGateway] | None = None
        self._is_prepared = False  # so that it can be asked for workers
        self.pids: dict[str, int] = {}  # worker id -> pid

    @property
    def pid(self) -> int | None:
        """None until it can be asked for workers."""
        return self._launcher.pid if self._launcher and self._is_prepared else None

    def pids_by_role(self) -> dict[str, int]:
        if self._launcher is None:
            return {}
        pid = self._launcher.pid
        spares = sorted(_children(pid) - set(self.pids.values()))
        return {"launcher": pid} | {f"spare {number}": each for number, each in enumerate(spares)}

    def make(self, fork: Fork, connection: socket.socket) -> None:
        """Takes over the worker's end of its channel. Raises Unavailable while there is no launcher to ask."""
        with connection:
            if self._launcher is None or not self._is_prepared:
                raise Unavailable(f"the backbone {self._name!r} is not ready yet", retry_after_s=5)
            try:
                self._launcher.channel.send([fork], [connection.fileno()])
            except (ChannelClosed, OSError) as error:  # OSError: no descriptor is left to send one
                log.warning("cannot ask the launcher of %s: %s", self._name, error)
                raise Unavailable(f"the launcher of {self._name!r} is restarting", retry_after_s=1) from None

    def end_worker(self, worker_id: str) -> None:
        # The pid comes from the launcher: what a worker says of itself must not decide whom we kill.
        if (pid := self.pids.get(worker_id)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        """What it has mapped is gone."""
        if self._launcher is not None:
            self._launcher.channel.close()

    async def run(self) -> None:
        """One launcher's life."""
        # Started before the weights are there: it imports its libraries while the host loads.
        launcher: Child[LauncherToGateway] = self._start(self._command(), LauncherToGateway)
        self._launcher = launcher
        try:
            sealed = await self._memory.settled()
            if sealed is None:
                return
            prepare = Prepare(
                backbone=self._name,
                num_spares=self._num_spares,
                limits=self._limits,
                sharing=sealed.published.sharing,
                handle=sealed.published.handle,
            )
            launcher.channel.send([prepare], sealed.fds)
            async for frame in launcher.channel:
                for message in frame.messages:
                    self._hear(message)
        except ChannelClosed:
            pass
        finally:
            self._launcher = None
            self._is_prepared = False
            self._owner.launcher_gone()
            status = await launcher.stop()
        log.warning("launcher of backbone %s ended with status %s", self._name, status)

    def _hear(self, message: LauncherToGateway) -> None:
        match message:
            case Prepared():
                self._is_prepared = True
                self._owner.launcher_prepared(message)
            case Forked():
                self.pids[message.worker_id] = message.pid
            case Exited():
                self.pids.pop(message.worker_id, None)
                if message.status:
                    log.warning("worker %s ended with status %s", message.worker_id, message.status)
            case LauncherFailed(worker_id=None):
                self._owner.launcher_failed(message.reason)
            case LauncherFailed():
                # Its end of the channel is closed by now: whoever waits for this worker hears that.
                log.warning("no worker %s: %s", message.worker_id, message.reason)


def _children(pid: int) -> set[int]:
    """Nothing where the kernel does not tell, or the process is gone."""
    with contextlib.suppress(OSError):
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return set()
