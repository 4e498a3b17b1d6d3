"""The data of the live page as one document, cut down to what the key that asks may see.

No prompt and no answer is in it. Without keys, and for the operator's key, it is the whole server; a tenant's key sees
its own functions, and the workers that serve nothing else, but not the machine: no memory, no backbones, no processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import serverlesslora
from serverlesslora.gateway.backend import Backend
from serverlesslora.gateway.door import visit_of
from serverlesslora.gateway.history import BUCKET_S, NUM_BUCKETS, History, Point, Summary
from serverlesslora.gateway.live_state import LiveBackbone, LiveFunction, LiveMemory, LiveState, LiveWorker
from serverlesslora.gateway.page_files import page_routes
from serverlesslora.tenancy.key import Grant

FRESH_S = 0.5  # how long one reading is good for; so many viewers cost no more than two of each kind per second

_encode = msgspec.json.Encoder().encode


class ShownFunction(msgspec.Struct, frozen=True, omit_defaults=True):
    """What it is, and its last hour. Seconds; None: nobody asked."""

    name: str
    backbone: str
    state: str
    tenant: str | None = None
    version: str | None = None
    pinned: bool = False
    size_bytes: int = 0
    open_requests: int = 0
    requests: int | None = 0  # None: not counted for itself, see `History`
    errors: int = 0
    tokens: int = 0
    cost: float = 0.0
    ttft_p50: float | None = None
    ttft_p95: float | None = None


class Columns(msgspec.Struct, frozen=True):
    """The buckets in which something happened, oldest first; a list for each value."""

    at: list[int]
    requests: list[int]
    errors: list[int]
    tokens: list[int]
    cost: list[float]
    ttft_p50: list[float | None]
    ttft_p95: list[float | None]


class Whole(msgspec.Struct, frozen=True):
    """Of the machine: only for who may see all of it."""

    running: int
    waiting: int
    backbones: tuple[LiveBackbone, ...]
    memory: LiveMemory


class Document(msgspec.Struct, frozen=True):
    at: float  # unix seconds
    version: str
    up_s: float
    tenant: str | None  # None: all that there is
    currency: str
    bucket_s: int
    num_buckets: int
    hour: Summary
    history: Columns
    functions: list[ShownFunction]
    bases: list[str]  # that can be asked
    workers: list[LiveWorker]
    server: Whole | None


class LivePage:
    def __init__(
        self,
        backend: Backend,
        history: History,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._history = history
        self._clock = clock
        self._wall_clock = wall_clock
        self._began = self._read_at = clock()
        self._readings: dict[Grant | None, bytes] = {}  # by who may see them

    def routes(self) -> list[Route]:
        return [*page_routes(), Route("/live", self.live, methods=["GET"], include_in_schema=False)]

    async def live(self, request: Request) -> Response:
        visit = visit_of(request)
        content = self.encoded(None if visit is None else visit.key.grant)
        return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")

    def encoded(self, grant: Grant | None) -> bytes:
        now = self._clock()
        if now - self._read_at >= FRESH_S:
            self._readings.clear()
            self._read_at = now
        viewer = None if grant is None or grant.tenant is None else grant
        content = self._readings.get(viewer)
        if content is None:
            content = self._readings[viewer] = _encode(self.document(viewer))
        return content

    def document(self, grant: Grant | None) -> Document:
        state = self._backend.live()
        if grant is None or grant.tenant is None:
            functions, workers, bases = state.functions, state.workers, [each.name for each in state.backbones]
            hour, points = self._history.total()
            tenant, whole = None, self._whole(state)
        else:
            functions = tuple(each for each in state.functions if grant.may_ask(each.name, each.tenant))
            hidden = {each.domain for each in state.functions if not grant.may_ask(each.name, each.tenant)}
            own = {each.domain for each in functions} - hidden
            workers = tuple(_without_process(each) for each in state.workers if each.domain in own)
            bases = [each.name for each in state.backbones] if grant.may_ask_backbones else []
            hour, points = self._history.total([(each.name, each.tenant) for each in functions])
            tenant, whole = grant.tenant, None
        return Document(
            at=round(self._wall_clock(), 3),
            version=serverlesslora.__version__,
            up_s=round(self._clock() - self._began, 1),
            tenant=tenant,
            currency=state.currency,
            bucket_s=BUCKET_S,
            num_buckets=NUM_BUCKETS,
            hour=hour,
            history=_columns(points),
            functions=[self._shown(each) for each in functions],
            bases=bases,
            workers=list(workers),
            server=whole,
        )

    def _whole(self, state: LiveState) -> Whole:
        stats = self._backend.stats()
        return Whole(stats.running, stats.waiting, state.backbones, state.memory)

    def _shown(self, function: LiveFunction) -> ShownFunction:
        known = self._history.summary((function.name, function.tenant))
        hour = known or Summary()
        return ShownFunction(
            name=function.name,
            backbone=function.backbone,
            state=function.state,
            tenant=function.tenant,
            version=function.version,
            pinned=function.pinned,
            size_bytes=function.size_bytes,
            open_requests=function.open_requests,
            requests=hour.requests if known else None,
            errors=hour.errors,
            tokens=hour.tokens,
            cost=hour.cost,
            ttft_p50=hour.ttft_p50,
            ttft_p95=hour.ttft_p95,
        )


def _without_process(worker: LiveWorker) -> LiveWorker:
    return msgspec.structs.replace(worker, pid=None)


def _columns(points: list[Point]) -> Columns:
    return Columns(
        at=[each.at for each in points],
        requests=[each.requests for each in points],
        errors=[each.errors for each in points],
        tokens=[each.tokens for each in points],
        cost=[each.cost for each in points],
        ttft_p50=[each.ttft_p50 for each in points],
        ttft_p95=[each.ttft_p95 for each in points],
    )
