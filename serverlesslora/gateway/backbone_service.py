"""One backbone's processes: started, watched, and asked for workers.

How workers come to be depends on two switches. Usually a host holds the weights in shared memory and a launcher forks
workers that map them (`launching`). With preload=off there is no launcher, and each worker is a fresh process
(`spawning`): the host starts when it is first wanted and rests when nobody needs it. With sharing=off each worker has a
private copy: of the host's memory, or, if nothing is preloaded either, from disk; then there is no host.

A backbone that was altered in memory is not served any more: nobody can tell which answers would be wrong. Its workers
are ended, new ones refused, and /health says so until the server is restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import socket
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from serverlesslora.config import BackboneConfig, Dtype
from serverlesslora.devices import SENTENCES, DeviceKind
from serverlesslora.errors import ConfigError, ServerlessLoraError, Unavailable
from serverlesslora.gateway.backbone_facts import BackboneFacts
from serverlesslora.gateway.child import Child
from serverlesslora.gateway.commands import Command, WorkerSetting, host_command, launcher_command, worker_command
from serverlesslora.gateway.launching import Launcher
from serverlesslora.gateway.memory_host import MemoryHost
from serverlesslora.gateway.spawning import Spawner
from serverlesslora.gateway.supervision import keep_alive
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.scheduler.settings import PreloadSetting, Switch
from serverlesslora_ipc.channel import AsyncChannel
from serverlesslora_ipc.messages import (
    Fork,
    Prepared,
    Progress,
    Published,
    Ready,
    Verified,
    WorkerLimits,
    WorkerToGateway,
)

log = logging.getLogger("serverlesslora.backbone")

MAX_FAILED_STARTS = 3

# What a worker on a device that only looks at an adapter may take for a KV cache it will not use.
INSPECTION_KV_BYTES = 64 << 20

_COPIED = "not shared: every worker copies it into memory of its own"
_LOADED_ALONE = "not shared: every worker loads a copy of its own"


class BackboneStatus(msgspec.Struct, frozen=True):
    name: str
    state: str  # "loading", "preparing", "ready", "resting" (loaded when it is wanted), "altered"
    sharing: str
    size_bytes: int  # of the memory that is held for all workers now
    content_digest: str | None
    host_pid: int | None
    launcher_pid: int | None
    context_length: int | None
    restarts: int
    device: str = "cpu"  # its kind, and its name once a worker has told it
    graphs: str = ""  # as the last worker told it; empty on cpu and before the first
    # Seconds, of the last time it was done; 0 while it was not.
    libraries_s: float = 0.0  # a fresh process, until everything was imported
    load_s: float = 0.0  # from disk, in a process with its libraries
    prepare_s: float = 0.0  # the launcher, until it could fork
    copy_s: float = 0.0  # a worker's private copy from memory


class BackboneService:
    """Implements `HostOwner`, `LauncherOwner` and `SpawnerOwner`."""

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
        sharing: Switch = "on",
        preload: PreloadSetting = "on",
        on_progress: Callable[[str, Progress], None] = lambda name, progress: None,
    ) -> None:
        """Raises ConfigError for what the device cannot do."""
        _check_switches(device, sharing, preload)
        self.name = name
        self._device = device
        self._limits = limits
        self._adapter_bytes = adapter_bytes
        self._sharing = sharing
        self._on_progress = on_progress
        self._on_demand = preload == "off"
        self._memory: MemoryHost | None = None
        if sharing == "on" or not self._on_demand:
            hosts = functools.partial(host_command, config, dtype, device, state_dir=state_dir)
            self._memory = MemoryHost(name, self, _start, hosts, on_demand=self._on_demand)
        setting = WorkerSetting(limits.threads, lease_fd, state_dir, sharing)
        self._workers: Launcher | Spawner
        if self._memory is not None and not self._on_demand:
            launchers = functools.partial(launcher_command, device, setting)
            self._workers = Launcher(name, self, self._memory, _start, launchers, limits=limits, num_spares=warm_pool)
        else:
            processes = functools.partial(worker_command, config, dtype, setting)
            self._workers = Spawner(name, self, self._memory, _start, processes)
        self._ready = asyncio.Event()
        self._failure: ServerlessLoraError | None = None
        self._is_altered = False
        self.facts = BackboneFacts()
        self._links: WeakValueDictionary[str, WorkerLink] = WeakValueDictionary()
        self._worker_ids = itertools.count(1)
        self._num_waiting = 0
        self._used_at = time.monotonic()
        self._restarts = 0
        self._tasks: list[asyncio.Task[None]] = []

    # --- life

    def startup(self) -> None:
        """Whatever is there before anybody asks for it."""
        if self._memory is not None:
            self._tasks.append(self._supervise("host", self._memory.run))
        if isinstance(self._workers, Launcher):
            self._tasks.append(self._supervise("launcher", self._workers.run))
        if self._memory is None:
            self._ready.set()

    def _supervise(self, role: str, run: Callable[[], Any]) -> asyncio.Task[None]:
        return asyncio.create_task(keep_alive(self.name, run, self._goes_on), name=f"{role} {self.name}")

    async def shutdown(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if isinstance(self._workers, Spawner):
            await self._workers.shutdown()
        if self._memory is not None:
            self._memory.forget()

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Until it can be asked for workers; with preload=off this is what loads it.

        Raises ConfigError when it cannot be loaded, Unavailable when it is not ready in time or was altered, or could
        not be loaded now: where it is loaded on demand, it is tried again on the next.
        """
        self._demand()
        self._num_waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._ready.wait()
        finally:
            self._num_waiting -= 1
            self._used_at = time.monotonic()
        if self._failure is not None:
            raise self._failure
        if not self._ready.is_set():
            raise Unavailable(f"the backbone {self.name!r} is not ready yet", retry_after_s=5)

    def rest(self, unused_for_s: float = 0.0) -> bool:
        """Gives back what was loaded on demand, until it is wanted again.

        False, and nothing has changed: there is nothing to give back, a worker runs or starts, somebody waits for the
        backbone, or it was used during the last `unused_for_s`.
        """
        if not self._on_demand or self._memory is None or not self._memory.is_wanted:
            return False
        if self._num_waiting or self._workers.pids or time.monotonic() - self._used_at < unused_for_s:
            return False
        if self._failure is None:  # else there is something to tell, and nothing to wait for
            self._ready.clear()
        self._memory.let_go()
        return True

    def _demand(self) -> None:
        """What was at rest, or could not be loaded on the last demand, is loaded now."""
        self._used_at = time.monotonic()
        if not self._on_demand or self._memory is None or self._is_altered:
            return
        if self._failure is not None:
            self._failure = None
            self._ready.clear()
        self._memory.want()

    # --- what is known

    @property
    def is_ready(self) -> bool:
        """A worker can be made at once."""
        return self._ready.is_set() and self._failure is None

    @property
    def takes_requests(self) -> bool:
        """It is ready, or will be when it is wanted."""
        return self.is_ready or (self._on_demand and not self._is_altered)

    @property
    def is_failed(self) -> bool:
        return self._failure is not None

    @property
    def is_altered(self) -> bool:
        """Its digest was found to be another than when it was loaded."""
        return self._is_altered

    @property
    def context_length(self) -> int | None:
        """None until a launcher or, with preload=off, a worker has been there."""
        return self.facts.context_length

    @property
    def content_digest(self) -> str | None:
        return self.facts.published.content_digest if self.facts.published else None

    @property
    def identity(self) -> str | None:
        """Of the weights and how they lie: what was found out about an adapter is true while this is the same."""
        published = self.facts.published
        return f"{published.layout_digest}:{published.content_digest}" if published else None

    @property
    def size_bytes(self) -> int:
        """What is held for all workers now: 0 before it is loaded, at rest, and where there is no host."""
        sealed = self._memory.sealed if self._memory else None
        return sealed.published.size_bytes if sealed else 0

    @property
    def pids(self) -> dict[str, int]:
        """Worker id -> pid."""
        return self._workers.pids

    def role_pids(self) -> dict[str, int]:
        """Every process there is: "host", "launcher", "spare N", and workers by their id."""
        host_pid = self._memory.pid if self._memory else None
        roles = {} if host_pid is None else {"host": host_pid}
        if isinstance(self._workers, Launcher):
            roles |= self._workers.pids_by_role()
        return roles | self._workers.pids

    def status(self) -> BackboneStatus:
        return BackboneStatus(
            name=self.name,
            state=self._state(),
            sharing=self._how_shared(),
            size_bytes=self.size_bytes,
            content_digest=self.content_digest,
            host_pid=self._memory.pid if self._memory else None,
            launcher_pid=self._workers.pid if isinstance(self._workers, Launcher) else None,
            context_length=self.context_length,
            restarts=self._restarts,
            device=self.facts.told.device if self.facts.told else self._device,
            graphs=self.facts.told.graphs if self.facts.told else "",
            libraries_s=self.facts.libraries_s,
            load_s=self.facts.load_s,
            prepare_s=self.facts.prepare_s,
            copy_s=self.facts.copy_s,
        )

    def _state(self) -> str:
        if self._is_altered:
            return "altered"
        if self.is_ready:
            return "ready"
        if self._memory is not None and not self._memory.is_wanted:
            return "resting"
        return "preparing" if self._memory is not None and self._memory.is_settled else "loading"

    def _how_shared(self) -> str:
        if self._memory is None:
            return _LOADED_ALONE
        if self._sharing == "off":
            return _COPIED
        return SENTENCES[self._memory.sealed.published.sharing] if self._memory.sealed else "not loaded yet"

    async def verify(self) -> Verified:
        """The content digest recomputed from the memory itself. Raises Unavailable while no host can be asked."""
        if self._memory is None:
            raise Unavailable(f"nothing of {self.name!r} is shared: there is no memory to verify")
        return await self._memory.verify()

    # --- workers

    def fork(self, domain: str, *, may_be_spare: bool = True) -> WorkerLink:
        """Ask for a worker; with preload=off for a fresh process, whose backbone is loaded if it is not there.

        Raises Unavailable while there is nobody to ask, or no backbone that may be served.
        """
        if self._is_altered and self._failure is not None:
            raise self._failure
        self._demand()
        if not self._on_demand and not self.is_ready:
            raise Unavailable(f"the backbone {self.name!r} is not ready yet", retry_after_s=5)
        worker_id = f"{self.name}-{next(self._worker_ids)}"
        limits = self._limits
        if self._device != "cpu" and not may_be_spare:
            limits = msgspec.structs.replace(limits, kv_bytes=INSPECTION_KV_BYTES)
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            log.warning("no descriptor is left for a worker of %s: %s", self.name, error)
            raise Unavailable("the server has no descriptor left for a worker; try again", retry_after_s=5) from None
        channel: AsyncChannel[WorkerToGateway] = AsyncChannel(ours, WorkerToGateway)
        try:
            self._workers.make(
                Fork(worker_id=worker_id, domain=domain, limits=limits, may_be_spare=may_be_spare), theirs
            )
        except BaseException:
            channel.close()
            raise
        link = WorkerLink(
            worker_id,
            domain,
            channel,
            adapter_bytes=self._adapter_bytes,
            end_process=functools.partial(self._workers.end_worker, worker_id),
        )
        self._links[worker_id] = link
        # A launcher that was killed never tells of the workers that outlived it.
        link.gone.add_done_callback(lambda _: self._workers.pids.pop(worker_id, None))
        link.ready.add_done_callback(functools.partial(self._learn, is_typical=may_be_spare))
        return link

    def _learn(self, ready: asyncio.Future[Ready], *, is_typical: bool) -> None:
        if not ready.cancelled() and ready.exception() is None:
            self.facts.learn_start(ready.result(), is_typical=is_typical)

    def _end_workers(self) -> None:
        for link in list(self._links.values()):
            link.kill()

    # --- what its processes report

    def memory_loading(self, progress: Progress) -> None:
        self._on_progress(self.name, progress)

    def memory_published(self, published: Published) -> None:
        self.facts.published = published
        if self._on_demand:
            self._ready.set()

    def memory_failed(self, reason: str) -> None:
        self._fail(reason)

    def memory_lost(self) -> None:
        if self._failure is None:
            self._ready.clear()
            if isinstance(self._workers, Launcher):
                self._workers.restart()
            self._end_workers()

    def memory_altered(self, digest: str) -> None:
        if self._is_altered:
            return
        log.error(
            "the backbone %s was ALTERED in memory (its digest is now %s): its workers are ended and it is not served "
            "any more; restart the server",
            self.name,
            digest,
        )
        self._is_altered = True
        self._give_up(
            Unavailable(
                f"the backbone {self.name!r} was altered in memory and is not served until the server is restarted",
                retry_after_s=60,
            )
        )
        self._end_workers()

    def launcher_prepared(self, prepared: Prepared) -> None:
        self.facts.prepared, self.facts.prepare_s = prepared, prepared.seconds
        if too_small := self._too_small(prepared):
            self._fail(too_small)
        self._ready.set()

    def launcher_failed(self, reason: str) -> None:
        """What worked once will work again: only a first failure is the configuration's."""
        if self.facts.prepared is not None:
            log.error("the launcher of %s failed and is started again: %s", self.name, reason)
        else:
            self._fail(reason)

    def launcher_gone(self) -> None:
        if self._failure is None:
            self._ready.clear()

    def worker_prepared(self, worker_id: str, prepared: Prepared) -> None:
        self.facts.prepared = prepared
        if too_small := self._too_small(prepared):
            self.worker_failed(worker_id, too_small)
            self._workers.end_worker(worker_id)

    def worker_failed(self, worker_id: str, reason: str) -> None:
        log.error("no worker %s: %s", worker_id, reason)
        link = self._links.get(worker_id)
        if link is not None and not link.ready.done():
            sentence = f"backbone {self.name!r} cannot be served: {reason}"
            link.ready.set_exception(self._failure or Unavailable(sentence, retry_after_s=10))

    def worker_gone(self) -> None:
        self._used_at = time.monotonic()

    # --- failing

    def _goes_on(self) -> bool:
        """A process ended: whether it is to be started again."""
        if self._on_demand:
            self._restarts += 1
            return not self._is_altered
        if self._failure is not None:
            return False
        self._restarts += 1
        if not self._ready.is_set() and self.facts.prepared is None and self._restarts >= MAX_FAILED_STARTS:
            self._fail(f"its processes ended {self._restarts} times before it was ready; see the log")
            return False
        return True

    def _too_small(self, prepared: Prepared) -> str:
        needed = prepared.kv_bytes_per_token * self._limits.block_size
        if 0 < self._limits.kv_bytes < needed:  # 0: sized from what is free
            return f"one KV block needs {needed} bytes, --kv-memory-mb allows {self._limits.kv_bytes}"
        return ""

    def _fail(self, reason: str) -> None:
        """Loading failed: nothing here will work, or not on this demand, and whoever waits must hear why."""
        sentence = f"backbone {self.name!r} cannot be served: {reason}"
        if not self._on_demand:
            self._give_up(ConfigError(sentence))
            return
        log.error("%s", sentence)
        if self._memory is not None:
            self._memory.let_go()
        self._give_up(Unavailable(sentence, retry_after_s=10))

    def _give_up(self, failure: ServerlessLoraError) -> None:
        self._failure = failure
        if self._memory is not None:
            self._memory.give_up()
        self._ready.set()


def _start(command: Command, receives: Any, *, max_fds: int = 0) -> Child[Any]:
    return Child(
        command.module, command.arguments, receives, env=command.env, pass_fds=command.pass_fds, max_fds=max_fds
    )


def _check_switches(device: DeviceKind, sharing: Switch, preload: PreloadSetting) -> None:
    for name, value in (("sharing", sharing), ("preload", preload)):
        if value == "off" and device != "cpu":
            raise ConfigError(f"{name}=off is for the cpu device, not {device!r}: leave it on, or set --device cpu")
