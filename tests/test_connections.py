"""Connections that say nothing are closed; others are left alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.connections import watched
from tests.backend_fake import FakeBackend
from tests.server import running
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
