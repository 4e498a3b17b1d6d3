"""One request on its way through the fleet: queued, placed, perhaps placed again, streamed, aborted when its client
leaves, and accounted for however it ends."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from serverlesslora.errors import (
    AdapterInvalid,
    BudgetSpent,
    Overloaded,
    RateLimited,
    ServerlessLoraError,
    Unavailable,
    WorkerLost,
)
from serverlesslora.gateway.accounts import Account
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.backend import Cold, Event, GenerationRequest, Rung, estimated_tokens
from serverlesslora.gateway.journal import current_journal
from serverlesslora.gateway.watched_stream import WatchedStream
from serverlesslora.gateway.worker_link import RemoteError, WorkerLink
from serverlesslora.gateway.workers import Placed, is_retryable
from serverlesslora.registry.functions import Function, Target
from serverlesslora.scheduler.asks import Ask
from serverlesslora_ipc.messages import Finished, Generate, Spent, Started

if TYPE_CHECKING:
    from serverlesslora.gateway.control_plane import ControlPlane


class FleetGeneration:
    """Implements `backend.Generation`. The digest is fixed here: a later deploy of the name does not reach it."""

    def __init__(
        self,
        control: ControlPlane,
        request: GenerationRequest,
        target: Target,
        domain: str,
        service: BackboneService,
    ) -> None:
        self._control = control
        self._request = request
        self._target = target
        self._domain = domain
        self._service = service
        self._id = uuid.uuid4().hex
        self._slo_s = control.objective_s(request, target)
        self._cold_s = control.expected_cold_s(domain, service)
        self._account: Account = control.accounts.open(
            f"{request.request_id}/{self._id[:12]}", target, domain, slo_s=self._slo_s
        )
        self._link: WorkerLink | None = None
        self._stream = self._new_stream()
        self._started: Started | None = None
        self._starter: asyncio.Task[Any] | None = None  # waits for the start
        self._interruption: ServerlessLoraError | None = None  # of that wait
        self._is_over = False
        self._fetched_s = 0.0  # from far away
        self._was_prompt = False  # sent at once to a worker that had everything
        self._cold = Cold()
        self._journal = current_journal()
        self._journal.queued(domain, target.digest)

    @property
    def digest(self) -> str | None:
        return self._target.digest

    @property
    def version(self) -> int | None:
        return self._target.function.version if self._target.function else None

    @property
    def cold(self) -> Cold:
        return self._cold

    async def started(self) -> Started:
        if self._started is None:
            self._starter = asyncio.current_task()
            try:
                self._started = await self._run()
            except ServerlessLoraError as error:
                self._fail(error)
                raise
            except asyncio.CancelledError:
                # As asyncio.timeout does: a cancellation of our own is taken back, its client's goes on.
                if self._interruption is None or self._starter is None or self._starter.uncancel():
                    raise
                self._fail(self._interruption)
                raise self._interruption from None
            finally:
                self._starter = None
        return self._started

    async def __aiter__(self) -> AsyncIterator[Event]:
        await self.started()
        try:
            while True:
                event = await self._stream.next()
                assert not isinstance(event, Started)
                if isinstance(event, Finished):
                    await self._account.finish(event.spent)
                    self._is_over = True
                yield event
                if isinstance(event, Finished):
                    return
        except ServerlessLoraError as error:
            self._fail(error)
            raise

    def interrupt(self, error: ServerlessLoraError) -> None:
        """What has arrived can still be read; then this is raised. Whoever waits for anything hears it now."""
        self._stream.fail(error)
        if self._starter is not None and self._interruption is None:
            self._interruption = error
            self._starter.cancel()

    def close(self) -> None:
        """Abort unless it is over. Never waits."""
        if not self._is_over:
            self._is_over = True
            is_running = self._link is not None and self._link.abort(
                self._id, on_spent=lambda spent: self._account.close("aborted", spent)
            )
            if not is_running:
                self._account.close("aborted", self._stream.spent)
        # Who leaves early has had what was computed for it all the same.
        self._control.queue.left(
            self._id, prompt_tokens=self._stream.prompt_tokens, output_tokens=self._stream.output_tokens
        )

    def _fail(self, error: ServerlessLoraError) -> None:
        self._is_over = True
        if isinstance(error, (BudgetSpent, Overloaded, RateLimited, Unavailable)) and self._link is None:
            self._account.close("refused")
        else:
            self._account.close("failed", error.spent if isinstance(error, RemoteError) else self._stream.spent)

    async def _run(self) -> Started:
        self._control.controller.arrived(self._target, self._domain)
        function = self._target.function
        if function is None:
            return await self._place_and_start()
        store = self._control.store
        with store.hold(function.digest):
            if not store.is_ready(function.digest):
                await self._fetch(function)
            try:
                return await self._place_and_start()
            except AdapterInvalid:
                if store.has(function.digest):
                    raise
                # Another server that shares the store gave it up before the worker had read it.
                await self._fetch(function)
                return await self._place_and_start()

    async def _fetch(self, function: Function) -> None:
        """Have the adapter on this machine, and a worker meanwhile. The request queues only then: who waits for a
        transfer must not hold a place where somebody else's could be computed."""
        loop, store = asyncio.get_running_loop(), self._control.store
        if await store.is_here(function.digest):
            return
        began = loop.time()
        patience_s = min(self._control.cold_timeout_s, self._request.slo_ttft_s or math.inf)
        placing = asyncio.ensure_future(self._control.workers.place(self._domain, self._service))
        placing.add_done_callback(lambda placed: placed.cancelled() or placed.exception())  # told when it queues
        try:
            async with asyncio.timeout(patience_s):
                await store.ensure(function.digest, function.source)
        except TimeoutError:
            raise Unavailable(
                f"the adapter is not here yet, after {patience_s:g} s; it is still being fetched", retry_after_s=5
            ) from None
        finally:
            placing.cancel()
        self._fetched_s = loop.time() - began
        self._cold_s = self._control.expected_cold_s(self._domain, self._service)

    async def _place_and_start(self) -> Started:
        try:
            return await self._attempt()
        except ServerlessLoraError as error:
            if not is_retryable(error, started=self._stream.has_started):
                raise
        return await self._attempt()

    async def _attempt(self) -> Started:
        turn = self._control.queue.offer(self._ask(), cold_s=self._cold_s)
        try:
            placed = await self._place(turn)
            self._journal.placed()
            link = placed.link
            loading = None
            rung: Rung = "backbone" if placed.backbone_s > 0.001 else "worker" if placed.worker_s > 0 else "hot"
            rung = "remote" if self._fetched_s else rung
            digest = self._target.digest
            if digest is not None:
                was_loaded = link.has(digest)
                loading = link.load(digest, str(self._control.store.path_of(digest)))
                if not was_loaded and rung == "hot":
                    rung = "adapter-disk"
            if waited := not turn.done():
                await asyncio.wait([turn, link.gone], return_when=asyncio.FIRST_COMPLETED)
            if link.gone.done():
                raise WorkerLost("the worker ended before the request was sent")
            turn.result()
            if digest is not None:
                # It may have been unloaded meanwhile.
                loading = link.load(digest, str(self._control.store.path_of(digest)))
        except BaseException:
            turn.cancel()
            self._control.queue.left(self._id)
            raise
        self._account.rung = rung
        self._was_prompt = rung == "hot" and not waited
        self._stream = self._new_stream()
        self._link = link
        link.submit(self._message(), self._stream)
        self._journal.sent()
        try:
            if loading is not None:
                loaded = await asyncio.shield(loading)  # others wait for the same load
            started = await self._stream.next()
        except ServerlessLoraError:
            link.abort(self._id)
            self._control.queue.left(self._id)
            raise
        assert isinstance(started, Started)
        parts = [("remote", self._fetched_s), ("backbone", placed.backbone_s if rung == "backbone" else 0.0)]
        parts.append(("worker", placed.worker_s))
        if loading is not None and rung != "hot":
            parts.append(("adapter", loaded.seconds))
        self._cold = Cold(rung=rung, parts=tuple((name, seconds) for name, seconds in parts if seconds > 0))
        return started

    async def _place(self, turn: asyncio.Future[None]) -> Placed:
        """The worker. A request that is refused while its worker starts does not wait for the start."""
        if (link := self._control.workers.serving(self._domain)) is not None:
            return Placed(link, 0.0, 0.0)
        placing = asyncio.ensure_future(self._control.workers.place(self._domain, self._service))
        try:
            either: list[asyncio.Future[Any]] = [placing, turn]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                turn.result()
            return await placing
        finally:
            placing.cancel()

    def _ask(self) -> Ask:
        sampling = self._request.sampling
        function = self._target.function
        return Ask(
            request_id=self._id,
            function=function.name if function else self._target.backbone.name,
            tenant=function.tenant if function else None,
            domain=self._domain,
            device=self._control.device,
            prompt_tokens=estimated_tokens(self._request.prompt),
            max_tokens=sampling.max_tokens or self._service.context_length or 0,
            arrived_at=self._account.arrived_at,
            deadline=self._deadline or math.inf,
            sequences=self._request.n,
            backbone=self._target.backbone.name,
        )

    @property
    def _deadline(self) -> float | None:
        """When its first token is too late to be worth computing.

        A start that takes longer than the objective misses it, and is waited for all the same, as long as any start
        is; only a client that says itself how long it will wait is not kept longer.
        """
        if not self._control.keeps_deadlines or (self._request.is_batch and self._request.slo_ttft_s is None):
            return None
        is_cold = bool(self._cold_s or self._fetched_s)
        patience_s = self._control.cold_timeout_s if is_cold and self._request.slo_ttft_s is None else 0.0
        return self._account.arrived_at + self._slo_s + patience_s

    def _message(self) -> Generate:
        return Generate(
            request_id=self._id,
            adapter=self._target.digest,
            prompt=self._request.prompt,
            sampling=self._request.sampling,
            n=self._request.n,
            echo=self._request.echo,
            deadline=self._deadline,
            pooling=self._request.pooling,
            token_strs=self._request.token_strs,
        )

    def _new_stream(self) -> WatchedStream:
        return WatchedStream(self._on_first_token, self._on_end)

    def _on_first_token(self) -> None:
        self._account.saw_token()
        self._control.queue.first_token(self._id, is_typical=self._account.rung == "hot")

    def _on_end(self, spent: Spent) -> None:
        first_token_s = self._account.first_token_s
        if spent.first_token_s and first_token_s is not None:
            if self._was_prompt:
                self._control.holdings.answered_at_once(first_token_s - spent.first_token_s)
            elif self._account.rung == "worker":
                backbone = self._target.backbone.name
                self._control.holdings.answered_first(backbone, spent.prompt_tokens, spent.first_token_s)
        self._control.queue.left(self._id, prompt_tokens=spent.prompt_tokens, output_tokens=spent.completion_tokens)
