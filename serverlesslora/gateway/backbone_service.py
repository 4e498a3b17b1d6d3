"""One backbone's processes: its host and its launcher, started, restarted and asked for workers.

The gateway keeps the host's sealed descriptors too. Memory lives as long as a descriptor does, so a host that dies is
replaced by one that adopts them, and a launcher that dies is replaced without loading anything; workers that run
notice neither.
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

import msgspec

from serverlesslora.config import BackboneConfig, Dtype
from serverlesslora.errors import ConfigError, Unavailable
from serverlesslora.gateway.child import Child
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
    Verified,
    Verify,
    WorkerLimits,
    WorkerToGateway,
)

log = logging.getLogger("serverlesslora.backbone")

MAX_BACKOFF_S = 10.0
MAX_FAILED_STARTS = 3

# OpenMP threads keep spinning for a moment after a parallel region. Long enough to bridge the gap to the next region
# of a step, short enough to be asleep when another worker's turn begins.
LAUNCHER_ENV = {"GOMP_SPINCOUNT": "20000", "MALLOC_ARENA_MAX": "2"}

# With a thread per core, each stays on its own: else the kernel may put two on one core beside a foreign load, and
# every barrier of a step waits for a time slice.
PINNED_ENV = {"OMP_PROC_BIND": "true"}


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


class Sealed(NamedTuple):
    """The published memory: descriptors this process holds, never maps."""

    weights_fd: int
    manifest_fd: int
    published: Published


class BackboneStatus(msgspec.Struct, frozen=True):
    name: str
    state: str  # "loading", "preparing", "ready"
    sharing: str
    size_bytes: int
    content_digest: str | None
    host_pid: int | None
    launcher_pid: int | None
    context_length: int | None
    restarts: int


class BackboneService:
    def __init__(
        self,
        name: str,
        config: BackboneConfig,
        *,
        dtype: Dtype,
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
        self._limits = limits
        self._lease_fd = lease_fd
        self._adapter_bytes = adapter_bytes
        self._warm_pool = warm_pool
        # transformers imports torch's compiler, which makes this folder (else in the temporary one) and leaves it.
        self._env = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(state_dir, "torch")}
        self._on_progress = on_progress
        self._host: Child[HostToGateway] | None = None
        self._launcher: Child[LauncherToGateway] | None = None
        self._sealed: Sealed | None = None
        self._published = asyncio.Event()
        self._ready = asyncio.Event()
        self._prepared: Prepared | None = None
        self._verifying: asyncio.Future[Verified] | None = None
        self._failure: ConfigError | None = None
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
        if self._sealed is not None:
            os.close(self._sealed.weights_fd)
            os.close(self._sealed.manifest_fd)
            self._sealed = None

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises ConfigError when the backbone cannot be loaded, Unavailable when it is not ready in time."""
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

    def status(self) -> BackboneStatus:
        state = "ready" if self.is_ready else "preparing" if self._published.is_set() else "loading"
        return BackboneStatus(
            name=self.name,
            state=state,
            sharing="sealed memfd, mapped read-only",
            size_bytes=self._sealed.published.size_bytes if self._sealed else 0,
            content_digest=self.content_digest,
            host_pid=self._host.pid if self._host else None,
            launcher_pid=self._launcher.pid if self._launcher else None,
            context_length=self.context_length,
            restarts=self._restarts,
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
        """Ask the launcher for a worker. Raises Unavailable while there is no launcher to ask."""
        if self._launcher is None or not self.is_ready:
            raise Unavailable(f"the backbone {self.name!r} is not ready yet", retry_after_s=5)
        worker_id = f"{self.name}-{next(self._worker_ids)}"
        ours, theirs = socket.socketpair()
        with theirs:
            channel: AsyncChannel[WorkerToGateway] = AsyncChannel(ours, WorkerToGateway)
            try:
                fork = Fork(worker_id=worker_id, domain=domain, limits=self._limits, may_be_spare=may_be_spare)
                self._launcher.channel.send([fork], [theirs.fileno()])
            except (ChannelClosed, OSError) as error:  # OSError: no descriptor is left to send one
                channel.close()
                log.warning("cannot ask the launcher of %s: %s", self.name, error)
                raise Unavailable(f"the launcher of {self.name!r} is restarting", retry_after_s=1) from None
        return WorkerLink(
            worker_id,
            domain,
            channel,
            adapter_bytes=self._adapter_bytes,
            end_process=lambda: self._end_worker(worker_id),
        )

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
        module, arguments = "serverlesslora.backbone.hold", []
        if self._sealed is None:
            module = "serverlesslora.backbone.host"
            arguments = ["--model", self._config.model, "--dtype", self._dtype]
            if self._config.allow_pickle:
                arguments.append("--allow-pickle")
        host: Child[HostToGateway] = Child(module, arguments, HostToGateway, env=self._env, max_fds=2)
        self._host = host
        try:
            if self._sealed is not None:
                host.channel.send([Adopt()], [self._sealed.weights_fd, self._sealed.manifest_fd])
            async for frame in host.channel:
                for message in frame.messages:
                    match message:
                        case Progress():
                            self._on_progress(self.name, message)
                        case Published():
                            self._keep(frame.fds, message)
                        case BackboneFailed():
                            self._report_failure(message.reason, worked_before=self._sealed is not None)
                        case Verified():
                            if self._verifying is not None and not self._verifying.done():
                                self._verifying.set_result(message)
        except ChannelClosed:
            pass
        finally:
            self._host = None
            self._give_up_verifying()
            status = await host.stop()
        log.warning("host of backbone %s ended with status %s", self.name, status)
        if self._sealed is None and self._failure is None:
            self._fail(f"its host process ended with status {status} while loading")

    async def _run_launcher(self) -> None:
        # Started before the weights are there: it imports its libraries while the host loads.
        launcher: Child[LauncherToGateway] = Child(
            "serverlesslora.launcher.zygote",
            ["--lease-fd", str(self._lease_fd)],
            LauncherToGateway,
            env=LAUNCHER_ENV | self._env | (PINNED_ENV if self._limits.threads == num_cores() else {}),
            pass_fds=[self._lease_fd],
        )
        try:
            await self._published.wait()
            if self._failure is not None or self._sealed is None:
                return
            prepare = Prepare(backbone=self.name, num_spares=self._warm_pool, limits=self._limits)
            launcher.channel.send([prepare], [self._sealed.weights_fd, self._sealed.manifest_fd])
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
            self._launcher = None
            if self._failure is None:
                self._ready.clear()
            status = await launcher.stop()
        log.warning("launcher of backbone %s ended with status %s", self.name, status)

    def _keep(self, fds: list[int], published: Published) -> None:
        if self._sealed is not None:  # an adopting host says what it holds; we hold the same memory already
            close_fds(fds)
            return
        weights_fd, manifest_fd = fds
        self._sealed = Sealed(weights_fd, manifest_fd, published)
        self._published.set()

    def _report_failure(self, reason: str, *, worked_before: bool) -> None:
        """What worked once will work again: only a first failure is the configuration's."""
        if worked_before:
            log.error("a process of backbone %s failed and is started again: %s", self.name, reason)
        else:
            self._fail(reason)

    def _check_limits(self, prepared: Prepared) -> None:
        needed = prepared.kv_bytes_per_token * self._limits.block_size
        if self._limits.kv_bytes < needed:
            self._fail(f"one KV block needs {needed} bytes, --kv-memory-mb allows {self._limits.kv_bytes}")

    def _fail(self, reason: str) -> None:
        """Loading failed: nothing here will work, and whoever waits must hear why."""
        self._failure = ConfigError(f"backbone {self.name!r} cannot be served: {reason}")
        self._published.set()
        self._ready.set()
