"""Connections that say nothing, or too much, or what is no HTTP, are closed; others are left alone."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.connections import watched
from tests.backend_fake import FakeBackend
from tests.live import live
from tests.server import ROOT, running, wait_until
from tests.test_sse import Served, body_of, connect, read_until


@pytest.fixture
def served() -> Iterator[Served]:
    backend = FakeBackend()
    with running(create_app(backend), http=watched(0.2)) as url:
        yield Served(backend, url)


def dial(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    return socket.create_connection((url.host, url.port or 80), timeout=10)


def is_closed(connection: socket.socket) -> bool:
    """Waits for the other side, at most the socket's timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: "])
def test_headers_that_do_not_arrive(served: Served, sent: bytes) -> None:
    with dial(served) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_a_second_request_that_does_not_arrive(served: Served) -> None:
    with dial(served) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(connection, b"}")
        connection.sendall(b"GET /version HT")
        assert is_closed(connection)


def test_a_long_answer_is_not_cut(served: Served) -> None:
    with connect(served, "slow", stream=True) as connection, dial(served) as silent:
        read_until(connection, b'"content":"H"')
        assert is_closed(silent)  # younger than the stream, so the stream has outlived its own timer
        served.backend.thaw_from_outside()
        assert b'"content":"O"' in read_until(connection, b"[DONE]\n\n")


def test_many_silent_connections_stop_nobody(served: Served) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(dial(served)).sendall(b"POST /v1/completions HT")
        for _ in range(5):
            assert httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper")).status_code == 200


def exchange(served: Served, sent: bytes) -> bytes:
    """All that the server says before it closes, or stops saying anything."""
    with dial(served) as connection:
        connection.settimeout(5)
        connection.sendall(sent)
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
                if received.endswith(b"}"):  # whole: every answer here is an object
                    connection.settimeout(0.1)
        except (ConnectionResetError, TimeoutError):
            pass
        return received


def get(*lines: bytes, target: bytes = b"/version") -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"host: x", *lines, b"", b""])


def code_of(answer: bytes) -> tuple[int, str | None]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body).get("error", {})
    assert (b"connection: close" in head) == bool(error)
    return int(head.split(b" ")[1]), error.get("code")


GOOD = (200, None)
MALFORMED = (400, "malformed_request")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (get(target=b"/version?" + b"x" * 4000), GOOD),
        (get(target=b"/version?" + b"x" * 9000), (414, "uri_too_long")),
        (get(*[b"x-%d: y" % i for i in range(90)]), GOOD),
        (get(*[b"x-%d: y" % i for i in range(120)]), (431, "headers_too_large")),
        (get(b"x-long: " + b"y" * 60_000), GOOD),
        (get(b"x-long: " + b"y" * 70_000), (431, "headers_too_large")),
        (get(b"a: b\rc: d"), MALFORMED),
        (get(b"a: b\nc : d"), MALFORMED),
        (get(b"a: b\0c"), MALFORMED),
        (get(b"a : b"), MALFORMED),
        (get(b"(a): b"), MALFORMED),
        (get(b"content-length: +5"), MALFORMED),
        (get(b"content-length: 5", b"content-length: 6"), MALFORMED),
        (get(b"content-length: 99999999999999999999999"), MALFORMED),
        (get(b"transfer-encoding: chunked", b"content-length: 5"), MALFORMED),
        (get(b"content-length: 5", b"transfer-encoding: chunked"), MALFORMED),
        (get(b"transfer-encoding: chunked, identity"), MALFORMED),
        (b"GET /version HTTP/1.1 \r\nhost: x\r\n\r\n", MALFORMED),
        (b"GET /ver\x7fsion\xff HTTP/1.1\r\nhost: x\r\n\r\n", MALFORMED),
        (b"GET http://[x/ HTTP/1.1\r\nhost: x\r\n\r\n", MALFORMED),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", MALFORMED),
        (b"GET /version HTTP/7.7\r\n\r\n", MALFORMED),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", MALFORMED),  # somebody speaks TLS
    ],
)
def test_heads(served: Served, request_: bytes, expected: tuple[int, str | None]) -> None:
    assert code_of(exchange(served, request_)) == expected
    assert httpx.get(f"{served.url}/version").status_code == 200


def test_a_value_that_never_ends_is_not_kept(served: Served) -> None:
    with dial(served) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\nx-endless: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):
                connection.sendall(b"y" * 65536)
            pytest.fail("12 MiB of one value were taken")


def test_nothing_is_hidden_behind_a_body_of_two_lengths(served: Served) -> None:
    hidden = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n"
    answer = exchange(served, head + b"0\r\n\r\n" + hidden)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert code_of(answer) == MALFORMED


