"""How the null server serves: one protocol object per connection, and one timer that all answers share."""

from __future__ import annotations

import asyncio
import functools
import heapq
import math
from collections.abc import Callable
from time import monotonic, process_time
from typing import Annotated, Generic, TypeVar, cast

import httptools
import msgspec
from msgspec import Meta

from serverlesslora_loadgen.client.alarm import Alarm
from serverlesslora_loadgen.errors import TargetError
from serverlesslora_loadgen.null_answers import (
    CLOSE,
    END,
    STREAM_HEAD,
    Body,
    Phrases,
    chunk,
    decode,
    json_answer,
    phrases,
    refusal,
    usage,
    whole,
    words_of,
)

TICK_S = 0.001  # what falls due within one tick is written in one go
BACKLOG = 4096
KEPT_MODELS = 1024  # whose events stay encoded

Milliseconds = Annotated[float, Meta(ge=0)]
T = TypeVar("T")


class NullOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Any model is answered; `models` are those that are listed."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0  # 0: any that is free
    ttft_ms: Milliseconds = 0.0
    tpot_ms: Milliseconds = 0.0
    models: tuple[str, ...] = ("null",)


class Wheel(Generic[T]):
    """Who is due when, in whole ticks: thousands of streams share the few ticks that lie ahead, and one timer."""

    def __init__(self) -> None:
        self._slots: dict[int, list[T]] = {}
        self._ticks: list[int] = []  # a heap of the keys of `_slots`

    def put(self, at_s: float, item: T) -> None:
        tick = math.ceil(at_s / TICK_S)
        slot = self._slots.get(tick)
        if slot is None:
            slot = self._slots[tick] = []
            heapq.heappush(self._ticks, tick)
        slot.append(item)

    def take(self, now_s: float) -> list[T]:
        """Everything that is due, the earliest first."""
        due: list[T] = []
        while self._ticks and self._ticks[0] * TICK_S <= now_s:
            due += self._slots.pop(heapq.heappop(self._ticks))
        return due

    def next_s(self) -> float | None:
        return self._ticks[0] * TICK_S if self._ticks else None


class _Answer:
    """One answer under way. `step` writes what is due and says when to come back; None: it has ended."""

    def __init__(self, connection: _Connection, body: Body, *, chat: bool, read_at: float) -> None:
        server = connection.server
        self._connection: _Connection | None = connection
        self._body = body
        self._chat = chat
        self._read_at = read_at
        self._tpot_s = server.tpot_s
        self._words = words_of(body.model, body.messages if chat else body.prompt, body.num_tokens)
        self._next = 0  # place in `_words`
        self._phrases = server.phrases(chat, body.model, bool(body.return_token_ids))
        self.due_s = read_at + server.ttft_s
        if not body.stream:
            self.due_s += (body.num_tokens - 1) * server.tpot_s

    def drop(self) -> None:
        """Its client has left."""
        self._connection = None

    def step(self) -> float | None:
        if self._connection is None:
            return None
        if not self._body.stream:
            self._connection.end_json(whole(self._chat, self._body, self._words))
            return None
        said, last, parts = self._phrases, len(self._words) - 1, []
        if self._next == 0:
            stamp = b": stamp=%.6f\n\n" % (monotonic() - self._read_at)
            parts = [self._connection.stream_head(), chunk(stamp), said.opening]
        until = last if self._tpot_s == 0 else min(self._next + 1, last)  # without a cadence, all of it at once
        parts += [said.words[word] for word in self._words[self._next : until]]
        ends = self._next == last or self._tpot_s == 0
        if ends:
            parts.append(said.last_words[self._words[last]])
            if self._body.wants_usage:
                parts.append(chunk(said.usage % usage(self._body)))
            parts.append(END)
        self._connection.write(b"".join(parts), ends=ends)
        self._next += 1
        self.due_s += self._tpot_s
        return None if ends else self.due_s


