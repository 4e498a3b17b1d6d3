"""A server of a few lines, on whose every byte a test can decide, and plans to ask it with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import httptools

from serverlesslora_loadgen.plan import Planned
from serverlesslora_loadgen.record import Record

TOKENS = 3


class Peer(asyncio.Protocol):
    """One connection of a server that answers whatever it is told to."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.headers: dict[str, str] = {}
        self.path = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not derive from it
        self._server.peers.append(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.path, self.body, self.headers = url.decode(), b"", {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self._server.asked(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._server.peers.remove(self)

    # --- parts of an answer

    def begin(self, *headers: str) -> None:
        lines = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked", *headers]
        self.transport.write("\r\n".join([*lines, "", ""]).encode())

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def token(self, number: int) -> None:
        wanted = json.loads(self.body)
        reason = "length" if number == wanted["max_tokens"] - 1 else None
        choice = {"index": 0, "text": f"{wanted['model'][0]}{number}", "token_ids": [number], "finish_reason": reason}
        self.chunk(b"data: %b\n\n" % json.dumps({"model": wanted["model"], "choices": [choice]}).encode())

    def end(self) -> None:
        wanted = json.loads(self.body)
        usage = {"prompt_tokens": 2, "completion_tokens": wanted["max_tokens"]}
        self.chunk(b"data: %b\n\n" % json.dumps({"model": wanted["model"], "choices": [], "usage": usage}).encode())
        self.chunk(b"data: [DONE]\n\n")
        self.transport.write(b"0\r\n\r\n")

    def answer(self, *headers: str) -> None:
        self.begin(*headers)
        for number in range(json.loads(self.body)["max_tokens"]):
            self.token(number)
        self.end()

    def refuse(self, status: str, *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", "Content-Length: 2", *headers, "", "no"]
        self.transport.write("\r\n".join(lines).encode())


class Server:
    def __init__(self, asked: Callable[[Peer], None]) -> None:
        self.peers: list[Peer] = []
        self.requests = 0
        self.connections = 0
        self._asked = asked
        self._server: asyncio.Server | None = None
        self.url = ""

    def _connected(self) -> Peer:
        self.connections += 1
        return Peer(self)

    def asked(self, peer: Peer) -> None:
        self.requests += 1
        self._asked(peer)

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, "127.0.0.1", 0, ssl=tls, backlog=1024)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"

    async def stop(self) -> None:
        """As by a crash: nothing listens any more, connections end where they are."""
        if self._server is not None:
            self._server.close()
            for peer in list(self.peers):
                peer.transport.abort()
            while self.peers:
                await asyncio.sleep(0)
            self._server = None


@contextlib.asynccontextmanager
async def serving(asked: Callable[[Peer], None], tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(asked)
    await server.start(tls)
    try:
        yield server
    finally:
        await server.stop()


async def deafen(server: Server, seconds: float, tls: ssl.SSLContext | None = None) -> list[float]:
    """Starts it again, reading nothing for so long of whoever connects; when that ended is put into the list."""
    went_on: list[float] = []
    accept = server._connected

    def connected() -> Peer:
        peer = accept()
        made = peer.connection_made

        def connection_made(transport: asyncio.BaseTransport) -> None:
            made(transport)
            peer.transport.pause_reading()

            def go_on() -> None:
                went_on.append(time.monotonic())
                peer.transport.resume_reading()

            asyncio.get_running_loop().call_later(seconds, go_on)

        peer.connection_made = connection_made  # type: ignore[method-assign]
        return peer

    server._connected = connected  # type: ignore[method-assign]
    await server.stop()
    await server.start(tls)
    return went_on


def planned(count: int, *, every_s: float = 0.0, model: str = "tea", **fields: Any) -> list[Planned]:
    body = json.dumps({"model": model, "max_tokens": TOKENS}).encode()
    return [
        Planned(**{"id": i, "at_s": i * every_s, "model": model, "body": body} | COUNTS | fields)  # type: ignore[arg-type]
        for i in range(count)
    ]


COUNTS = {"input_tokens": 2, "output_tokens": TOKENS}


def run(test: Awaitable[Any], *, new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(60):
            return await test

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(limited())


def outcomes(records: list[Record]) -> Counter[str]:
    return Counter(record.failure or record.outcome for record in records)
