"""One backbone's processes: its host and its launcher, started, restarted and asked for workers.

The gateway keeps the host's descriptors too. Memory lives as long as a descriptor does, so a host that dies is
replaced by one that adopts them, and a launcher that dies is replaced without loading anything; workers that run
notice neither. Where a device shares without descriptors (`cuda-ipc`), the memory dies with its host: its workers are
ended and it is loaded again.

A backbone that was altered in memory is not served any more: nobody can tell which answers would be wrong. Its workers
are ended, new ones refused, and /health says so until the server is restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from weakref import WeakSet

import msgspec

from serverlesslora.config import BackboneConfig, Dtype
from serverlesslora.devices import FALLBACKS, SENTENCES, DeviceKind
from serverlesslora.errors import ConfigError, ServerlessLoraError, Unavailable
from serverlesslora.gateway.child import Child
from serverlesslora.gateway.commands import host_command, launcher_command
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora_ipc.channel import AsyncChannel, ChannelClosed
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import (
    Adopt,
    BackboneFailed,
    Exited,
    Fork,
    Forked,
    HostToGateway,
    LauncherFailed,
    LauncherToGateway,
    Prepare,
    Prepared,
    Progress,
    Published,
    Ready,
    Verified,
    Verify,
    WorkerLimits,
    WorkerToGateway,
)

log = logging.getLogger("serverlesslora.backbone")

MAX_BACKOFF_S = 10.0
MAX_FAILED_STARTS = 3

# What a worker on a device that only looks at an adapter may take for a KV cache it will not use.
INSPECTION_KV_BYTES = 64 << 20


class Sealed(NamedTuple):
    """The published memory: descriptors this process holds, never maps."""

    weights_fd: int | None  # None: shared by handle, which keeps nothing alive
    manifest_fd: int
    published: Published

    @property
    def fds(self) -> list[int]:
        return [self.manifest_fd] if self.weights_fd is None else [self.weights_fd, self.manifest_fd]


class BackboneStatus(msgspec.Struct, frozen=True):
    name: str
    state: str  # "loading", "preparing", "ready", "altered"
    sharing: str
    size_bytes: int
    content_digest: str | None
    host_pid: int | None
    launcher_pid: int | None
    context_length: int | None
    restarts: int
    device: str = "cpu"  # its kind, and its name once a worker has told it
    graphs: str = ""  # as the last worker told it; empty on cpu and before the first


class BackboneService:
    def __init__(
        self,
        name: str,
        config: BackboneConfig,
        *,
        dtype: Dtype,
        device: DeviceKind,
        limits: WorkerLimits,
        lease_fd: int,
        adapter_bytes: int,
        state_dir: str,
        warm_pool: int,
        on_progress: Callable[[str, Progress], None] = lambda name, progress: None,
    ) -> None:
        self.name = name
        self._config = config
        self._dtype = dtype
        self._device = device
        self._limits = limits
        self._lease_fd = lease_fd
        self._adapter_bytes = adapter_bytes
        self._warm_pool = warm_pool
        self._state_dir = state_dir
        self._on_progress = on_progress
        self._host: Child[HostToGateway] | None = None
        self._launcher: Child[LauncherToGateway] | None = None  # prepared, so that it can be asked for workers
        self._preparing: Child[LauncherToGateway] | None = None  # the same one, also before it is prepared
        self._sealed: Sealed | None = None
        self._has_published = False
        self._published = asyncio.Event()
        self._ready = asyncio.Event()
        self._prepared: Prepared | None = None
        self._verifying: asyncio.Future[Verified] | None = None
        self._failure: ServerlessLoraError | None = None
        self._is_altered = False
        self._told: Ready | None = None  # what the last worker said of its device
        self._links: WeakSet[WorkerLink] = WeakSet()
        self._worker_ids = itertools.count(1)
        self._restarts = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.pids: dict[str, int] = {}  # worker id -> pid

    # --- life

    def startup(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep_alive(self._run_host), name=f"host {self.name}"),
            asyncio.create_task(self._keep_alive(self._run_launcher), name=f"launcher {self.name}"),
        ]

    async def shutdown(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._forget_memory()

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises ConfigError when the backbone cannot be loaded, Unavailable when it is not ready in time or was
        altered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        if self._failure is not None:
            raise self._failure
        if not self._ready.is_set():
            raise Unavailable(f"the backbone {self.name!r} is not ready yet", retry_after_s=5)

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set() and self._failure is None

    @property
    def is_failed(self) -> bool:
        return self._failure is not None

    @property
    def context_length(self) -> int | None:
        return self._prepared.context_length if self._prepared else None

    @property
    def content_digest(self) -> str | None:
        return self._sealed.published.content_digest if self._sealed else None

    @property
    def is_altered(self) -> bool:
        """Its digest was found to be another than when it was loaded."""
        return self._is_altered

    def status(self) -> BackboneStatus:
        state = "ready" if self.is_ready else "preparing" if self._published.is_set() else "loading"
        return BackboneStatus(
            name=self.name,
            state="altered" if self._is_altered else state,
            sharing=SENTENCES[self._sealed.published.sharing] if self._sealed else "not loaded yet",
            size_bytes=self._sealed.published.size_bytes if self._sealed else 0,
            content_digest=self.content_digest,
            host_pid=self._host.pid if self._host else None,
            launcher_pid=self._launcher.pid if self._launcher else None,
            context_length=self.context_length,
            restarts=self._restarts,
            device=self._told.device if self._told else self._device,
            graphs=self._told.graphs if self._told else "",
        )

    async def verify(self) -> Verified:
        """The content digest recomputed from the memory itself. Raises Unavailable while no host can be asked."""
        if self._host is None or self._sealed is None:
            raise Unavailable(f"the host of {self.name!r} is not there yet", retry_after_s=1)
        if self._verifying is None or self._verifying.done():
            self._verifying = asyncio.get_running_loop().create_future()
            try:
                self._host.channel.send([Verify()])
            except ChannelClosed:
                self._give_up_verifying()
        return await asyncio.shield(self._verifying)

    def _give_up_verifying(self) -> None:
        if self._verifying is not None and not self._verifying.done():
            self._verifying.set_exception(Unavailable(f"the host of {self.name!r} is restarting", retry_after_s=1))

    # --- workers

    def fork(self, domain: str, *, may_be_spare: bool = True) -> WorkerLink:
        """Ask the launcher for a worker. Raises Unavailable while there is no launcher to ask, or no backbone that may
        be served."""
        if self._is_altered and self._failure is not None:
            raise self._failure
        if self._launcher is None or not self.is_ready:
            raise Unavailable(f"the backbone {self.name!r} is not ready yet", retry_after_s=5)
        worker_id = f"{self.name}-{next(self._worker_ids)}"
        limits = self._limits
        if self._device != "cpu" and not may_be_spare:
            limits = msgspec.structs.replace(limits, kv_bytes=INSPECTION_KV_BYTES)
        ours, theirs = socket.socketpair()
        with theirs:
            channel: AsyncChannel[WorkerToGateway] = AsyncChannel(ours, WorkerToGateway)
            try:
                fork = Fork(worker_id=worker_id, domain=domain, limits=limits, may_be_spare=may_be_spare)
                self._launcher.channel.send([fork], [theirs.fileno()])
            except (ChannelClosed, OSError) as error:  # OSError: no descriptor is left to send one
                channel.close()
                log.warning("cannot ask the launcher of %s: %s", self.name, error)
                raise Unavailable(f"the launcher of {self.name!r} is restarting", retry_after_s=1) from None
        link = WorkerLink(
            worker_id,
            domain,
            channel,
            adapter_bytes=self._adapter_bytes,
            end_process=lambda: self._end_worker(worker_id),
        )
        self._links.add(link)
        if may_be_spare:  # one that only looks at an adapter captures nothing
            link.ready.add_done_callback(self._learn)
        return link

    def _learn(self, ready: asyncio.Future[Ready]) -> None:
        if not ready.cancelled() and ready.exception() is None:
            self._told = ready.result()

    def _end_worker(self, worker_id: str) -> None:
        # The pid comes from the launcher: what a worker says of itself must not decide whom we kill.
        if (pid := self.pids.get(worker_id)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- supervision

    async def _keep_alive(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run one process after another until told to stop; the pause grows while they die young."""
        backoff_s = 0.1
        while self._failure is None:
            started = time.monotonic()
            try:
                await run()
            except Exception:  # such as: no process or descriptor is left to be had; there may be one later
                log.exception("a process of backbone %s could not be run", self.name)
            if self._failure is not None:
                return
            self._restarts += 1
            if not self._ready.is_set() and self._prepared is None and self._restarts >= MAX_FAILED_STARTS:
                self._fail(f"its processes ended {self._restarts} times before it was ready; see the log")
                return
            backoff_s = 0.1 if time.monotonic() - started > MAX_BACKOFF_S else min(2 * backoff_s, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _run_host(self) -> None:
        command = host_command(
            self._config, self._dtype, self._device, adopts=self._sealed is not None, state_dir=self._state_dir
        )
        host: Child[HostToGateway] = Child(
            command.module, command.arguments, HostToGateway, env=command.env, pass_fds=command.pass_fds, max_fds=2
        )
        self._host = host
        try:
            if self._sealed is not None:
                host.channel.send([Adopt()], self._sealed.fds)
            async for frame in host.channel:
                for message in frame.messages:
                    match message:
                        case Progress():
                            self._on_progress(self.name, message)
                        case Published():
                            self._keep(frame.fds, message)
                        case BackboneFailed():
                            self._report_failure(message.reason, worked_before=self._has_published)
                        case Verified():
                            self._hear_verified(message)
        except ChannelClosed:
            pass
        finally:
            self._host = None
            self._give_up_verifying()
            status = await host.stop()
        log.warning("host of backbone %s ended with status %s", self.name, status)
        if self._failure is not None:
            return
        if not self._has_published:
            self._fail(f"its host process ended with status {status} while loading")
        elif self._sealed is not None and self._sealed.weights_fd is None:
            log.error("the memory of %s is gone with its host: its workers are ended and it is loaded again", self.name)
            self._forget_memory()
            self._published.clear()
            self._ready.clear()
            if self._preparing is not None:
                self._preparing.channel.close()
            self._end_workers()

    async def _run_launcher(self) -> None:
        # Started before the weights are there: it imports its libraries while the host loads.
        command = launcher_command(
            self._device, threads=self._limits.threads, lease_fd=self._lease_fd, state_dir=self._state_dir
        )
        launcher: Child[LauncherToGateway] = Child(
            command.module, command.arguments, LauncherToGateway, env=command.env, pass_fds=command.pass_fds
        )
        self._preparing = launcher
        try:
            await self._published.wait()
            if self._failure is not None or self._sealed is None:
                return
            prepare = Prepare(
                backbone=self.name,
                num_spares=self._warm_pool,
                limits=self._limits,
                sharing=self._sealed.published.sharing,
                handle=self._sealed.published.handle,
            )
            launcher.channel.send([prepare], self._sealed.fds)
            async for frame in launcher.channel:
                for message in frame.messages:
                    match message:
                        case Prepared():
                            self._prepared = message
                            self._launcher = launcher
                            self._check_limits(message)
                            self._ready.set()
                        case Forked():
                            self.pids[message.worker_id] = message.pid
                        case Exited():
                            self.pids.pop(message.worker_id, None)
                            if message.status:
                                log.warning("worker %s ended with status %s", message.worker_id, message.status)
                        case LauncherFailed(worker_id=None):
                            self._report_failure(message.reason, worked_before=self._prepared is not None)
                        case LauncherFailed():
                            # Its end of the channel is closed by now: whoever waits for this worker hears that.
                            log.warning("no worker %s: %s", message.worker_id, message.reason)
        except ChannelClosed:
            pass
        finally:
            self._launcher = self._preparing = None
            if self._failure is None:
                self._ready.clear()
            status = await launcher.stop()
        log.warning("launcher of backbone %s ended with status %s", self.name, status)

    def _keep(self, fds: list[int], published: Published) -> None:
        if self._sealed is not None:  # an adopting host says what it holds; we hold the same memory already
            close_fds(fds)
            return
        *weights, manifest_fd = fds
        assert len(weights) == (published.sharing != "cuda-ipc")
        self._sealed = Sealed(weights[0] if weights else None, manifest_fd, published)
        self._has_published = True
        if published.sharing in FALLBACKS:
            log.warning("the backbone %s is shared by a fallback: %s", self.name, SENTENCES[published.sharing])
        self._published.set()

    def _forget_memory(self) -> None:
        if self._sealed is not None:
            close_fds(self._sealed.fds)
            self._sealed = None

    def _hear_verified(self, verified: Verified) -> None:
        """The answer to Verify; where workers could write, the host also says unasked what it found while idle."""
        if self._verifying is not None and not self._verifying.done():
            self._verifying.set_result(verified)
        if verified.intact or self._is_altered:
            return
        log.error(
            "the backbone %s was ALTERED in memory (its digest is now %s): its workers are ended and it is not served "
            "any more; restart the server",
            self.name,
            verified.content_digest,
        )
        self._is_altered = True
        self._failure = Unavailable(
            f"the backbone {self.name!r} was altered in memory and is not served until the server is restarted",
            retry_after_s=60,
        )
        self._published.set()
        self._ready.set()  # whoever waits must hear why
        self._end_workers()

    def _end_workers(self) -> None:
        for link in list(self._links):
            link.kill()

    def _report_failure(self, reason: str, *, worked_before: bool) -> None:
        """What worked once will work again: only a first failure is the configuration's."""
        if worked_before:
            log.error("a process of backbone %s failed and is started again: %s", self.name, reason)
        else:
            self._fail(reason)

    def _check_limits(self, prepared: Prepared) -> None:
        needed = prepared.kv_bytes_per_token * self._limits.block_size
        if 0 < self._limits.kv_bytes < needed:  # 0: sized from what is free
            self._fail(f"one KV block needs {needed} bytes, --kv-memory-mb allows {self._limits.kv_bytes}")

    def _fail(self, reason: str) -> None:
        """Loading failed: nothing here will work, and whoever waits must hear why."""
        self._failure = ConfigError(f"backbone {self.name!r} cannot be served: {reason}")
        self._published.set()
        self._ready.set()
