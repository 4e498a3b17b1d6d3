"""One request on its way through the fleet: placed, perhaps placed again, streamed, aborted when its client leaves."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.backend import Cold, Event, GenerationRequest, Rung
from serverlesslora.gateway.registry import Target
from serverlesslora.gateway.worker_link import Stream, WorkerLink
from serverlesslora.gateway.workers import is_retryable
from serverlesslora_ipc.messages import Finished, Generate, Started

if TYPE_CHECKING:
    from serverlesslora.gateway.fleet import Fleet


class FleetGeneration:
    """Implements `backend.Generation`. The digest is fixed here: a later deploy of the name does not reach it."""

    def __init__(self, fleet: Fleet, request: GenerationRequest, target: Target) -> None:
        self._fleet = fleet
        self._request = request
        self._target = target
        self._id = uuid.uuid4().hex
        self._link: WorkerLink | None = None
        self._stream = Stream()
        self._started: Started | None = None
        self._is_over = False
        self._cold = Cold()

    @property
    def digest(self) -> str | None:
        return self._target.digest

    @property
    def cold(self) -> Cold:
        return self._cold

    async def started(self) -> Started:
        if self._started is None:
            try:
                self._started = await self._run()
            except ServerlessLoraError:
                self._is_over = True
                raise
        return self._started

    async def __aiter__(self) -> AsyncIterator[Event]:
        await self.started()
        try:
            while True:
                event = await self._stream.next()
                assert not isinstance(event, Started)
                self._is_over = self._is_over or isinstance(event, Finished)
                yield event
                if isinstance(event, Finished):
                    return
        except ServerlessLoraError:
            self._is_over = True
            raise

    def close(self) -> None:
        """Abort unless it is over. Never waits."""
        if not self._is_over and self._link is not None:
            self._link.abort(self._id)
        self._is_over = True

    async def _run(self) -> Started:
        try:
            return await self._attempt()
        except ServerlessLoraError as error:
            if not is_retryable(error, started=self._stream.has_started):
                raise
        return await self._attempt()

    async def _attempt(self) -> Started:
        placed = await self._fleet.place(self._target)
        link = placed.link
        loading = None
        rung: Rung = "backbone" if placed.backbone_s > 0.001 else "worker" if placed.worker_s > 0 else "hot"
        digest = self._target.digest
        if digest is not None:
            was_loaded = link.has(digest)
            loading = link.load(digest, str(self._fleet.store.path_of(digest)))
            if not was_loaded and rung == "hot":
                rung = "adapter-disk"
        self._stream = Stream()
        self._link = link
        link.submit(
            Generate(
                request_id=self._id,
                adapter=digest,
                prompt=self._request.prompt,
                sampling=self._request.sampling,
                n=self._request.n,
                echo=self._request.echo,
            ),
            self._stream,
        )
        try:
            if loading is not None:
                loaded = await asyncio.shield(loading)  # others wait for the same load
            started = await self._stream.next()
        except ServerlessLoraError:
            link.abort(self._id)
            raise
        assert isinstance(started, Started)
        parts = [("backbone", placed.backbone_s if rung == "backbone" else 0.0), ("worker", placed.worker_s)]
        if loading is not None and rung != "hot":
            parts.append(("adapter", loaded.seconds))
        self._cold = Cold(rung=rung, parts=tuple((name, seconds) for name, seconds in parts if seconds > 0))
        return started
