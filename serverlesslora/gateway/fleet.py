"""The backend behind the HTTP layer: functions deployed to domains, requests admitted and sent to workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from serverlesslora.adapters.sources import parse_source, shown
from serverlesslora.config import CPU_KV_MEMORY_MB, CPU_STEP_TOKENS, DEVICE_STEP_TOKENS, FunctionConfig, ServerConfig
from serverlesslora.devices import DeviceKind, choose_device
from serverlesslora.errors import InvalidRequest, RateLimited, Unavailable
from serverlesslora.gateway.backbone_service import BackboneService, BackboneStatus
from serverlesslora.gateway.backend import BackendStats, GenerationRequest, Health, ModelCard
from serverlesslora.gateway.commands import num_cores
from serverlesslora.gateway.control_plane import ControlPlane
from serverlesslora.gateway.deployments import Deployments
from serverlesslora.gateway.generation import FleetGeneration
from serverlesslora.gateway.live_state import LiveState, Spending
from serverlesslora.gateway.live_view import live_of, stats_of
from serverlesslora.gateway.plan_view import PlanView, view_of
from serverlesslora.gateway.quotas import limits_of
from serverlesslora.gateway.storing import create_store, needed_by
from serverlesslora.registry.file import RegistryFile
from serverlesslora.registry.functions import Backbone, Function, Target, domain_of
from serverlesslora.registry.registry import Registry
from serverlesslora.registry.schema import REGISTRY_FILE
from serverlesslora.tenancy.key import Limits
from serverlesslora.worker.lease import create_lease_fd
from serverlesslora_ipc.messages import Progress, Stats, Verified, WorkerLimits

log = logging.getLogger("serverlesslora.fleet")

ADAPTER_BYTES_PER_WORKER = 4 << 30


class WorkerStatus(msgspec.Struct, frozen=True):
    worker_id: str
    domain: str
    state: str
    pid: int | None
    age_s: float
    idle_s: float
    open_requests: int
    adapters: tuple[str, ...]
    stats: Stats | None


class FleetStatus(msgspec.Struct, frozen=True):
    """What `top` and the admin API show."""

    backbones: tuple[BackboneStatus, ...]
    functions: tuple[Function, ...]
    workers: tuple[WorkerStatus, ...]
    domains: dict[str, str]  # function -> domain


def worker_limits(config: ServerConfig, device: DeviceKind) -> WorkerLimits:
    """On a device the CPU only prepares steps, and kv_bytes 0 means: sized from what is free."""
    on_cpu = device == "cpu"
    return WorkerLimits(
        threads=config.threads or (num_cores() if on_cpu else 1),
        kv_bytes=(config.kv_memory_mb or (CPU_KV_MEMORY_MB if on_cpu else 0)) << 20,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens or (CPU_STEP_TOKENS if on_cpu else DEVICE_STEP_TOKENS),
        prefix_cache=config.prefix_cache,
        max_model_len=config.max_model_len,
    )


class Fleet:
    """Implements `backend.Backend`."""

    def __init__(
        self, config: ServerConfig, *, on_progress: Callable[[str, Progress], None] = lambda name, progress: None
    ) -> None:
        self._config = config
        self._lease_fd = create_lease_fd()
        device, reason = choose_device(config.device)
        log.info("device %s: %s", device, reason)
        created = int(time.time())
        self._limits = limits = worker_limits(config, device)
        self._services = {
            backbone.public_name: BackboneService(
                backbone.public_name,
                backbone,
                dtype=backbone.dtype or config.dtype,
                device=device,
                limits=limits,
                lease_fd=self._lease_fd,
                adapter_bytes=ADAPTER_BYTES_PER_WORKER,
                state_dir=config.state_dir,
                warm_pool=config.warm_pool,
                sharing=config.sharing,
                preload=config.preload,
                on_progress=on_progress,
            )
            for backbone in config.backbones
        }
        self.registry = Registry(
            [
                Backbone(name=b.public_name, source=b.model, dtype=b.dtype or config.dtype, created=created)
                for b in config.backbones
            ],
            RegistryFile(Path(config.state_dir) / REGISTRY_FILE),
        )
        self.store = create_store(config, lambda: needed_by(self.registry, self.control.workers))
        self.device = device
        self.control = ControlPlane(
            config,
            device=device,
            registry=self.registry,
            services=self._services,
            store=self.store,
            chunk_tokens=limits.max_step_tokens,
        )
        self._workers = self.control.workers
        self._open_by_domain = self.control.open_by_domain
        self._open_by_function: Counter[str] = Counter()
        self._generations: set[FleetGeneration] = set()
        self.deployments = Deployments(
            config, registry=self.registry, services=self._services, store=self.store, control=self.control
        )
        self._is_started = False

    # --- life

    async def startup(self) -> None:
        """Load the backbones, beside the functions that were kept deploy the configured ones. Raises what keeps the
        server from serving."""
        self.store.sweep()
        await self.control.startup()
        for service in self._services.values():
            service.startup()
        if self._config.preload != "off":
            for service in self._services.values():
                await service.wait_ready()
        await self.deployments.startup()
        self._is_started = True

    async def shutdown(self) -> None:
        self.store.stop()
        await self.deployments.shutdown()
        await self.control.shutdown()
        await asyncio.gather(*(service.shutdown() for service in self._services.values()))
        os.close(self._lease_fd)

    def interrupt(self) -> None:
        """Everything under way ends with an error now, and nothing new begins."""
        self.control.queue.shutdown()
        for generation in self._generations:
            generation.interrupt(Unavailable("The server is shutting down.", code="shutting_down", retry_after_s=5))

    @property
    def num_open(self) -> int:
        return self._open_by_domain.total()

    # --- models

    def models(self) -> list[ModelCard]:
        backbones = [self._card(Target(backbone, None), backbone.name) for backbone in self.registry.backbones()]
        functions = [self._card(self.registry.resolve(f.name), f.name) for f in self.registry.functions()]
        return backbones + functions

    def model(self, name: str) -> ModelCard:
        """`name` may be a version's: "f@v3"."""
        return self._card(self.registry.resolve(name), name)

    def _card(self, target: Target, name: str) -> ModelCard:
        backbone, function = target
        max_model_len = self._services[backbone.name].context_length
        if self._config.max_model_len is not None and max_model_len is not None:
            max_model_len = min(max_model_len, self._config.max_model_len)
        return ModelCard(
            id=name,
            root=shown(function.source) if function else backbone.source,
            parent=backbone.name if function else None,
            created=function.created if function else backbone.created,
            max_model_len=max_model_len,
            digest=target.digest,
            tenant=function.tenant if function else None,
            limits=limits_of(function) if function else Limits(),
            version=function.version if function else None,
        )

    # --- requests

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[FleetGeneration]:
        target = self.registry.resolve(request.model, request.user or request.request_id)
        self.deployments.check(target)
        domain = self._domain(target)
        name = target.function.name if target.function else target.backbone.name
        self._admit(target, domain)
        generation = FleetGeneration(self.control, request, target, domain, self._services[target.backbone.name])
        self._generations.add(generation)
        self._open_by_domain[domain] += 1
        self._open_by_function[name] += 1
        try:
            yield generation
        finally:
            generation.close()
            self._generations.discard(generation)
            _decrement(self._open_by_domain, domain)
            _decrement(self._open_by_function, name)

    def _admit(self, target: Target, domain: str) -> None:
        self.control.accounts.check(target.function.tenant if target.function else None)
        # Where tenants share a domain the queue itself sees to it that one does not take it all.
        if self._config.isolation != "shared" and self._open_by_domain[domain] >= self._config.max_queue:
            raise RateLimited(f"{self._config.max_queue} requests of this domain are open already", retry_after_s=2)
        function = target.function
        limit = function.max_concurrency if function else None
        if function is not None and limit is not None and self._open_by_function[function.name] >= limit:
            raise RateLimited(f"the function may have {limit} requests open", retry_after_s=2)

    def _domain(self, target: Target) -> str:
        return domain_of(target, isolation=self._config.isolation)

    # --- functions

    async def load_adapter(self, name: str, path: str, *, in_place: bool, tenant: str | None) -> ModelCard:
        if not self._config.may_deploy_from(kind := parse_source(path).kind):
            flag = "--adapter-root" if kind == "local" else f"--adapter-source {kind}"
            raise InvalidRequest(
                f"adapters cannot be loaded at run time from {kind} sources on this address; start the server with "
                f"{flag}",
                param="lora_path",
            )
        config = FunctionConfig(name=name, adapter=path, tenant=tenant)
        if in_place and (entry := self.registry.entries.get(name)):  # new weights change nothing else
            config = FunctionConfig(name=name, adapter=path, **msgspec.structs.asdict(entry.settings))
        return await self.deploy(config, replace=in_place)

    async def deploy(self, function: FunctionConfig, *, replace: bool) -> ModelCard:
        """Raises as `Deployments.deploy`; the name is unchanged then."""
        await self.deployments.deploy(function, replace=replace)
        return self.model(function.name)

    async def unload_adapter(self, name: str) -> None:
        await self.deployments.remove(name)

    # --- what is going on

    async def verify(self, backbone: str) -> Verified:
        """Raises ModelNotFound or Unavailable."""
        return await self._services[self.registry.backbone(backbone).name].verify()

    def status(self) -> FleetStatus:
        now = time.monotonic()
        return FleetStatus(
            backbones=tuple(service.status() for service in self._services.values()),
            functions=tuple(self.registry.functions()),
            workers=tuple(
                WorkerStatus(
                    worker_id=link.worker_id,
                    domain=link.domain,
                    state=link.state.value,
                    pid=link.pid,
                    age_s=now - link.started_at,
                    idle_s=0.0 if link.num_open else now - link.last_used,
                    open_requests=link.num_open,
                    adapters=link.adapters,
                    stats=link.stats,
                )
                for link in self._workers
            ),
            domains={f.name: self._domain(self.registry.resolve(f.name)) for f in self.registry.functions()},
        )

    def plan(self) -> PlanView:
        return view_of(self.control.controller, self.control.queue, self._workers, self._config.policy)

    def stats(self) -> BackendStats:
        return stats_of(self.control, self._with_domains(), self._limits)

    def live(self) -> LiveState:
        return live_of(self.control, self._services, self._with_domains(), self._open_by_function)

    def watch(self, spending: Spending) -> None:
        self.control.accounts.watch(spending)

    def _with_domains(self) -> list[tuple[Function, str]]:
        """Every function, and its domain."""
        return [(f, self._domain(self.registry.resolve(f.name))) for f in self.registry.functions()]

    def health(self) -> Health:
        backbones = [service.status() for service in self._services.values()]
        detail: dict[str, Any] = {
            "backbones": {b.name: _health_of(b) for b in backbones},
            "functions": sum(1 for _ in self.registry.functions()),
            "workers": sum(1 for _ in self._workers),
        }
        if problem := self.control.accounts.problem:
            detail["metering"] = problem
        is_altered = any(b.state == "altered" for b in backbones)
        is_ready = all(service.takes_requests for service in self._services.values())
        # A launcher that restarts keeps new domains waiting; restarting the whole server would help nobody. It is the
        # only help for a backbone that was altered.
        return Health(alive=self._is_started and not is_altered, ready=self._is_started and is_ready, detail=detail)


def _health_of(backbone: BackboneStatus) -> dict[str, str]:
    facts = {"state": backbone.state, "device": backbone.device, "sharing": backbone.sharing}
    if backbone.device != "cpu":
        facts["graphs"] = backbone.graphs or "not known before the first worker"
    return facts


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
