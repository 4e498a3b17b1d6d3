"""A backbone's shared memory and the host process that loads it, holds it and verifies it.

The gateway keeps the descriptors too. Memory lives as long as a descriptor does, so a host that dies is replaced by one
that adopts them. Where a device shares without descriptors (`cuda-ipc`), the memory dies with its host and is loaded
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import NamedTuple, Protocol

from serverlesslora.devices import FALLBACKS, SENTENCES
from serverlesslora.errors import Unavailable
from serverlesslora.gateway.child import Child, StartChild
from serverlesslora.gateway.commands import Command
from serverlesslora_ipc.channel import ChannelClosed
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import Adopt, BackboneFailed, HostToGateway, Progress, Published, Verified, Verify

log = logging.getLogger("serverlesslora.backbone")


class Sealed(NamedTuple):
    """The published memory: descriptors this process holds, never maps."""

    weights_fd: int | None  # None: shared by handle, which keeps nothing alive
    manifest_fd: int
    published: Published

    @property
    def fds(self) -> list[int]:
        return [self.manifest_fd] if self.weights_fd is None else [self.weights_fd, self.manifest_fd]


class HostCommand(Protocol):
    def __call__(self, *, adopts: bool) -> Command: ...


class HostOwner(Protocol):
    """Who is told what becomes of the memory."""

    def memory_loading(self, progress: Progress) -> None: ...

    def memory_published(self, published: Published) -> None: ...

    def memory_failed(self, reason: str) -> None:
        """It could not be loaded, and had not been since it was last let go."""

    def memory_lost(self) -> None:
        """It is gone, whoever used it, and will be loaded again."""

    def memory_altered(self, digest: str) -> None: ...


class MemoryHost:
    def __init__(
        self,
        name: str,
        owner: HostOwner,
        start: StartChild,
        command: HostCommand,
        *,
        on_demand: bool = False,
    ) -> None:
        """On demand means: not before `want`."""
        self._name = name
        self._owner = owner
        self._start = start
        self._command = command
        self._host: Child[HostToGateway] | None = None
        self._let_go_host: Child[HostToGateway] | None = None
        self._sealed: Sealed | None = None
        self._has_published = False  # since it was last let go
        self._wanted = asyncio.Event()
        self._settled = asyncio.Event()
        self._verifying: asyncio.Future[Verified] | None = None
        if not on_demand:
            self._wanted.set()

    @property
    def pid(self) -> int | None:
        return self._host.pid if self._host else None

    @property
    def sealed(self) -> Sealed | None:
        return self._sealed

    @property
    def is_settled(self) -> bool:
        """It was published or given up."""
        return self._settled.is_set()

    @property
    def is_wanted(self) -> bool:
        return self._wanted.is_set()

    async def settled(self) -> Sealed | None:
        """The memory; None when it was given up."""
        await self._settled.wait()
        return self._sealed

    def want(self) -> None:
        """Load it, if it is not there or under way."""
        if not self._wanted.is_set():
            self._settled.clear()
            self._wanted.set()

    def give_up(self) -> None:
        """Whoever waits for it hears that it will not come."""
        self._settled.set()

    def let_go(self) -> None:
        """Give the memory back until it is wanted again; processes that map it keep what they have mapped."""
        self._wanted.clear()
        self._settled.clear()
        self._has_published = False
        self.forget()
        if self._host is not None:
            self._let_go_host = self._host
            self._host.channel.close()  # it follows

    def forget(self) -> None:
        if self._sealed is not None:
            close_fds(self._sealed.fds)
            self._sealed = None

    async def verify(self) -> Verified:
        """The content digest recomputed from the memory itself. Raises Unavailable while no host can be asked."""
        if self._host is None or self._sealed is None:
            raise Unavailable(f"the host of {self._name!r} is not there yet", retry_after_s=1)
        if self._verifying is None or self._verifying.done():
            self._verifying = asyncio.get_running_loop().create_future()
            try:
                self._host.channel.send([Verify()])
            except ChannelClosed:
                self._give_up_verifying()
        return await asyncio.shield(self._verifying)

    def _give_up_verifying(self) -> None:
        if self._verifying is not None and not self._verifying.done():
            self._verifying.set_exception(Unavailable(f"the host of {self._name!r} is restarting", retry_after_s=1))

    # --- one host's life

    async def run(self) -> None:
        """Returns when a host that is still wanted has ended."""
        while True:
            while not self._wanted.is_set():  # it may have been let go again before this woke
                await self._wanted.wait()
            host: Child[HostToGateway] = self._start(
                self._command(adopts=self._sealed is not None), HostToGateway, max_fds=2
            )
            self._host = host
            try:
                has_told = await self._listen(host)
            finally:
                self._give_up_verifying()
                status = await host.stop()
                self._host = None
            if self._let_go_host is host:
                continue
            log.warning("host of backbone %s ended with status %s", self._name, status)
            if not has_told:
                self._explain(status)
            if self._wanted.is_set():
                return

    async def _listen(self, host: Child[HostToGateway]) -> bool:
        """Until its channel ends; whether it has told why."""
        has_told = False
        with contextlib.suppress(ChannelClosed):
            if self._sealed is not None:
                host.channel.send([Adopt()], self._sealed.fds)
            async for frame in host.channel:
                for message in frame.messages:
                    match message:
                        case Progress():
                            self._owner.memory_loading(message)
                        case Published():
                            self._keep(frame.fds, message)
                        case BackboneFailed() if self._has_published:
                            log.error("the host of %s failed and is started again: %s", self._name, message.reason)
                        case BackboneFailed():
                            has_told = True
                            self._owner.memory_failed(message.reason)
                        case Verified():
                            self._hear_verified(message)
        return has_told

    def _keep(self, fds: list[int], published: Published) -> None:
        if self._sealed is not None:  # an adopting host says what it holds; we hold the same memory already
            close_fds(fds)
            return
        *weights, manifest_fd = fds
        assert len(weights) == (published.sharing != "cuda-ipc")
        self._sealed = Sealed(weights[0] if weights else None, manifest_fd, published)
        self._has_published = True
        if published.sharing in FALLBACKS:
            log.warning("the backbone %s is shared by a fallback: %s", self._name, SENTENCES[published.sharing])
        self._settled.set()
        self._owner.memory_published(published)

    def _hear_verified(self, verified: Verified) -> None:
        """The answer to Verify; where workers could write, the host also says unasked what it found while idle."""
        if self._verifying is not None and not self._verifying.done():
            self._verifying.set_result(verified)
        if not verified.intact:
            self._owner.memory_altered(verified.content_digest)

    def _explain(self, status: int) -> None:
        if not self._has_published:
            self._owner.memory_failed(f"its host process ended with status {status} while loading")
        elif self._sealed is not None and self._sealed.weights_fd is None:
            log.error(
                "the memory of %s is gone with its host: its workers are ended and it is loaded again", self._name
            )
            self.forget()
            self._settled.clear()
            self._owner.memory_lost()