@pytest.mark.parametrize("size", [b"ffffffffffffffffff", b"-1", b"5;" + b"x" * 100 + b"\0", b" 5", b"zz"])
def test_bad_chunks(served: Served, size: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = exchange(served, head + size + b"\r\nhello\r\n0\r\n\r\n" + get())
    assert answer.count(b"HTTP/1.1 ") == 1
    assert code_of(answer) == MALFORMED


def test_rubbish_behind_a_request_does_not_get_into_its_answer(served: Served) -> None:
    with connect(served, "slow", stream=True) as connection:
        received = read_until(connection, b'"content":"H"')
        connection.sendall(b"\x00\xff rubbish\r\n\r\n")
        assert is_closed(connection)
        assert received.count(b"HTTP/1.1") == 1
    wait_until(lambda: served.backend.running == 0)


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with dial(served) as connection:
        body = json.dumps(body_of("upper")).encode()
        post = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        connection.sendall(post + get() + get(target=b"/none") + post)
        received = read_until(connection, b'"usage"')
        while received.count(b'"usage"') < 2:
            received += read_until(connection, b"}")
        order = [
            received.index(b"HELLO"),
            received.index(b'"version"'),
            received.index(b"404 "),
            received.rindex(b"HELLO"),
        ]
        assert order == sorted(order)


def test_an_offer_of_another_protocol_is_not_taken(served: Served) -> None:
    body = json.dumps(body_of("upper")).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (offer, len(body))
    with dial(served) as connection:
        for pieces in ([head + body], [head, body]):  # again on the same connection
            for piece in pieces:
                connection.sendall(piece)
            assert b"200 OK" in read_until(connection, b'"usage"')
    hidden = get(target=b"/v1/models")
    for pieces in (
        [head.replace(b"Upgrade: h2c", b"Upg"), b"rade: h2c\r\n\r\n" + hidden],
        [b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n" + hidden],
    ):
        answer = exchange(served, b"".join(pieces)) if len(pieces) == 1 else in_pieces(served, pieces)
        assert answer.count(b"HTTP/1.1 ") == 1 and code_of(answer) == MALFORMED


def in_pieces(served: Served, pieces: list[bytes]) -> bytes:
    """Each is read for itself: nothing tells when, so that the later ones wait for an answer on another connection."""
    with dial(served) as connection:
        for piece in pieces:
            connection.sendall(piece)
            httpx.get(f"{served.url}/version")
        return read_until(connection, b"}}")


EARLY = b"POST /none HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"  # answered before its body comes


def test_a_body_that_nobody_waits_for_has_a_limit_of_its_own(served: Served) -> None:
    with dial(served) as connection:
        connection.sendall(EARLY)
        assert b"404 " in read_until(connection, b"}")
        connection.sendall(b"x")  # ends the keep-alive timer of 30 s
        assert is_closed(connection)


def test_after_a_late_body_the_connection_is_timed_and_good(served: Served) -> None:
    with dial(served) as connection:
        connection.sendall(EARLY)
        read_until(connection, b"}")
        connection.sendall(b"x" * 100)
        connection.sendall(get())
        assert b'"version"' in read_until(connection, b"}")
        connection.sendall(EARLY)
        read_until(connection, b"}")
        connection.sendall(b"x" * 100)
        assert is_closed(connection)


def test_empty_lines_do_not_keep_a_connection(served: Served) -> None:
    with dial(served) as connection:
        connection.sendall(get())
        read_until(connection, b"}")
        connection.sendall(b"\r\n")
        assert is_closed(connection)


def test_who_does_not_read_an_answer_is_left() -> None:
    sent = threading.Event()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body"})
        sent.set()

    impatient = type("Impatient", (watched(0.2),), {"write_timeout_s": 0.3})
    with running(large, http=impatient) as url, dial(Served(FakeBackend(), url)) as connection:
        connection.sendall(get())
        assert sent.wait(10)  # to nobody: what is written after the end is dropped
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
        assert received < 100 << 20
        assert len(httpx.get(url).content) == 100 << 20


def test_http_1_0(served: Served) -> None:
    answer = exchange(served, b"GET /version HTTP/1.0\r\n\r\n")
    assert b" 200 OK" in answer
    assert b"connection: close" in answer
    with dial(served) as connection:
        connection.sendall(b"GET /version HTTP/1.0\r\n\r\n")
        read_until(connection, b"}")
        assert is_closed(connection)


def test_a_client_that_asks_first(served: Served) -> None:
    body = json.dumps(body_of("upper")).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    with dial(served) as connection:
        connection.sendall(head % len(body))
        assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert b"200 OK" in read_until(connection, b"HELLO")
    with dial(served) as connection:
        connection.sendall(head % (9 << 20))  # a little too large
        assert read_until(connection, b"}").startswith(b"HTTP/1.1 413 ")


def test_connections_beyond_the_cap_are_told_so() -> None:
    backend = FakeBackend()
    with running(create_app(backend), http=watched(10, max_connections=20)) as url, ExitStack() as stack:
        served = Served(backend, url)
        streaming = stack.enter_context(connect(served, "slow", stream=True))
        read_until(streaming, b'"content":"H"')
        idle = [stack.enter_context(dial(served)) for _ in range(19)]
        for connection in idle:  # kept alive after a request, which also says that it was accepted
            connection.sendall(get())
            read_until(connection, b"}")
        answer = exchange(served, get())
        assert code_of(answer) == (503, "too_many_connections")
        assert b"retry-after: 1" in answer
        backend.thaw_from_outside()
        assert b'"content":"O"' in read_until(streaming, b"[DONE]\n\n")
        idle.pop().close()
        wait_until(lambda: code_of(exchange(served, get())) == GOOD)


def test_the_cap_leaves_descriptors_for_the_rest() -> None:
    code = """
import resource, sys
from serverlesslora.gateway.connections import affordable_connections as affordable
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1000))
assert affordable() == 750, affordable()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, 1000)
assert affordable(10) == 10
assert affordable(10**9) == 750
"""
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, env=os.environ | {"PYTHONPATH": roots})


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_without_descriptors_nobody_spins_and_streams_go_on() -> None:
    with live("--demo", "--keep-alive-min", "60") as server, ExitStack() as stack:
        server.answer("upper", "a")
        pid = server.process.pid
        before = descriptors(pid)
        address = httpx.URL(server.url)
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
        body = {"model": "upper", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid) + 3, limits[1]))
        crowd = [socket.create_connection((address.host, address.port or 80), timeout=10) for _ in range(50)]
        seconds = cpu_seconds(pid)
        for _ in range(5):
            assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "HELLO"
        assert cpu_seconds(pid) - seconds < 2.0
        for connection in crowd:
            connection.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: httpx.get(f"{server.url}/version").status_code == 200)
        http.close()
        wait_until(lambda: descriptors(pid) <= before + 4)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
