"""Connections and request heads within bounds: uvicorn itself waits without end, and takes any number.

A head that is too long, has too many fields, or is no HTTP at all is answered by an error object and the connection is
closed; nothing after it is read, so there is nothing to smuggle a request behind. An offer to speak another protocol
is not taken, as HTTP allows; the parser would take it, and what follows for a request.
"""

from __future__ import annotations

import asyncio
import re
import resource
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serverlesslora.gateway.http_errors import ErrorAnswer
from serverlesslora_ipc.messages import WireError

MAX_URL_BYTES = 8 << 10
MAX_HEADER_BYTES = 64 << 10  # of all names and values
MAX_HEADERS = 100
READ_BYTES = 256 << 10  # what one read of the event loop may bring

MOST_FILES = 1 << 16  # descriptors we ask for; a hard limit may be a billion
RESERVED_SHARE, MOST_RESERVED = 4, 256  # a fourth of the descriptors, or so many, are for workers and files


class _Refusal(NamedTuple):
    status: int
    message: str
    code: str


MALFORMED = _Refusal(400, "This is not a well-formed HTTP request.", "malformed_request")
URL_TOO_LONG = _Refusal(414, f"The URL is longer than {MAX_URL_BYTES} bytes.", "uri_too_long")
HEADERS_TOO_LARGE = _Refusal(
    431, f"The headers are more than {MAX_HEADERS} or larger than {MAX_HEADER_BYTES} bytes.", "headers_too_large"
)
TOO_MANY_CONNECTIONS = _Refusal(503, "Too many connections are open; try again.", "too_many_connections")


_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_IGNORED = b"\r\nignored:"


class _Refused(Exception):
    """Stops the parser."""


class WatchedProtocol(HttpToolsProtocol):
    """Closes a connection whose request headers are not complete in time, or that does not read its answer.

    Give it to uvicorn as `http=`. Idle connections between two requests stay with `timeout_keep_alive`, and bodies that
    are waited for have their own limit; the rest of a body that was answered before its end has that of the headers.
    """

    header_timeout_s = 10.0
    write_timeout_s = 60.0  # a stream gives up earlier, see `HttpSettings`
    max_connections: int | None = None
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refusal: _Refusal | None = None
    _is_in_head = True
    _is_before_body = True
    _raw_bytes = 0  # that came while the head was not complete
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._refuse(TOO_MANY_CONNECTIONS)
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._is_before_body and _UPGRADE.search(data):
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(_IGNORED, head) + end + rest
        super().data_received(data)
        if self._is_in_head:  # the parser keeps an unfinished value to itself, however long it gets
            self._raw_bytes += len(data)
            if self._raw_bytes > MAX_HEADER_BYTES + MAX_URL_BYTES + READ_BYTES and self._refusal is None:
                self._refuse(HEADERS_TOO_LARGE)
        # What came has ended the keep-alive timer, and may be no request: the rest of a body, or an empty line.
        if self._header_timer is None and self.timeout_keep_alive_task is None and self._is_at_rest:
            self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._raw_bytes = self._header_bytes = 0
        if self._header_timer is None:  # the first request is timed from the connection on
            self._watch()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = URL_TOO_LONG
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if self._is_in_head and (len(self.headers) > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES):
            self._refusal = HEADERS_TOO_LARGE
            raise _Refused

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # CONNECT, or an offer that came in pieces
            self._refusal = MALFORMED
            raise _Refused
        self._unwatch()
        self._is_in_head = self._is_before_body = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_before_body = True
        if self._is_at_rest:  # a late body is over; what comes now is another request
            self._unwatch()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._can_write()

    def send_400_response(self, msg: str) -> None:
        """Called for whatever the parser does not take."""
        self._refuse(self._refusal or MALFORMED)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._can_write()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._unwatch()
        super().shutdown()

    def _refuse(self, refusal: _Refusal) -> None:
        self._unwatch()
        self._refusal = refusal
        self.pipeline.clear()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body):
            self.transport.abort()  # in the middle of an answer, or before one that is due, no other has a place
            return
        error = WireError(
            status=refusal.status,
            message=refusal.message,
            type="server_error" if refusal.status >= 500 else "invalid_request_error",
            code=refusal.code,
        )
        body = ErrorAnswer(error).body()
        retry = b"retry-after: 1\r\n" if refusal.status == 503 else b""
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%b\r\n%b"
            % (STATUS_LINE[refusal.status], len(body), retry, body)
        )
        self.transport.close()

    def _watch(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._close)

    def _unwatch(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _can_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _is_at_rest(self) -> bool:
        """Nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _close(self) -> None:
        self._header_timer = None
        if self._is_at_rest:
            self.transport.abort()


def watched(header_timeout_s: float, max_connections: int | None = None) -> type[WatchedProtocol]:
    attributes: dict[str, Any] = {"header_timeout_s": header_timeout_s, "max_connections": max_connections}
    return type("WatchedProtocol", (WatchedProtocol,), attributes)


def affordable_connections(wanted: int | None = None) -> int:
    """How many connections leave descriptors for everything else, at most `wanted`. Raises this process's own limit of
    open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    elif soft != resource.RLIM_INFINITY:
        most = soft
    affordable = most - min(MOST_RESERVED, most // RESERVED_SHARE)
    return affordable if wanted is None else min(wanted, affordable)
