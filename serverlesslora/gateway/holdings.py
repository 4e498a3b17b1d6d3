"""What the server holds in memory, artifact by artifact, corrected by what /proc says, and how much room is left.

On CPU there is one memory, the host's: backbones, processes, adapters and KV share it. On a device this counts the
host's part; the device's own memory is shared out by the workers themselves, chunk by chunk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from serverlesslora.config import ServerConfig
from serverlesslora.devices import DeviceKind
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.measured import Measured
from serverlesslora.gateway.memory import MemoryLedger, MemoryMap, Process, SharedMemory
from serverlesslora.gateway.proc_memory import read_machine
from serverlesslora.gateway.residency import ResidencyMeter, Resident
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.gateway.worker_state import WorkerState
from serverlesslora.gateway.workers import Workers
from serverlesslora.metering.usage import Residency
from serverlesslora.scheduler.artifacts import Place
from serverlesslora.scheduler.catalogue import adapter_id, backbone_id, worker_id
from serverlesslora.scheduler.profile import Profile
from serverlesslora_ipc.messages import Stats, StepSums

log = logging.getLogger("serverlesslora.memory")

LOOK_EVERY_S = 5.0
ITSELF = ""  # in the place of a digest: the worker of a bare backbone, which serves one name only
OF_THE_MACHINE = 0.9  # what the server takes of it when nobody says how much


class Counts(NamedTuple):
    """What workers count from their start."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    def plus(self, stats: Stats) -> Counts:
        return Counts(
            self.preemptions + stats.preemptions,
            self.prefix_queries + stats.prefix_query_tokens,
            self.prefix_hits + stats.prefix_hit_tokens,
        )


