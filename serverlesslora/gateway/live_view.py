"""What `backend.live()` and `backend.stats()` tell, read from the fleet's parts. Looks only."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.backend import BackendStats
from serverlesslora.gateway.control_plane import ControlPlane
from serverlesslora.gateway.holdings import Holdings
from serverlesslora.gateway.live_state import (
    FunctionState,
    LiveBackbone,
    LiveFunction,
    LiveMemory,
    LivePart,
    LiveState,
    LiveWorker,
)
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.gateway.worker_state import WorkerState
from serverlesslora.registry.functions import Function
from serverlesslora_ipc.messages import WorkerLimits


def live_of(
    control: ControlPlane,
    services: Mapping[str, BackboneService],
    functions: Iterable[tuple[Function, str]],
    open_requests: Mapping[str, int],
) -> LiveState:
    """`functions`: each with its domain. `open_requests`: by function."""
    now = time.monotonic()
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    shown = []
    for function, domain in functions:
        names[domain, function.digest].append(function.name)
        shown.append(
            LiveFunction(
                name=function.name,
                backbone=function.backbone,
                domain=domain,
                state=_state(control.workers.find(domain), function.digest),
                tenant=function.tenant,
                version=f"v{function.version}",
                pinned=function.pinned,
                size_bytes=function.size_bytes,
                open_requests=open_requests.get(function.name, 0),
            )
        )
    statuses = {service.name: service.status() for service in services.values()}
    workers = [_worker(link, names, statuses[link.backbone].device, control.holdings, now) for link in control.workers]
    serving = Counter(link.backbone for link in control.workers if link.state is WorkerState.SERVING)
    return LiveState(
        functions=tuple(shown),
        workers=tuple(workers),
        backbones=tuple(
            LiveBackbone(each.name, each.state, each.device, each.sharing, each.size_bytes, serving[each.name])
            for each in statuses.values()
        ),
        memory=_memory(control.holdings),
        currency=control.accounts.prices.currency,
    )


def _state(link: WorkerLink | None, digest: str) -> FunctionState:
    if link is None or link.state is not WorkerState.SERVING:
        return "cold"
    return "hot" if link.has(digest) else "disk"


def _worker(
    link: WorkerLink,
    names: Mapping[tuple[str, str], list[str]],
    device: str,
    holdings: Holdings,
    now: float,
) -> LiveWorker:
    stats = link.stats
    total = stats.kv_total_blocks if stats else 0
    loaded = link.loaded
    return LiveWorker(
        worker_id=link.worker_id,
        domain=link.domain,
        backbone=link.backbone,
        device=device,
        state=link.state.value,
        pid=link.pid,
        age_s=now - link.started_at,
        idle_s=0.0 if link.num_open else now - link.last_used,
        open_requests=link.num_open,
        running=stats.running if stats else 0,
        waiting=stats.waiting if stats else 0,
        functions=tuple(name for digest in loaded for name in names.get((link.domain, digest), ())),
        kv_usage=stats.kv_used_blocks / total if stats and total else 0.0,
        kv_bytes=stats.kv_bytes if stats else 0,
        adapter_bytes=sum(loaded.values()),
        size_bytes=_own_bytes(holdings, link) if holdings.map is None else _measured(holdings, link.domain),
    )


def _own_bytes(holdings: Holdings, link: WorkerLink) -> int:
    return sum(r.size_bytes for r in holdings.present.values() if r.domain == link.domain)


def _measured(holdings: Holdings, domain: str) -> int:
    assert holdings.map is not None
    return sum(entry.size_bytes for entry in holdings.map.entries if entry.owner == domain)


def _memory(holdings: Holdings) -> LiveMemory:
    """As it was last looked at; before the first look, what must be there."""
    if holdings.map is not None:
        parts = [LivePart(e.kind, _part_name(e.artifact_id), e.size_bytes) for e in holdings.map.entries]
    else:
        parts = [LivePart(r.kind, _part_name(key), r.size_bytes) for key, r in holdings.present.items()]
    return LiveMemory(holdings.capacity_bytes, holdings.measured_bytes, tuple(p for p in parts if p.size_bytes))


def _part_name(artifact_id: str) -> str:
    return artifact_id.partition(":")[2]


def stats_of(control: ControlPlane, functions: Iterable[tuple[Function, str]], limits: WorkerLimits) -> BackendStats:
    """Adapters are told by the names of functions whose worker has them."""
    links = list(control.workers)
    stats = [link.stats for link in links if link.stats is not None]
    total_blocks = sum(s.kv_total_blocks for s in stats)
    memory: Counter[str] = Counter()
    for resident in control.holdings.present.values():
        memory[resident.kind] += resident.size_bytes
    memory["kv"] = sum(s.kv_bytes for s in stats)
    memory["worker"] = max(0, memory["worker"] - memory["kv"])  # which counts its KV
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for link in links:
        kind = kind_of(link.domain, link.backbone)
        running[kind] += link.stats.running if link.stats else 0
        waiting[kind] += link.stats.waiting if link.stats else 0
    counts = control.holdings.counts_of_gone
    for each in stats:
        counts = counts.plus(each)
    hot = []
    known = 0
    queues = {link.domain: link.backbone for link in links}
    for function, domain in functions:
        known += 1
        queues[domain] = function.backbone
        if _state(control.workers.find(domain), function.digest) == "hot":
            hot.append(function.name)
    for domain, backbone in queues.items():
        waiting[kind_of(domain, backbone)] += control.queue.waiting_in(domain)
    return BackendStats(
        running=sum(running.values()),
        waiting=sum(s.waiting for s in stats) + control.queue.num_waiting,
        kv_usage=sum(s.kv_used_blocks for s in stats) / total_blocks if total_blocks else 0.0,
        max_adapters=known,
        running_adapters=tuple(hot),
        waiting_adapters=control.queue.waiting_functions,
        held_bytes=control.holdings.counted_bytes,
        capacity_bytes=control.holdings.capacity_bytes,
        memory=tuple(memory.items()),
        workers=tuple(Counter(link.state.value for link in links).items()),
        domains=tuple((kind, running[kind], waiting[kind]) for kind in sorted({*running, *waiting})),
        kv_blocks=total_blocks,
        kv_block_size=limits.block_size,
        preemptions=counts.preemptions,
        prefix_queries=counts.prefix_queries,
        prefix_hits=counts.prefix_hits,
        currency=control.accounts.prices.currency,
    )


def kind_of(domain: str, backbone: str) -> str:
    """ "tenant", "function", "base", "shared" (see `registry.domain_of`), or "inspect"."""
    return domain.removeprefix(f"{backbone}/").partition(":")[0]
