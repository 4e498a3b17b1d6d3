"""Reading over HTTP from hosts that may be read from: every connection goes to an address that was checked.

A host is looked up once per connection and the connection made to the very address that was found good; TLS still
proves the host's name. Redirects are followed by hand, each hop checked like the first. Proxies of the environment are
not used: they would look names up themselves.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin

from serverlesslora.adapters.hosts import HostRules, Trust, origin_of, refusal
from serverlesslora.adapters.remote import Absent, Reading, Transient
from serverlesslora.adapters.sources import shown
from serverlesslora.errors import AdapterInvalid

if TYPE_CHECKING:
    import httpcore

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
MAYBE_LATER = (408, 425, 429, 500, 502, 503, 504)
MAX_RETRY_AFTER_S = 10.0
CONNECTIONS = 8
USER_AGENT = "serverlesslora"


class Timeouts(NamedTuple):
    """Seconds without progress."""

    connect_s: float = 10.0
    read_s: float = 20.0


def look_up(host: str, port: int) -> list[str]:
    """Addresses of a host, as the system finds them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Web:
    """Thread-safe. `resolve` is for tests."""

    def __init__(
        self,
        rules: HostRules,
        *,
        timeouts: Timeouts,
        resolve: Callable[[str, int], list[str]] = look_up,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        import httpcore
        import httpx

        self._rules = rules
        self._timeouts = timeouts
        self._resolve = resolve
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        context = ssl_context or httpx.create_ssl_context()
        # A pool each, so that a connection to a trusted origin is never taken for an untrusted one.
        self._pools: dict[Trust, httpcore.ConnectionPool] = {
            trust: httpcore.ConnectionPool(
                ssl_context=context, max_connections=CONNECTIONS, network_backend=_checked_backend(self, trust)
            )
            for trust in ("public", "internal")
        }

    @contextlib.contextmanager
    def open(
        self, url: str, *, offset: int = 0, version: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Reading]:
        """GET, going on at `offset` if the server still has `version` (None: it never changes).

        `headers` go to the first origin only.

        Raises Absent, Transient, or AdapterInvalid when it will never work.
        """
        with contextlib.ExitStack() as stack:
            response = self._answer(stack, url, self._headers(offset, version), headers or {})
            yield _reading(response, offset)

    def close(self) -> None:
        """A read that waits in another thread ends at once."""
        with self._lock:
            self._is_closed = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
            self._sockets.clear()
        for pool in self._pools.values():
            with contextlib.suppress(Exception):  # a connection in use says so; its reader closes it
                pool.close()

    # --- one request

    def _headers(self, offset: int, version: str | None) -> dict[str, str]:
        # Bytes as they are: ranges and sizes of compressed answers mean something else.
        wanted = {"user-agent": USER_AGENT, "accept-encoding": "identity"}
        if offset:
            wanted["range"] = f"bytes={offset}-"
        if offset and version is not None:
            wanted["if-range"] = version
        return wanted

    def _answer(
        self, stack: contextlib.ExitStack, url: str, headers: dict[str, str], own: Mapping[str, str]
    ) -> httpcore.Response:
        import httpcore

        first = origin_of(url)
        for _ in range(MAX_REDIRECTS + 1):
            trust = self._rules.check(url)
            sent = headers | (dict(own) if origin_of(url) == first else {})
            try:
                response = stack.enter_context(
                    self._pools[trust].stream(
                        "GET", url, headers=list(sent.items()), extensions={"timeout": self._timeout()}
                    )
                )
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
                raise Transient(f"{shown(url)}: {error or type(error).__name__}") from error
            if response.status not in REDIRECTS:
                _check_status(response, url)
                return _translated(response, url)
            location = _header(response, "location")
            if not location:
                raise AdapterInvalid(f"{shown(url)} redirects to nowhere", param="lora_path")
            response.close()
            url = urljoin(url, location).partition("#")[0]
        raise AdapterInvalid(f"{shown(url)}: more than {MAX_REDIRECTS} redirects", param="lora_path")

    def _timeout(self) -> dict[str, float]:
        connect_s, read_s = self._timeouts
        return {"connect": connect_s, "read": read_s, "write": read_s, "pool": read_s}

    # --- connecting

    def addresses(self, host: str, port: int, trust: Trust) -> list[str]:
        """Those of the host that may be connected to. Raises AdapterInvalid if any of them may not.

        All must be good: a name that is public and private at once is somebody's trick.
        """
        try:
            found = self._resolve(host, port)
        except OSError as error:
            raise Transient(f"the host {host} cannot be found: {error.strerror or error}") from error
        for text in found:
            if reason := refusal(ipaddress.ip_address(text), trust):
                raise AdapterInvalid(
                    f"adapters are not fetched from {host}: its address is refused, because {reason}",
                    param="lora_path",
                )
        if not found:
            raise Transient(f"the host {host} has no address")
        return found

    def connected(self, sock: socket.socket) -> socket.socket:
        """Remember a second handle: TLS takes the first one away."""
        with self._lock:
            if self._is_closed:
                raise Transient("the transfer was stopped")
            handle = socket.socket(fileno=os.dup(sock.fileno()))
            self._sockets.add(handle)
            return handle

    def disconnected(self, handle: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(handle)
        handle.close()


def _checked_backend(web: Web, trust: Trust) -> httpcore.NetworkBackend:
    import httpcore

    inner = httpcore.SyncBackend()

    class TrackedStream(httpcore.NetworkStream):
        """The second handle is closed with the stream: a server that cuts every answer must not use them all up."""

        def __init__(self, stream: httpcore.NetworkStream, handle: socket.socket) -> None:
            self._stream = stream
            self._handle = handle

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self._stream.read(max_bytes, timeout)

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            self._stream.write(buffer, timeout)

        def close(self) -> None:
            self._stream.close()
            web.disconnected(self._handle)

        def start_tls(
            self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
        ) -> httpcore.NetworkStream:
            try:
                return TrackedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._handle)
            except BaseException:
                self.close()
                raise

        def get_extra_info(self, info: str) -> Any:
            return self._stream.get_extra_info(info)

    class CheckedBackend(httpcore.NetworkBackend):
        def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
        ) -> httpcore.NetworkStream:
            failure: Exception | None = None
            for address in web.addresses(host, port, trust):
                try:
                    stream = inner.connect_tcp(address, port, timeout, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    failure = error
                    continue
                try:
                    handle = web.connected(stream.get_extra_info("socket"))
                except BaseException:
                    stream.close()
                    raise
                return TrackedStream(stream, handle)
            assert failure is not None
            raise failure

    return CheckedBackend()


def _check_status(response: httpcore.Response, url: str) -> None:
    status = response.status
    if status in (200, 206):
        return
    if status in (404, 410):
        raise Absent(shown(url))
    if status in MAYBE_LATER:
        after = _header(response, "retry-after") or ""
        after_s = min(float(after), MAX_RETRY_AFTER_S) if after.isdigit() else 0.0
        raise Transient(f"{shown(url)} answered {status}", after_s=after_s)
    hint = "; is it private, and is a token set?" if status in (401, 403) else ""
    raise AdapterInvalid(f"{shown(url)} answered {status}{hint}", param="lora_path")


def _translated(response: httpcore.Response, url: str) -> httpcore.Response:
    encoding = _header(response, "content-encoding")
    if encoding not in (None, "identity"):
        raise AdapterInvalid(f"{shown(url)} answers {encoding}, which was not asked for", param="lora_path")
    return response


def _reading(response: httpcore.Response, asked: int) -> Reading:
    length = _header(response, "content-length")
    version = _header(response, "etag")
    if version is not None and version.startswith("W/"):
        version = None  # the same meaning is not the same bytes
    if response.status == 206:
        # "bytes 5-9/10"
        begin, _, total = (_header(response, "content-range") or "").removeprefix("bytes ").partition("/")
        first = begin.partition("-")[0]
        if not first.isdigit() or int(first) != asked:
            raise Transient("the server went on at another place than it was asked to")
        return Reading(asked, int(total) if total.isdigit() else None, version, _chunks(response))
    return Reading(0, int(length) if length and length.isdigit() else None, version, _chunks(response))


def _chunks(response: httpcore.Response) -> Iterator[bytes]:
    import httpcore

    try:
        yield from response.iter_stream()
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
        raise Transient(f"the transfer broke off: {error or type(error).__name__}") from error


def _header(response: httpcore.Response, name: str) -> str | None:
    for key, value in response.headers:
        if key.lower() == name.encode():
            return str(value.decode("latin-1")).strip()
    return None
