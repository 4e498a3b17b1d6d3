"""What `GET /admin/plan` shows: what lies where, what it is worth, what would come or go next, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from serverlesslora.gateway.request_queue import RequestQueue
from serverlesslora.gateway.workers import Workers
from serverlesslora.scheduler.artifacts import Offload, Verdict
from serverlesslora.scheduler.settings import PolicySettings

if TYPE_CHECKING:
    from serverlesslora.gateway.controller import Controller


class DomainView(msgspec.Struct, frozen=True):
    domain: str
    state: str  # of its worker; "zero" without one
    rate: float  # requests/s expected now
    keep_alive_s: float
    keep_alive_reason: str
    wakes_in_s: float | None  # let go, and when it is started ahead; None: not
    queue: str


class PlanView(msgspec.Struct, frozen=True):
    place: str
    capacity_bytes: int
    counted_bytes: int  # what the server holds, by its own count
    measured_bytes: int | None  # the same by /proc, when it was last looked at
    watermark: float
    policies: dict[str, str]
    verdicts: tuple[Verdict, ...]  # densest first
    next_load: str | None
    next_evict: str | None
    last_offload: Offload | None
    domains: tuple[DomainView, ...]


def view_of(controller: Controller, queue: RequestQueue, workers: Workers, settings: PolicySettings) -> PlanView:
    """Looks only: no policy learns anything from being asked."""
    holdings = controller.holdings
    plan = controller.plan(explain=True)
    verdicts = sorted(plan.verdicts, key=lambda verdict: (-verdict.density, verdict.artifact_id))
    evictions = controller.would_evict()
    return PlanView(
        place=holdings.place.place_id,
        capacity_bytes=holdings.capacity_bytes,
        counted_bytes=holdings.counted_bytes,
        measured_bytes=holdings.measured_bytes,
        watermark=settings.watermark,
        policies={name: getattr(settings, name) for name in ("sharing", "preload", "offload", "batching")},
        verdicts=tuple(verdicts),
        next_load=next((f"{move.artifact_id}: {move.reason}" for move in plan.moves if move.action == "load"), None),
        next_evict=next((f"{each.artifact_id}: {each.reason}" for each in evictions), None),
        last_offload=controller.last_offload,
        domains=tuple(_domains(controller, queue, workers)),
    )


def _domains(controller: Controller, queue: RequestQueue, workers: Workers) -> list[DomainView]:
    views = []
    for domain in controller.domains():
        link = workers.find(domain)
        keep_alive = controller.keep_alive(domain)
        views.append(
            DomainView(
                domain=domain,
                state=link.state.value if link else "zero",
                rate=controller.rate(domain),
                keep_alive_s=keep_alive.seconds,
                keep_alive_reason=keep_alive.reason,
                wakes_in_s=controller.wakes_in_s(domain),
                queue=queue.explain(domain),
            )
        )
    return views