class Holdings:
    def __init__(
        self,
        config: ServerConfig,
        services: Mapping[str, BackboneService],
        *,
        device: DeviceKind,
        chunk_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        capacity = config.memory_mb << 20 if config.memory_mb else int(OF_THE_MACHINE * read_machine().capacity_bytes)
        self.place = Place("host", "host", capacity)
        self.present: dict[str, Resident] = {}
        self.map: MemoryMap | None = None
        self.measured = Measured(services, chunk_tokens=chunk_tokens)
        self.profile: Profile = self.measured.profile({}, on=device)
        self._services = services
        self._device = device
        self._shares = config.sharing == "on"
        self._forks = config.preload != "off"
        self._watermark = config.watermark
        self._clock = clock
        self._meter = ResidencyMeter(clock=clock, wall_clock=wall_clock)
        self.counts_of_gone = Counts()
        self._known_bytes: dict[str, int] = {}  # by domain: its worker with its KV
        self._needs: dict[str, tuple[str, ...]] = {}
        self._workers: Workers
        self._owners: dict[tuple[str, str], tuple[str, str | None]] = {}  # (domain, digest) -> (function, tenant)

    def connect(self, workers: Workers) -> None:
        self._workers = workers

    # --- how much

    @property
    def capacity_bytes(self) -> int:
        return self.place.capacity_bytes

    @property
    def counted_bytes(self) -> int:
        return sum(resident.size_bytes for resident in self.present.values())

    @property
    def measured_bytes(self) -> int | None:
        """The same, by the kernel's own sums when they were last read."""
        return self.map.measured_bytes if self.map is not None and self.map.measured_bytes else None

    def bytes_of_start(self, service: BackboneService) -> int:
        """What one more worker will take before it has adapters and KV."""
        own = self.profile.worker_bytes if self._forks else self.profile.process_bytes
        return own if self._shares else own + service.facts.copy_bytes

    def missing_for(self, size_bytes: int) -> int:
        return self.counted_bytes + size_bytes - self.capacity_bytes

    @property
    def leaving_bytes(self) -> int:
        """Will be free in a moment."""
        names = [f"process:{link.worker_id}" for link in self._workers if link.state is WorkerState.LEAVING]
        return sum(self.present[name].size_bytes for name in names if name in self.present)

    def over_watermark(self) -> int:
        return self.counted_bytes - int(self._watermark * self.capacity_bytes)

    def needs(self, artifact_id: str) -> tuple[str, ...]:
        return tuple(each for each in self._needs.get(artifact_id, ()) if each in self.present)

    # --- what is there

    def owned(self, domain: str, digest: str, function: str, tenant: str | None) -> None:
        """Whose account an adapter's memory goes to; of several functions the first that asked."""
        self._owners.setdefault((domain, digest), (function, tenant))

    def disowned(self, domain: str, digest: str) -> None:
        self._owners.pop((domain, digest), None)

    def update(self) -> None:
        """Everything that lies in memory from now on. To be called at every change."""
        present: dict[str, Resident] = {}
        self._needs = {}
        for service in self._services.values():
            if service.size_bytes:
                present[backbone_id(service.name)] = Resident("backbone", service.size_bytes, backbone=service.name)
        for entry in self.map.entries if self.map else ():
            if entry.kind in ("process", "shared"):
                present[entry.artifact_id] = Resident("process", entry.size_bytes)
        for link in self._workers:
            self._add_worker(present, link, is_current=self._workers.find(link.domain) is link)
        self.present = present
        self._meter.update(present)

    def _add_worker(self, present: dict[str, Resident], link: WorkerLink, *, is_current: bool) -> None:
        backbone = link.backbone
        if not is_current:  # it leaves, or serves nobody's requests
            present[f"process:{link.worker_id}"] = Resident(
                "process", self._worker_bytes(link), domain=link.domain, backbone=backbone
            )
            return
        itself = worker_id(link.domain)
        function, tenant = self._owners.get((link.domain, ITSELF), (None, None))
        present[itself] = Resident(
            "worker", self._worker_bytes(link), function=function, domain=link.domain, backbone=backbone
        )
        self._needs[itself] = (backbone_id(backbone),)
        for digest, size in link.loaded.items():
            function, tenant = self._owners.get((link.domain, digest), (None, None))
            artifact_id = adapter_id(link.domain, digest)
            present[artifact_id] = Resident(
                "adapter", size, function=function, tenant=tenant, domain=link.domain, backbone=backbone
            )
            self._needs[artifact_id] = (itself,)

    def _worker_bytes(self, link: WorkerLink) -> int:
        """Its own memory with its KV, without adapters: as /proc said, or as others of its kind turned out."""
        return self._known_bytes.get(link.domain) or self.bytes_of_start(self._services[link.backbone])

    def take(self) -> list[Residency]:
        """What was held since the last call, for the ledger."""
        return self._meter.take()

    # --- looking

    async def main_loop(self, on_look: Callable[[], None]) -> None:
        """Look again and again; `on_look` is called after each."""
        ledger = MemoryLedger()
        while True:
            try:
                self.map = await ledger.look(self._processes(), self._shared(), now=self._clock())
                self._learn_sizes()
                self.measure()
                self.update()
            except Exception:  # sizes stay as they were last known
                log.exception("the memory could not be looked at")
            on_look()
            await asyncio.sleep(LOOK_EVERY_S)

    def _processes(self) -> list[Process]:
        processes = [Process(os.getpid(), "gateway")]
        for service in self._services.values():
            status = service.status()
            if status.host_pid is not None:
                processes.append(Process(status.host_pid, "host", service.name))
            if status.launcher_pid is not None:
                processes.append(Process(status.launcher_pid, "launcher", service.name))
        for link in self._workers:
            if link.pid is not None and link.state is not WorkerState.GONE:
                stats = link.stats
                processes.append(
                    Process(link.pid, "worker", link.backbone, link.domain, link.loaded, stats.kv_bytes if stats else 0)
                )
        return processes

    def _shared(self) -> list[SharedMemory]:
        return [
            SharedMemory(service.name, service.size_bytes) for service in self._services.values() if service.size_bytes
        ]

    def _learn_sizes(self) -> None:
        """Of domains with one process: what two of them hold cannot be told apart here."""
        assert self.map is not None
        processes = Counter(link.domain for link in self._workers)
        owns: Counter[str] = Counter()
        self._known_bytes = {}
        for entry in self.map.entries:
            if entry.owner is not None and processes[entry.owner] == 1 and entry.kind in ("worker", "kv"):
                self._known_bytes[entry.owner] = self._known_bytes.get(entry.owner, 0) + entry.size_bytes
                if entry.kind == "worker":
                    owns[entry.owner] += entry.size_bytes
        for link in self._workers:
            own = owns[link.domain]
            if own and link.state is WorkerState.SERVING:
                private = own if self._shares else max(0, own - self._services[link.backbone].facts.copy_bytes)
                (self.measured.worker_bytes if self._forks else self.measured.process_bytes).add(private)

    def measure(self) -> Profile:
        """What is known of times and sizes by now."""
        steps: dict[str, tuple[list[StepSums], list[StepSums]]] = {name: ([], []) for name in self._services}
        for link in self._workers:
            if link.stats is not None:
                steps[link.backbone][0].append(link.stats.decode)
                steps[link.backbone][1].append(link.stats.prefill)
        for name, service in self._services.items():
            measured = self.measured.backbones[name]
            facts = service.facts
            measured.size_bytes = facts.copy_bytes
            measured.kv_bytes_per_token = facts.kv_bytes_per_token
            for samples, seconds in ((measured.load_s, facts.load_s), (measured.copy_s, facts.copy_s)):
                if seconds:
                    samples.add(seconds)
            if facts.libraries_s:
                self.measured.libraries_s.add(facts.libraries_s)
        self.profile = self.measured.profile(steps, on=self._device)
        return self.profile

    def started(self, link: WorkerLink, seconds: float) -> None:
        """A worker of a domain began to serve, so long after it was asked for."""
        ready = link.ready.result()
        if self._forks:
            (self.measured.spare_s if ready.was_spare else self.measured.worker_s).add(seconds)

    def answered_at_once(self, gateway_s: float) -> None:
        """What a first token took outside of its worker, when nothing was missing and nobody waited."""
        self.measured.gateway_s.add(gateway_s)

    def answered_first(self, backbone: str, prompt_tokens: int, seconds: float) -> None:
        """What the first prompt took in a new worker: pages and threads touched for the first time are slow."""
        steps = self.profile.backbones[backbone].steps
        usual_s = steps.prefill_s + prompt_tokens * steps.prefill_token_s
        self.measured.first_step_s.add(max(0.0, seconds - usual_s))

    def gone(self, link: WorkerLink) -> None:
        """What its steps told is kept."""
        if link.stats is not None:
            self.measured.backbones[link.backbone].gone(link.stats.decode, link.stats.prefill)
            self.counts_of_gone = self.counts_of_gone.plus(link.stats)
