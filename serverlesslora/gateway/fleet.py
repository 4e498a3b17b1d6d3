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
from weakref import WeakValueDictionary

import msgspec

from serverlesslora.config import CPU_KV_MEMORY_MB, CPU_STEP_TOKENS, DEVICE_STEP_TOKENS, FunctionConfig, ServerConfig
from serverlesslora.devices import DeviceKind, choose_device
from serverlesslora.errors import (
    ConfigError,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
    ServerlessLoraError,
    Unavailable,
)
from serverlesslora.gateway.backbone_service import BackboneService, BackboneStatus
from serverlesslora.gateway.backend import BackendStats, GenerationRequest, Health, ModelCard
from serverlesslora.gateway.commands import num_cores
from serverlesslora.gateway.control_plane import ControlPlane
from serverlesslora.gateway.generation import FleetGeneration
from serverlesslora.gateway.plan_view import PlanView, view_of
from serverlesslora.gateway.registry import Backbone, Function, Registry, Target, domain_of
from serverlesslora.gateway.store import AdapterStore, StoredAdapter
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.gateway.workers import retired_after
from serverlesslora.worker.lease import create_lease_fd
from serverlesslora_ipc.messages import Loaded, Progress, Stats, Verified, WorkerLimits

log = logging.getLogger("serverlesslora.fleet")

