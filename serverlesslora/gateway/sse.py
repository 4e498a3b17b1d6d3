"""Server-sent events, and the rule that a request ends when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class SlowReader(Exception):
    """The client stopped reading; what it has not read is held in memory, so it is given up."""


def event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


class EventStream:
    """Writes one event stream to an ASGI `send`."""

    def __init__(self, send: Send, write_timeout_s: float) -> None:
        self._send = send
        self._write_timeout_s = write_timeout_s
        self.started = False

    async def tell(self, headers: Mapping[str, str]) -> None:
        """As headers, or as comments where a ping was sent before they were known."""
        if not self.started:
            await self._start(headers)
        elif headers:
            comments = "".join(f": {name}: {value}\n" for name, value in headers.items())
            await self._body(f"{comments}\n".encode(), more=True)

    async def _start(self, headers: Mapping[str, str]) -> None:
        self.started = True
        raw = Headers({**HEADERS, **headers}).raw
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, chunk: bytes) -> None:
        await self._body(chunk, more=True)

    async def ping(self) -> None:
        """Keeps proxies and clients from giving up; clients skip comments."""
        await self.tell({})
        await self._body(PING, more=True)

    async def finish(self, chunk: bytes = b"") -> None:
        await self._body(chunk + DONE, more=False)

    async def _body(self, chunk: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError:
            raise SlowReader from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (and waited for) as soon as the client leaves.

    The body of the request must have been read before: anything that arrives now is the end of the connection.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