class _Connection(asyncio.Protocol):
    """One answer at a time: a client that sends the next request before it has ended is disconnected."""

    def __init__(self, server: NullServer) -> None:
        self.server = server
        self._parser: httptools.HttpRequestParser | None = None
        self._answer: _Answer | None = None
        self._read_at = 0.0
        self._url = b""
        self._parts: list[bytes] = []
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self.server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._parser = None  # it holds us: a circle that only the garbage collector could open
        self.server.connections.discard(self)
        if self._answer is not None:
            self._answer.drop()
            self._ended()

    def data_received(self, data: bytes) -> None:
        self._read_at = monotonic()
        try:
            if self._parser is not None:
                self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._parser = None
            self._keep_alive = False
            self._refuse(b"400 Bad Request", f"This is not HTTP/1.1: {error}")

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._url = b""
        self._parts = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        method, path = self._parser.get_method(), self._url.decode("latin-1").partition("?")[0]
        if self._answer is not None:
            self._transport.abort()  # there is no way to tell it within the answer that is under way
            return
        self._keep_alive = self._parser.should_keep_alive()
        if method == b"POST" and path in ("/v1/completions", "/v1/chat/completions"):
            self._post(chat="chat" in path)
        elif method == b"GET" and (body := self.server.get(path)) is not None:
            self._write(json_answer(b"200 OK", body, keep_alive=self._keep_alive))
        else:
            self._refuse(b"404 Not Found", f"There is no {method.decode('latin-1')} {path} here.")

    def _post(self, *, chat: bool) -> None:
        try:
            body = decode(b"".join(self._parts), chat=chat)
        except msgspec.DecodeError as error:
            self._refuse(b"400 Bad Request", str(error))
            return
        self._answer = _Answer(self, body, chat=chat, read_at=self._read_at)
        self.server.begin(self._answer)

    # What an answer calls.

    def stream_head(self) -> bytes:
        return STREAM_HEAD % (self.server.requests, b"" if self._keep_alive else CLOSE)

    def write(self, data: bytes, *, ends: bool) -> None:
        if ends:
            self._ended()
        self._write(data)

    def end_json(self, body: bytes) -> None:
        self.write(json_answer(b"200 OK", body, keep_alive=self._keep_alive), ends=True)

    def _ended(self) -> None:
        self._answer = None
        self.server.ended()

    def _refuse(self, status: bytes, message: str) -> None:
        if self._answer is not None:
            self._transport.abort()
        else:
            self._write(refusal(status, message, keep_alive=self._keep_alive))

    def _write(self, data: bytes) -> None:
        self._transport.write(data)
        if self._answer is None and not self._keep_alive:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()


class NullServer:
    """All connections and the one timer. Must be made inside of a running event loop."""

    def __init__(self, options: NullOptions) -> None:
        self.ttft_s, self.tpot_s = options.ttft_ms / 1e3, options.tpot_ms / 1e3
        self.phrases: Callable[[bool, str, bool], Phrases] = functools.lru_cache(KEPT_MODELS)(phrases)
        self.connections: set[_Connection] = set()
        self.requests = 0
        self._open = 0  # answers under way
        self._peak_open = 0
        self._models = options.models
        self._wheel: Wheel[_Answer] = Wheel()
        self._alarm = Alarm(self._tick)
        self._armed_for: float | None = None

    async def listen(self, host: str, port: int) -> asyncio.Server:
        try:
            return await asyncio.get_running_loop().create_server(
                lambda: _Connection(self), host, port, backlog=BACKLOG
            )
        except OSError as error:
            raise TargetError(f"the null server cannot listen on {host}:{port}: {error}") from error

    def begin(self, answer: _Answer) -> None:
        self.requests += 1
        self._open += 1
        self._peak_open = max(self._peak_open, self._open)
        if answer.due_s > monotonic() or answer.step() is not None:
            self._wheel.put(answer.due_s, answer)
            self._arm()

    def ended(self) -> None:
        self._open -= 1

    def get(self, path: str) -> bytes | None:
        """The answer to a GET; None: there is nothing."""
        match path:
            case "/health" | "/ready":
                return b"{}"
            case "/v1/models":
                listed = [{"id": each, "object": "model", "owned_by": "null"} for each in self._models]
                return msgspec.json.encode({"object": "list", "data": listed})
            case "/stats":
                seen = {"requests": self.requests, "open": self._open, "peak_open": self._peak_open}
                return msgspec.json.encode({**seen, "cpu_s": process_time()})
        return None

    def close(self) -> None:
        self._alarm.close()
        for connection in list(self.connections):
            connection.abort()

    def _arm(self) -> None:
        due = self._wheel.next_s()
        if due is not None and due != self._armed_for:
            self._armed_for = due
            self._alarm.set(due)

    def _tick(self) -> None:
        """One pass only: what is late again has to wait, so that an overloaded server still reads new requests."""
        self._armed_for = None
        for answer in self._wheel.take(monotonic()):
            if (due := answer.step()) is not None:
                self._wheel.put(due, answer)
        self._arm()
