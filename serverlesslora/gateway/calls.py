"""The generations behind one HTTP request: one per prompt, run at the same time, read as one stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from types import TracebackType

from serverlesslora.gateway.backend import RUNGS, Cold, Event, Generation, GenerationRequest, Models
from serverlesslora.gateway.metrics import RequestRecord
from serverlesslora.gateway.tools.speech import Dialect
from serverlesslora_ipc.messages import Delta, Finished

MERGE_AHEAD = 64  # events read ahead of a slow client when several generations are merged


class Call:
    """Leaving it aborts whatever has not finished."""

    def __init__(self, backend: Models, requests: Sequence[GenerationRequest], record: RequestRecord) -> None:
        self.created = int(time.time())
        self.finished: list[Finished] = []
        self.prompt_tokens = 0
        self.dialect = Dialect()  # of the last generation; they are all of one function
        self._output_tokens = 0
        self._backend = backend
        self._requests = requests
        self._record = record
        self._stack = AsyncExitStack()
        self._generations: list[Generation] = []

    async def __aenter__(self) -> Call:
        try:
            for request in self._requests:
                self._generations.append(await self._stack.enter_async_context(self._backend.generate(request)))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def digest(self) -> str | None:
        return self._generations[0].digest if self._generations else None

    @property
    def version(self) -> int | None:
        """Of the function that answers; None for a backbone."""
        return self._generations[0].version if self._generations else None

    @property
    def cold(self) -> Cold:
        """Of the coldest generation: what this request waited for."""
        colds = [generation.cold for generation in self._generations] or [Cold()]
        return max(colds, key=lambda cold: (RUNGS.index(cold.rung), sum(seconds for _, seconds in cold.parts)))

    @property
    def num_tokens(self) -> int:
        """Prompt and output, as far as it came."""
        if len(self.finished) == len(self._requests):
            return sum(each.prompt_tokens + each.completion_tokens for each in self.finished)
        return self.prompt_tokens + self._output_tokens

    async def started(self) -> None:
        for generation in self._generations:
            started = await generation.started()
            self.prompt_tokens += started.prompt_tokens
            self.dialect = Dialect(started.tool_format, started.reasoning_tags, started.reasoning_open)
        self._record.cold(self.cold)

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """(prompt, event) in the order of arrival; the first failure is raised."""
        source = self._only() if len(self._generations) == 1 else self._merged()
        async with aclosing(source):
            async for prompt, event in source:
                if type(event) is Delta:
                    self._record.delta(prompt, event)
                    self._output_tokens += len(event.token_ids)
                elif type(event) is Finished:
                    self._record.finished(event)
                    self.finished.append(event)
                yield prompt, event

    async def _only(self) -> AsyncGenerator[tuple[int, Event]]:
        async for event in self._generations[0]:
            yield 0, event

    async def _merged(self) -> AsyncGenerator[tuple[int, Event]]:
        queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(MERGE_AHEAD)

        async def pump(prompt: int, generation: Generation) -> None:
            try:
                async for event in generation:
                    await queue.put((prompt, event))
                await queue.put((prompt, None))
            except Exception as error:
                await queue.put((prompt, error))

        pumps = [asyncio.create_task(pump(*each)) for each in enumerate(self._generations)]
        try:
            running = len(pumps)
            while running:
                prompt, event = await queue.get()
                if event is None:
                    running -= 1
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield prompt, event
        finally:
            for each in pumps:
                each.cancel()