ADAPTER_BYTES_PER_WORKER = 4 << 30
INSPECTIONS_AT_ONCE = 4  # each is a worker; a server may start with a thousand functions to look at


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
        limits = worker_limits(config, device)
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
            ]
        )
        self.store = AdapterStore(
            Path(config.state_dir) / "adapters",
            max_bytes=config.max_adapter_mb << 20,
            roots=[Path(root) for root in config.adapter_roots],
        )
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
        self._deploying: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # held by who deploys
        self._inspecting = asyncio.Semaphore(INSPECTIONS_AT_ONCE)
        self._inspectors: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._inspected: dict[tuple[str, str], Loaded] = {}  # (backbone, digest): a verdict never changes
        self._is_started = False

    # --- life

    async def startup(self) -> None:
        """Load the backbones and deploy the configured functions. Raises what keeps the server from serving."""
        self.store.sweep()
        await self.control.startup()
        for service in self._services.values():
            service.startup()
        if self._config.preload != "off":
            for service in self._services.values():
                await service.wait_ready()
        await asyncio.gather(*(self._deploy_configured(function) for function in self._config.functions))
        self._is_started = True

    async def shutdown(self) -> None:
        await self.control.shutdown()
        await asyncio.gather(*(service.shutdown() for service in self._services.values()))
        os.close(self._lease_fd)

    @property
    def num_open(self) -> int:
        return self._open_by_domain.total()

    # --- models

    def models(self) -> list[ModelCard]:
        backbones = [self._card(Target(backbone, None)) for backbone in self.registry.backbones()]
        functions = [self._card(self.registry.resolve(f.name)) for f in self.registry.functions()]
        return backbones + functions

    def model(self, name: str) -> ModelCard:
        return self._card(self.registry.resolve(name))

    def _card(self, target: Target) -> ModelCard:
        backbone, function = target
        max_model_len = self._services[backbone.name].context_length
        if self._config.max_model_len is not None and max_model_len is not None:
            max_model_len = min(max_model_len, self._config.max_model_len)
        return ModelCard(
            id=function.name if function else backbone.name,
            root=function.source if function else backbone.source,
            parent=backbone.name if function else None,
            created=function.created if function else backbone.created,
            max_model_len=max_model_len,
            digest=target.digest,
            tenant=function.tenant if function else None,
        )

    # --- requests

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[FleetGeneration]:
        target = self.registry.resolve(request.model)
        domain = self._domain(target)
        name = request.model
        self._admit(target, domain)
        generation = FleetGeneration(self.control, request, target, domain, self._services[target.backbone.name])
        self._open_by_domain[domain] += 1
        self._open_by_function[name] += 1
        try:
            yield generation
        finally:
            generation.close()
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
        if not self._config.runtime_deploys_allowed:
            raise InvalidRequest(
                "adapters cannot be loaded at run time on this address; start the server with --adapter-roots",
                param="lora_path",
            )
        return await self.deploy(FunctionConfig(name=name, adapter=path, tenant=tenant), replace=in_place)

    async def deploy(self, function: FunctionConfig, *, replace: bool) -> ModelCard:
        """Copy the adapter, prove in a throw-away worker that it can be served, then put it under its name.

        Raises NotFound, AdapterInvalid, InvalidRequest (the name is taken) or Unavailable; the name is unchanged then.
        """
        backbone = self.registry.backbone(function.backbone)
        lock = self._deploying.setdefault(function.name, asyncio.Lock())
        async with lock:
            self.registry.check_name(function.name)
            if self.registry.function(function.name) is not None and not replace:
                raise InvalidRequest(
                    f"The lora adapter '{function.name}' has already been loaded. If you want to load the adapter in "
                    "place, set 'load_inplace' to True.",
                    param="lora_name",
                )
            stored = await self.store.obtain(function.adapter)
            facts = await self.inspect(backbone.name, stored)
            previous = self.registry.deploy(
                Function(
                    name=function.name,
                    digest=stored.digest,
                    backbone=backbone.name,
                    source=function.adapter,
                    created=int(time.time()),
                    tenant=function.tenant,
                    max_concurrency=function.max_concurrency,
                    slo_ttft_s=function.slo_ttft_s,
                    pinned=function.pinned,
                    size_bytes=facts.size_bytes,
                    rank=facts.rank,
                    modules=facts.modules,
                    kinds=facts.kinds,
                )
            )
        if previous is not None:
            self._forget(previous)
        self.control.controller.made_room()  # a pinned function is loaded by the next plan
        return self.model(function.name)

    async def inspect(self, backbone: str, stored: StoredAdapter) -> Loaded:
        """What loading it finds out. A hostile file can hurt only the worker that was made for looking at it."""
        key = (backbone, stored.digest)
        lock = self._inspectors.setdefault(key, asyncio.Lock())
        async with lock:  # many functions of one adapter, deployed together, look at it once
            if key not in self._inspected:
                service = self._services[backbone]
                async with self._inspecting:
                    await service.wait_ready(self._config.cold_timeout_s)
                    link = await self._workers.start_alone(f"{backbone}/inspect:{stored.digest[:16]}", service)
                    with retired_after(self._workers, link):
                        self._inspected[key] = await self._load_in_time(link, stored)
            return self._inspected[key]

    async def _load_in_time(self, link: WorkerLink, stored: StoredAdapter) -> Loaded:
        """A file may take for ever to load; it must not keep its place, and its name locked, for as long."""
        try:
            async with asyncio.timeout(self._config.cold_timeout_s):
                return await asyncio.shield(link.load(stored.digest, str(stored.path)))
        except TimeoutError:
            raise Unavailable(
                f"the adapter did not load within {self._config.cold_timeout_s:g} s", retry_after_s=30
            ) from None

    async def unload_adapter(self, name: str) -> None:
        removed = self.registry.remove(name)
        if removed is None:
            raise ModelNotFound(f"The lora adapter '{name[:200]}' cannot be found.", param="lora_name")
        self._forget(removed)
        self.control.controller.forget(removed)

    def _forget(self, function: Function) -> None:
        """Its adapter leaves every worker that no other function needs it in."""
        target = Target(self.registry.backbone(function.backbone), function)
        domain = self._domain(target)
        still_used = any(
            other.digest == function.digest and self._domain(self.registry.resolve(other.name)) == domain
            for other in self.registry.functions()
        )
        if (link := self._workers.find(domain)) and not still_used:
            link.unload(function.digest)
            self.control.controller.changed(link)

    async def _deploy_configured(self, function: FunctionConfig) -> None:
        try:
            await self.deploy(function, replace=False)
        except ServerlessLoraError as error:
            raise ConfigError(f"function {function.name!r} cannot be served: {error.message}") from error

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
        stats = [link.stats for link in self._workers if link.stats is not None]
        total_blocks = sum(s.kv_total_blocks for s in stats)
        resident = {digest for link in self._workers for digest in link.adapters}
        return BackendStats(
            running=sum(s.running for s in stats),
            waiting=sum(s.waiting for s in stats) + self.control.queue.num_waiting,
            kv_usage=sum(s.kv_used_blocks for s in stats) / total_blocks if total_blocks else 0.0,
            max_adapters=sum(1 for _ in self.registry.functions()),
            running_adapters=tuple(f.name for f in self.registry.functions() if f.digest in resident),
            waiting_adapters=self.control.queue.waiting_functions,
            held_bytes=self.control.holdings.counted_bytes,
            capacity_bytes=self.control.holdings.capacity_bytes,
        )

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
