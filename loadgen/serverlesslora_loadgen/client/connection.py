"""Requests over HTTP/1.1 with as many connections as it takes.

No request waits for another's connection: what finds none idle opens one. Answers are read in callbacks, without a
task or an await for each piece, and stamped as the loop hands them over. Nothing is sent twice: a request whose
connection breaks has failed. So that servers which close idle connections do not make requests fail, those idle for
longer than `KEPT_S` are not used again.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
import time
from collections.abc import Callable
from typing import cast

import httptools

from serverlesslora_loadgen.client.address import address_of, head_of, header_lines
from serverlesslora_loadgen.client.stream import Reading
from serverlesslora_loadgen.client.verdict import Ending
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.record import Record

KEPT_S = 1.5  # gunicorn closes after 2 s, uvicorn and Node after 5 s
LATE_S = 0.01  # a connection that took longer to open is counted
RESOLVE_S = 2.0  # for each address of a name: packets to one that nobody answers for may just vanish
PIECE_BYTES = 16 << 10  # a record of TLS
# Of this machine, not of the server: too many files, no ports left, no memory.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})

OnRecord = Callable[[Record, str], None]  # the text too, where it was kept


class Exchange:
    """A request on its way."""

    __slots__ = ("connection", "opening", "planned", "reading")

    def __init__(self, planned: Planned, reading: Reading) -> None:
        self.planned, self.reading = planned, reading
        self.connection: Connection | None = None
        self.opening: asyncio.Task[None] | None = None


class Client:
    """All connections of one process. Every request given to `send` ends in exactly one call of `on_record`."""

    def __init__(
        self,
        target: Target,
        on_record: OnRecord,
        *,
        now: Callable[[], float] = time.monotonic,
        keep_text: bool = False,
        after_done_s: float | None = None,
    ) -> None:
        """`after_done_s`: how long an answer may stay open after [DONE]; None: until a `sweep` finds it overdue."""
        self.start_at = 0.0
        self.late_sockets = 0
        self.now = now
        self._target, self._on_record, self._keep_text = target, on_record, keep_text
        self._address = address_of(target)
        self._ip = self._address.host
        self._head = head_of(target)
        self._tls = ssl.create_default_context() if self._address.tls else None
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        self._exchanges: set[Exchange] = set()
        self._after_done_s = after_done_s
        self._loop = asyncio.get_running_loop()

    @property
    def in_flight(self) -> int:
        return len(self._exchanges)

    async def resolve(self) -> None:
        """Asks for the address once, not in the middle of the run; of several the first that is listened to.

        A name that is not known, or nobody listening, shows in every request: that, too, is a result.
        """
        try:
            found = await self._loop.getaddrinfo(self._address.host, self._address.port, type=1)
        except (OSError, ValueError):
            return
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        self._ip = addresses[0]
        for address in addresses if len(addresses) > 1 else ():
            try:
                async with asyncio.timeout(RESOLVE_S):
                    transport, _ = await self._loop.create_connection(asyncio.Protocol, address, self._address.port)
            except OSError:  # TimeoutError is one
                continue
            transport.abort()
            self._ip = address
            return

    def send(self, planned: Planned, intended: float) -> None:
        reading = Reading(planned, self._target, start_at=self.start_at, intended=intended, keep_text=self._keep_text)
        reading.started = now = self.now()
        exchange = Exchange(planned, reading)
        self._exchanges.add(exchange)
        while self._idle:
            connection = self._idle.pop()  # the one used last: the others may grow old and go
            if now - connection.idle_since <= KEPT_S and not connection.transport.is_closing():
                self._write(connection, exchange)
                return
            connection.transport.abort()
        exchange.opening = self._loop.create_task(self._open(exchange, now))

    def sweep(self) -> None:
        """Ends what has taken too long, and closes connections that nobody will use again."""
        now = self.now()
        for exchange in list(self._exchanges):
            if (ending := exchange.reading.overdue(now)) is not None:
                self.end(exchange, ending)
        while self._idle and now - self._idle[0].idle_since > KEPT_S:
            self._idle.pop(0).transport.abort()

    def interrupt(self) -> None:
        for exchange in list(self._exchanges):
            self.end(exchange, Ending.INTERRUPTED)

    def close(self) -> None:
        self.interrupt()
        for connection in list(self._connections):
            connection.transport.abort()

    def end(self, exchange: Exchange, ending: Ending, detail: str = "", *, reusable: bool = False) -> None:
        """The one place where a request ends."""
        if exchange not in self._exchanges:
            return
        self._exchanges.remove(exchange)
        now = self.now()
        connection, exchange.connection = exchange.connection, None
        if connection is not None:
            connection.exchange = None
            if reusable:
                connection.idle_since = now
                self._idle.append(connection)
            else:
                connection.transport.abort()
        if exchange.opening is not None:
            exchange.opening.cancel()
        exchange.opening = None  # the collector is off while a run goes on: nothing may point back
        try:
            record = exchange.reading.finish(ending, now, detail)
        except Exception as error:  # a request without a record would be waited for without end
            record = exchange.reading.give_up(now, error)
        self._on_record(record, exchange.reading.text if self._keep_text else "")

    # --- connections

    async def _open(self, exchange: Exchange, began: float) -> None:
        try:
            _, connection = await self._loop.create_connection(
                lambda: Connection(self),
                self._ip,
                self._address.port,
                ssl=self._tls,
                server_hostname=self._address.host if self._tls else None,
            )
        except (OSError, ValueError) as error:  # of TLS: OSError; of names that cannot be ones: ValueError
            exchange.opening = None
            is_ours = isinstance(error, OSError) and error.errno in _OURS
            self.end(exchange, Ending.LOCAL if is_ours else Ending.CONNECT, str(error) or repr(error))
            return
        exchange.opening = None
        if connection not in self._connections:
            self.end(exchange, Ending.CONNECT, "the server closed the connection before anything was sent")
            return
        exchange.reading.connected = connection.opened_at
        if self.now() - began > LATE_S:
            self.late_sockets += 1
        self._write(connection, exchange)

    def _write(self, connection: Connection, exchange: Exchange) -> None:
        exchange.connection, connection.exchange = connection, exchange
        planned = exchange.planned
        own = header_lines(planned.headers) if planned.headers else b""
        connection.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (self._head, own, len(planned.body), planned.body))

    def done(self, exchange: Exchange) -> None:
        """[DONE] has come, and the answer is still open."""
        if self._after_done_s is not None:
            self._loop.call_later(self._after_done_s, self.end, exchange, Ending.COMPLETE)

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection, error: Exception | None) -> None:
        self._connections.discard(connection)
        if connection.exchange is not None:
            self.end(connection.exchange, Ending.LOST, str(error) if error else "the server closed the connection")
        elif connection in self._idle:
            self._idle.remove(connection)


class Connection(asyncio.Protocol):
    """One request at a time: bytes of its answer go to its reading."""

    transport: asyncio.Transport

    def __init__(self, client: Client) -> None:
        self.exchange: Exchange | None = None
        self.idle_since = 0.0
        self.opened_at = 0.0
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._now = 0.0
        self._rest: bytes | memoryview = b""  # not given to the transport yet
        self._is_tls = False
        self._is_blocked = False
        self._is_complete = False
        self._is_followed = False
        self._keeps_alive = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not derive from it
        self.opened_at = self._client.now()
        self._is_tls = transport.get_extra_info("sslcontext") is not None
        # With a high-water mark of 0 the transport says so whenever it could not write everything at once, however
        # little is left: that is how `written` is the time at which the last byte left. That of TLS speaks for its own
        # buffer alone, which is empty once all is encrypted; the one below holds it up from 64 KiB on. In pieces a
        # body is held up with it, so that `written` is too early by no more than those. It also takes a mark to be
        # passed when it is reached: 0 would be passed by nothing.
        self.transport.set_write_buffer_limits(high=1 if self._is_tls else 0)
        self._client.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.closed(self, error)
        del self._parser, self.transport  # both point back here

    def write(self, data: bytes) -> None:
        self._rest = memoryview(data) if self._is_tls else data
        self._write_on()

    def pause_writing(self) -> None:
        self._is_blocked = True

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._write_on()

    def _write_on(self) -> None:
        exchange = self.exchange
        if exchange is None or exchange.reading.written is not None:
            return
        while self._rest and not self._is_blocked and not self.transport.is_closing():
            size = PIECE_BYTES if self._is_tls else len(self._rest)
            piece, self._rest = self._rest[:size], self._rest[size:]
            self.transport.write(piece)
        if not self._rest and not self._is_blocked:
            self._rest = b""  # what is left of a view would keep the whole body
            exchange.reading.written = self._client.now()

    def data_received(self, data: bytes) -> None:
        self._now = self._client.now()
        exchange = self.exchange
        if exchange is None:  # nobody asked
            self.transport.abort()
            return
        reading = exchange.reading
        reading.bytes_in += len(data)
        if reading.first_byte is None:
            reading.first_byte = self._now
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._client.end(exchange, Ending.MALFORMED, f"not HTTP: {error!r} {data[:60]!r}")
            return
        if self._is_complete:
            self._is_complete = False
            keeps = self._keeps_alive and not self._is_followed and reading.written is not None
            self._client.end(exchange, Ending.COMPLETE, reusable=keeps)
        elif reading.is_done:
            self._client.done(exchange)

    # --- of the parser

    def on_message_begin(self) -> None:
        self._headers = []  # trailers of the answer before would be in it

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, []
        status = self._parser.get_status_code()
        if self._is_complete:
            self._is_followed = True  # by an answer to nothing, such as a 408 of a server that is tired of waiting
        elif status >= 200 and self.exchange is not None:
            self.exchange.reading.head(status, headers)

    def on_body(self, data: bytes) -> None:
        if self.exchange is not None and not self._is_complete:
            self.exchange.reading.feed(data, self._now)

    def on_message_complete(self) -> None:
        if not self._is_complete:
            self._is_complete = self._parser.get_status_code() >= 200
            self._keeps_alive = self._parser.should_keep_alive()  # afterwards the parser has forgotten
