"""One generation request from admission to its last byte: streamed or whole, aborted when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serverlesslora.gateway.backend import Cold, Event, GenerationRequest, Models
from serverlesslora.gateway.calls import Call
from serverlesslora.gateway.http_errors import answer_for
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.metrics import Metrics
from serverlesslora.gateway.openai import Usage
from serverlesslora.gateway.sse import EventStream, SlowReader, event, while_connected
from serverlesslora.gateway.tools.speech import Dialect

T = TypeVar("T")

CLIENT_LEFT = 499


class Opening(NamedTuple):
    """What is known when the first token is still to come."""

    created: int
    prompt_tokens: int
    dialect: Dialect = Dialect()


class Answer(Protocol):
    """Turns events into bytes; knows nothing of sockets."""

    def add(self, prompt: int, event: Event) -> bytes:
        """What to stream for this event, complete with framing; nothing for an answer that is sent whole."""

    def last(self, usage: Usage) -> bytes:
        """The usage chunk if it was asked for, or the whole body."""


class GenerationResponse(Response):
    """Runs the generations and sends what `make_answer(opening)` makes of them."""

    def __init__(
        self,
        backend: Models,
        requests: Sequence[GenerationRequest],
        make_answer: Callable[[Opening], Answer],
        *,
        stream: bool,
        metrics: Metrics,
        settings: HttpSettings,
        on_end: Callable[[int], None] | None = None,
    ) -> None:
        """`on_end` is told how many tokens it took, prompt and output, however it ends."""
        super().__init__()
        self._backend = backend
        self._requests = requests
        self._make_answer = make_answer
        self._stream = stream
        self._settings = settings
        self._on_end = on_end
        card = backend.model(requests[0].model)
        self._record = metrics.record(card.name, card.tenant)  # `f@v3` counts for `f`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500
        call = Call(self._backend, self._requests, self._record)
        work = self._streamed(call, send) if self._stream else self._whole(call, scope, send)
        try:
            status = await while_connected(receive, work)
        except (ClientDisconnect, SlowReader, asyncio.CancelledError) as error:
            status = CLIENT_LEFT
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            answer = answer_for(error)
            status = answer.status
            await answer.response()(scope, receive, send)
        finally:
            self._record.close(status)
            if self._on_end is not None:
                self._on_end(call.num_tokens)

    async def _whole(self, call: Call, scope: Scope, send: Send) -> int:
        async with call:
            await call.started()
            answer = self._make_answer(Opening(call.created, call.prompt_tokens, call.dialect))
            async with aclosing(call.events()) as events:
                async for prompt, each in events:
                    answer.add(prompt, each)
            response = Response(answer.last(Usage.of(call.finished)), 200, headers_of(call), "application/json")

        async def receive_nothing() -> dict[str, str]:
            raise AssertionError("a plain response does not read")

        await response(scope, receive_nothing, send)
        return 200

    async def _streamed(self, call: Call, send: Send) -> int:
        """Errors before the first byte are raised; later ones go into the stream."""
        interval_s = self._settings.ping_s
        stream = EventStream(send, self._settings.write_timeout_s)
        try:
            async with call:
                await _patiently(call.started(), interval_s, stream.ping)
                await stream.tell(headers_of(call))  # only now is it known how cold it was
                answer = self._make_answer(Opening(call.created, call.prompt_tokens, call.dialect))
                async with aclosing(call.events()) as events:
                    # Only the wait for the first token can be long (a queue); after it a plain loop is cheaper.
                    await _send(stream, answer, await _patiently(_next(events), interval_s, stream.ping))
                    async for each in events:
                        await _send(stream, answer, each)
                last = answer.last(Usage.of(call.finished))
        except Exception as error:
            if not stream.started or isinstance(error, SlowReader):
                raise
            failure = answer_for(error)
            await stream.finish(event(failure.body()))
            return failure.status
        await stream.finish(last)
        return 200


def headers_of(call: Call) -> dict[str, str]:
    headers = {"x-serverlesslora-cold": cold_header(call.cold)}
    if call.digest is not None:
        headers["x-serverlesslora-adapter"] = call.digest
    if call.version is not None:
        headers["x-serverlesslora-version"] = f"v{call.version}"
    return headers


def cold_header(cold: Cold) -> str:
    """The rung first, its time, then the parts, in milliseconds and in the syntax of Server-Timing."""
    by_name = dict(cold.parts)
    total_s = by_name.pop(cold.rung, None)
    if total_s is None:
        total_s = sum(by_name.values())
    entries = [(cold.rung, total_s), *by_name.items()]
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in entries)


async def _send(stream: EventStream, answer: Answer, item: tuple[int, Event]) -> None:
    if chunk := answer.add(*item):
        await stream.write(chunk)


async def _next(events: AsyncIterator[T]) -> T:
    return await anext(events)


async def _patiently(waiting: Awaitable[T], interval_s: float, ping: Callable[[], Awaitable[None]]) -> T:
    """The result of `waiting`, with a ping each time the interval passes without it."""
    task = asyncio.ensure_future(waiting)
    try:
        while not (await asyncio.wait({task}, timeout=interval_s))[0]:
            await ping()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
