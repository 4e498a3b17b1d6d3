"""One child process of the gateway and the channel to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from serverlesslora.gateway.commands import Command
from serverlesslora_ipc.channel import AsyncChannel
from serverlesslora_ipc.messages import Message

Received = TypeVar("Received", bound=Message)

LEAVE_DEADLINE_S = 3.0


class StartChild(Protocol):
    def __call__(self, command: Command, receives: Any, *, max_fds: int = 0) -> Child[Any]: ...


class Child(Generic[Received]):
    """A process started as `python -m module --fd N ...`; its end of the socketpair is descriptor N.

    Start it from the main thread: children ask to die with the *thread* that started them.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        receives: Any,
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        max_fds: int = 0,
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno()), *arguments],
                pass_fds=(theirs.fileno(), *pass_fds),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
            )
        self.channel: AsyncChannel[Received] = AsyncChannel(ours, receives, max_fds=max_fds)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Nothing, if it has ended already."""
        self._process.kill()

    async def stop(self) -> int:
        """Closing the channel asks it to leave; after a while it is killed. Returns its exit status and reaps it, also
        when who waits for that is cancelled."""
        self.channel.close()
        stopping = asyncio.create_task(self._stop())
        try:
            return await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping
            raise

    async def _stop(self) -> int:
        with contextlib.suppress(TimeoutError):
            return await self._wait(LEAVE_DEADLINE_S)
        self._process.kill()
        return await self._wait(None)

    async def _wait(self, timeout_s: float | None) -> int:
        async with asyncio.timeout(timeout_s):
            while (status := self._process.poll()) is None:
                # No SIGCHLD handler of ours: the loop belongs to whoever embeds the gateway.
                await asyncio.sleep(0.01)
        return status
