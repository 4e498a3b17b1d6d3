"""Workers that are spawned: processes of their own from the start, with nothing ready for them.

A process speaks the launcher's protocol (see `serverlesslora.launcher.alone`), and goes on holding that channel as a
worker: when it ends, so has the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from serverlesslora.errors import Unavailable
from serverlesslora.gateway.child import Child, StartChild
from serverlesslora.gateway.commands import Command
from serverlesslora.gateway.memory_host import MemoryHost
from serverlesslora_ipc.channel import ChannelClosed
from serverlesslora_ipc.messages import Fork, Forked, LauncherFailed, LauncherToGateway, Prepare, Prepared

log = logging.getLogger("serverlesslora.backbone")


class SpawnerOwner(Protocol):
    def worker_prepared(self, worker_id: str, prepared: Prepared) -> None: ...

    def worker_failed(self, worker_id: str, reason: str) -> None:
        """Told before its channel ends."""

    def worker_gone(self) -> None: ...


class Spawner:
    def __init__(
        self,
        name: str,
        owner: SpawnerOwner,
        memory: MemoryHost | None,
        start: StartChild,
        command: Callable[[], Command],
    ) -> None:
        """`memory`: what its workers map; None where each loads a copy of its own."""
        self._name = name
        self._owner = owner
        self._memory = memory
        self._start = start
        self._command = command
        self._children: dict[str, Child[LauncherToGateway]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pids(self) -> dict[str, int]:
        """Worker id -> pid, also of those that are not workers yet."""
        return {worker_id: child.pid for worker_id, child in self._children.items()}

    def make(self, fork: Fork, connection: socket.socket) -> None:
        """Takes over the worker's end of its channel. Raises Unavailable when no process can be had."""
        try:
            child: Child[LauncherToGateway] = self._start(self._command(), LauncherToGateway)
        except OSError as error:
            connection.close()
            log.warning("cannot start a worker of %s: %s", self._name, error)
            raise Unavailable(f"no process can be started for {self._name!r} now", retry_after_s=5) from None
        self._children[fork.worker_id] = child
        task = asyncio.create_task(self._run(child, fork, connection), name=f"process of {fork.worker_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end_worker(self, worker_id: str) -> None:
        if (child := self._children.get(worker_id)) is not None:
            child.kill()

    async def shutdown(self) -> None:
        await asyncio.sleep(0)  # one cancelled before its first step would leave its process behind
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, child: Child[LauncherToGateway], fork: Fork, connection: socket.socket) -> None:
        """One process's life. The worker's end of its channel stays open here until the process has its own copy and
        has become a worker: else whoever waits would hear of the end before its reason."""
        try:
            with connection, contextlib.suppress(ChannelClosed):
                await self._listen(child, fork, connection)
        finally:
            status = await child.stop()
            del self._children[fork.worker_id]
            self._owner.worker_gone()
        if status:
            log.warning("worker %s ended with status %s", fork.worker_id, status)

    async def _listen(self, child: Child[LauncherToGateway], fork: Fork, connection: socket.socket) -> None:
        """Until the process ends."""
        prepare, memory_fds = Prepare(backbone=self._name), list[int]()
        if self._memory is not None:
            # The process imports its libraries meanwhile, if the memory has to be loaded first.
            sealed = await self._memory.settled()
            if sealed is None:
                self._owner.worker_failed(fork.worker_id, "its backbone could not be loaded")
                return
            prepare, memory_fds = Prepare(backbone=self._name, sharing=sealed.published.sharing), sealed.fds
        child.channel.send([prepare, fork], [*memory_fds, connection.fileno()])
        async for frame in child.channel:
            for message in frame.messages:
                match message:
                    case Prepared():
                        self._owner.worker_prepared(fork.worker_id, message)
                    case Forked():
                        connection.close()
                    case LauncherFailed():
                        self._owner.worker_failed(fork.worker_id, message.reason)
