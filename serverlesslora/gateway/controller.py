"""Carries out what the policies decide: who is kept, started ahead and moved out, and what all of it weighs.

The policies are pure; this is where they meet processes. It runs on the event loop, and every look at the world is
followed by its act without waiting in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from math import inf

import msgspec

from serverlesslora.adapters.store import AdapterStore
from serverlesslora.errors import ServerlessLoraError, Unavailable
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.holdings import ITSELF, Holdings
from serverlesslora.gateway.request_queue import RequestQueue
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.gateway.worker_state import WorkerState
from serverlesslora.gateway.workers import Workers
from serverlesslora.registry.functions import Function, Target, domain_of
from serverlesslora.registry.registry import Registry
from serverlesslora.scheduler.artifacts import Artifact, Eviction, Move, Offload, Plan, Wait
from serverlesslora.scheduler.catalogue import FunctionFacts, adapter_id, catalogue
from serverlesslora.scheduler.policies import Policies
from serverlesslora.scheduler.settings import Switch

log = logging.getLogger("serverlesslora.controller")

TICK_S = 1.0
ASK_EVERY_S = 5.0
PLANNED_ASIDE = 300  # functions; from here on a plan takes long enough to be felt in streams
PLANNING_SHARE = 0.02  # of a core: planning for very many functions happens less often


class Controller:
    def __init__(
        self,
        policies: Policies,
        *,
        registry: Registry,
        services: Mapping[str, BackboneService],
        holdings: Holdings,
        isolation: str,
        sharing: Switch,
        store: AdapterStore,
        cold_timeout_s: float,
        rest_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rest_after_s`: a backbone that was loaded on demand is given back when it had no worker for so long."""
        self.policies = policies
        self._registry = registry
        self._services = services
        self.holdings = holdings
        self._isolation = isolation
        self._sharing = sharing
        self._store = store
        self._cold_timeout_s = cold_timeout_s
        self._rest_after_s = rest_after_s
        self._clock = clock
        self._workers: Workers
        self._queue: RequestQueue
        self._room = asyncio.Event()  # something left, or stopped being in use
        self._room_turn = asyncio.Lock()  # who asked first gets the room first
        self._bare = {domain_of(Target(b, None), isolation=isolation): b.name for b in registry.backbones()}
        self._functions: dict[str, list[Function]] = {}  # by domain
        self._functions_version = -1
        self._timeouts: dict[str, tuple[float, Wait]] = {}  # by domain: when it was asked for, and the answer
        self._wake_at: dict[str, float] = {}  # domains that were let go, and when to start them again; inf: never
        self._ahead: dict[str, asyncio.Task[None]] = {}  # starts nobody waits for
        self._has_news = True
        self._next_plan_at = 0.0
        self.last_offload: Offload | None = None

    def connect(self, workers: Workers, queue: RequestQueue) -> None:
        self._workers = workers
        self._queue = queue

    # --- what happens

    def arrived(self, target: Target, domain: str) -> None:
        name = target.function.name if target.function else target.backbone.name
        self.policies.arrivals.observe(name, self._clock())
        self._wake_at.pop(domain, None)
        self._has_news = True
        if target.function is not None:
            self.holdings.owned(domain, target.function.digest, name, target.function.tenant)
        elif self._isolation != "shared":
            self.holdings.owned(domain, ITSELF, name, None)

    def changed(self, link: WorkerLink) -> None:
        """A worker began to serve, leaves, is gone, or holds other adapters than before."""
        if link.state is WorkerState.GONE:
            self.holdings.gone(link)
        elif link.load_seconds is not None:
            self.holdings.measured.adapter_s.add(link.load_seconds)
            link.load_seconds = None
        serving = self._workers.find(link.domain)
        if serving is not None and serving.state is WorkerState.SERVING:
            self._queue.opened(link.domain)
        elif serving is None:
            self._queue.closed(link.domain)
        self.holdings.update()
        self.made_room()

    def made_room(self) -> None:
        """Something may fit now that did not before."""
        self._has_news = True
        self._room.set()

    def looked(self) -> None:
        """The memory was counted anew. Whoever waits for room tries again; a plan needs more news than that."""
        self._room.set()

    def forget(self, function: Function) -> None:
        """It was removed: nothing is remembered of it."""
        self.policies.arrivals.forget(function.name)
        domain = self._domain(function)
        self.holdings.disowned(domain, function.digest)
        if not self._functions_of(domain):
            self._timeouts.pop(domain, None)
            self._wake_at.pop(domain, None)

    # --- how long, and is there room

    def idle_timeout(self, domain: str) -> float:
        if any(function.pinned for function in self._functions_of(domain)):
            return inf
        return self.keep_alive(domain).seconds

    def keep_alive(self, domain: str) -> Wait:
        """How long the domain's worker may be idle, counted from its last use."""
        now = self._clock()
        link = self._workers.find(domain)
        idle_since = link.last_used if link is not None else now
        known = self._timeouts.get(domain)
        # What is right changes with the time of silence: asked again now and then, and always before acting on it.
        if known is None or now - known[0] > ASK_EVERY_S or now - idle_since >= known[1].seconds:
            size_bytes, delay_s = self._worth_of_worker()
            wait = self.policies.keep_alive.idle_timeout(
                self._names(domain), now, idle_since=idle_since, size_bytes=size_bytes, delay_s=delay_s
            )
            known = self._timeouts[domain] = (now, wait)
        return known[1]

    def let_go(self, domain: str) -> None:
        """Its worker was stopped for idleness: it is not started ahead again before its time."""
        now = self._clock()
        size_bytes, delay_s = self._worth_of_worker()
        wait = self.policies.keep_alive.wake_in(self._names(domain), now, size_bytes=size_bytes, delay_s=delay_s)
        self._wake_at[domain] = now + wait.seconds if wait is not None else inf
        self._timeouts.pop(domain, None)

    def _worth_of_worker(self) -> tuple[int, float]:
        """Its bytes, and what a request waits without it."""
        return self.holdings.profile.worker_bytes, self.holdings.profile.worker_s

    async def make_room(self, domain: str, service: BackboneService) -> None:
        """Before a worker is made. Raises Unavailable when all memory stays in use."""
        async with self._room_turn:
            await self._wait_for_room(domain, self.holdings.bytes_of_start(service))

    async def _wait_for_room(self, domain: str, needed: int) -> None:
        deadline = self._clock() + 0.9 * self._cold_timeout_s  # before whoever waits gives up without a reason
        while (missing := self.holdings.missing_for(needed)) > 0:
            if needed > self.holdings.capacity_bytes:
                raise Unavailable(
                    f"a worker needs {needed >> 20} MiB, and the server may use {self.holdings.capacity_bytes >> 20}",
                    retry_after_s=60,
                )
            self._offload(missing, f"room for {domain}")
            if self.holdings.missing_for(needed) <= 0:
                return
            self._room.clear()
            try:
                async with asyncio.timeout(deadline - self._clock()):
                    await self._room.wait()
            except TimeoutError:
                raise Unavailable(
                    f"the memory is taken by functions that are busy ({missing >> 20} MiB are missing); try again",
                    retry_after_s=5,
                ) from None

    def _offload(self, missing: int, reason: str) -> None:
        missing -= self.holdings.leaving_bytes
        if missing <= 0:
            return
        present = self._present(self.catalogue(only_present=True))
        offload = self.policies.offloader.free(
            self.holdings.place, present, missing, in_use=self._in_use(present), reason=reason
        )
        if offload.evictions:
            self.last_offload = offload
        for eviction in offload.evictions:
            log.info("moving out %s: %s", eviction.artifact_id, eviction.reason)
            self._evict(eviction.artifact_id)
            self.policies.preloader.moved(eviction.artifact_id, self.holdings.place.place_id, self._clock())

    # --- planning

    async def main_loop(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            try:
                self._relieve()
                for service in self._services.values():
                    service.rest(self._rest_after_s)
                due = [domain for domain, at in self._wake_at.items() if at <= now]
                if (self._has_news or due) and now >= self._next_plan_at:
                    self._has_news = False
                    await self._plan_and_act()
                    for domain in due:  # it had its chance; the next arrival gives it another
                        if self._wake_at.get(domain, inf) <= now:
                            self._wake_at[domain] = inf
            except Exception:  # planning must go on whatever one plan ran into
                log.exception("a plan could not be made or carried out")

    async def _plan_and_act(self) -> None:
        began = self._clock()
        try:
            self.holdings.update()
            if self._registry.num_functions > PLANNED_ASIDE:
                # It reads only what is replaced as a whole; what has changed meanwhile is seen when it is carried out.
                plan = await asyncio.to_thread(self._plan, explain=False)
            else:
                plan = self._plan(explain=False)
            self._carry_out(plan.moves)
        finally:
            self._next_plan_at = self._clock() + (self._clock() - began) / PLANNING_SHARE

    def _relieve(self) -> None:
        """Above the watermark something leaves before anybody needs the room."""
        if (over := self.holdings.over_watermark()) > 0:
            self._offload(over, "above the watermark")

    def plan(self, *, explain: bool = False) -> Plan:
        """What should lie where now; nothing is done yet."""
        self.holdings.update()
        return self._plan(explain=explain)

    def _plan(self, *, explain: bool) -> Plan:
        worth = self.catalogue()
        artifacts = {artifact.artifact_id: artifact for artifact in self._candidates(worth)}
        present = self._present(worth)
        artifacts |= {artifact.artifact_id: artifact for artifact in present}
        place = self.holdings.place
        return self.policies.preloader.plan(
            [place],
            list(artifacts.values()),
            {place.place_id: [artifact.artifact_id for artifact in present]},
            now=self._clock(),
            in_use=[(place.place_id, each) for each in self._in_use(present)],
            explain=explain,
        )

    def catalogue(self, *, only_present: bool = False) -> list[Artifact]:
        """Everything that could lie in memory, or only what belongs to a domain that has something there, with what it
        is worth now."""
        now = self._clock()
        last_used = {
            name: seen for name in self._all_names() if (seen := self.policies.arrivals.last_seen(name)) is not None
        }
        return catalogue(
            list(self._facts({link.domain for link in self._workers} if only_present else None)),
            rate=lambda name: self.policies.arrivals.rate(name, now),
            profile=self.holdings.profile,
            tier=self.holdings.place.tier,
            last_used=last_used,
            sharing=self._sharing,
        )

    def _candidates(self, worth: list[Artifact]) -> Iterator[Artifact]:
        """Not those that were let go for idleness, before it is time."""
        now = self._clock()
        asleep = {domain for domain, at in dict(self._wake_at).items() if at > now}
        return (each for each in worth if each.pinned or domain_in(each.artifact_id) not in asleep)

    def _present(self, worth: list[Artifact]) -> list[Artifact]:
        """What is there at its real size, with what it is worth; also what no function needs any more."""
        known = {artifact.artifact_id: artifact for artifact in worth}
        place = self.holdings.place
        present = []
        for artifact_id, resident in dict(self.holdings.present).items():
            artifact = known.get(artifact_id) or Artifact(
                artifact_id,
                resident.kind,
                place.tier,
                resident.size_bytes,
                delay_s=0.0,
                rate=0.0,
                needs=self.holdings.needs(artifact_id),
                pinned=resident.kind in ("process", "backbone"),
            )
            present.append(msgspec.structs.replace(artifact, size_bytes=resident.size_bytes))
        return present

    def _in_use(self, artifacts: list[Artifact]) -> set[str]:
        busy = {link.domain for link in self._workers if not self._workers.is_idle(link)}
        return {
            each.artifact_id
            for each in artifacts
            if each.kind in ("process", "backbone") or domain_in(each.artifact_id) in busy
        }

    # --- for people

    def would_evict(self) -> tuple[Eviction, ...]:
        """What would leave first if memory became short now."""
        present = self._present(self.catalogue())
        return self.policies.offloader.free(
            self.holdings.place, present, 1, in_use=self._in_use(present), reason="if memory were short"
        ).evictions

    def domains(self) -> list[str]:
        """Every domain that has functions or a worker."""
        self._functions_of("")
        served = (link.domain for link in self._workers if self._workers.find(link.domain) is link)
        return sorted({*self._functions, *served})

    def rate(self, domain: str) -> float:
        now = self._clock()
        return sum(self.policies.arrivals.rate(name, now) for name in self._names(domain))

    def wakes_in_s(self, domain: str) -> float | None:
        at = self._wake_at.get(domain, inf)
        return None if at == inf else max(0.0, at - self._clock())

    # --- doing

    def _carry_out(self, moves: tuple[Move, ...]) -> None:
        loads: dict[str, set[str]] = {}
        for move in moves:
            log.info("%s %s: %s", move.action, move.artifact_id, move.reason)
            self.policies.preloader.moved(move.artifact_id, move.place_id, self._clock())
            if move.action == "evict":
                self._evict(move.artifact_id)
            elif domain := domain_in(move.artifact_id):  # backbones are loaded by their services
                loads.setdefault(domain, set()).add(move.artifact_id)
        for domain, wanted in loads.items():
            self._load(domain, wanted)

    def _evict(self, artifact_id: str) -> None:
        kind, _, rest = artifact_id.partition(":")
        link = self._workers.find(domain_in(artifact_id) or "")
        if link is None:
            return
        if kind == "worker" and self._workers.is_idle(link):
            self._workers.retire(link)
        elif kind == "adapter":
            link.unload(rest.rpartition(":")[2])

    def _load(self, domain: str, wanted: Collection[str]) -> None:
        self._wake_at.pop(domain, None)
        if domain not in self._ahead:
            task = asyncio.create_task(self._load_ahead(domain, wanted), name=f"ahead {domain}")
            self._ahead[domain] = task
            task.add_done_callback(lambda _: self._ahead.pop(domain, None))

    async def _load_ahead(self, domain: str, wanted: Collection[str]) -> None:
        service = self._service_of(domain)
        if service is None:
            return
        try:
            functions = [f for f in self._functions_of(domain) if adapter_id(domain, f.digest) in wanted]
            with contextlib.ExitStack() as held:
                paths = []
                for function in functions:  # before the worker, which would wait for what is far away
                    held.enter_context(self._store.hold(function.digest))
                    paths.append(await self._store.ensure(function.digest, function.source))
                link = (await self._workers.place(domain, service)).link
                for function, path in zip(functions, paths, strict=True):
                    self.holdings.owned(domain, function.digest, function.name, function.tenant)
                    await asyncio.shield(link.load(function.digest, str(path)))
        except ServerlessLoraError as error:
            log.warning("%s could not be loaded ahead: %s", domain, error)

    async def shutdown(self) -> None:
        for task in list(self._ahead.values()):
            task.cancel()
        await asyncio.gather(*self._ahead.values(), return_exceptions=True)

    # --- functions and domains

    def _service_of(self, domain: str) -> BackboneService | None:
        functions = self._functions_of(domain)
        name = functions[0].backbone if functions else self._bare.get(domain)
        return self._services[name] if name is not None else None

    def _domain(self, function: Function) -> str:
        return domain_of(Target(self._registry.backbone(function.backbone), function), isolation=self._isolation)

    def _functions_of(self, domain: str) -> list[Function]:
        """Each as every version that somebody gets."""
        if self._functions_version != self._registry.version:
            self._functions = {}
            for function in self._registry.routed():
                self._functions.setdefault(self._domain(function), []).append(function)
            self._functions_version = self._registry.version
        return self._functions.get(domain, [])

    def _names(self, domain: str) -> list[str]:
        """What the domain's arrivals are counted under; those of a bare backbone under its own name."""
        functions = list(dict.fromkeys(function.name for function in self._functions_of(domain)))
        backbone = self._bare.get(domain)
        return functions if backbone is None else [*functions, backbone]

    def _all_names(self) -> Iterator[str]:
        yield from (backbone.name for backbone in self._registry.backbones())
        yield from (function.name for function in self._registry.functions())

    def _facts(self, domains: Collection[str] | None) -> Iterator[FunctionFacts]:
        """Functions, and bare backbones as functions without an adapter; of backbones that are there."""
        for domain, name in self._bare.items():
            if self._services[name].takes_requests and (domains is None or domain in domains):
                yield FunctionFacts(name, None, domain, name, None, 0)
        if domains is None:
            functions = self._registry.routed()
        else:
            functions = (function for domain in domains for function in self._functions_of(domain))
        for function in functions:
            if not self._services[function.backbone].takes_requests:
                continue
            yield FunctionFacts(
                name=function.name,
                tenant=function.tenant,
                domain=self._domain(function),
                backbone=function.backbone,
                digest=function.digest,
                adapter_bytes=function.size_bytes,
                pinned=function.pinned,
                slo_s=function.slo_ttft_s,
                share=function.share,
            )


def domain_in(artifact_id: str) -> str | None:
    """The domain a worker or an adapter belongs to; None for what belongs to none."""
    kind, _, rest = artifact_id.partition(":")
    if kind == "worker":
        return rest
    return rest.rpartition(":")[0] if kind == "adapter" else None
