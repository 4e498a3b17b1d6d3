"""What a body may be, and what the server says while it drains."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.limits import HttpSettings, decode_object
from tests.backend_fake import FakeBackend
from tests.server import running, wait_until
from tests.test_sse import Served, body_of, connect, leave, read_until

LIMIT = 20_000


@pytest.fixture
def app() -> Starlette:
    return create_app(FakeBackend(), HttpSettings(max_body_bytes=LIMIT, body_timeout_s=0.2))


@pytest.fixture
def served(app: Starlette) -> Iterator[Served]:
    with running(app) as url:
        yield Served(app.state.gateway.backend, url)


@pytest.mark.parametrize("size", [LIMIT + 1, 3 * LIMIT, 200 * LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(served: Served, *, size: int, chunked: bool) -> None:
    body = b" " * size
    content = (body[start : start + 1000] for start in range(0, size, 1000)) if chunked else body
    headers = {"content-type": "application/json"}
    try:
        response = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers)
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        assert size > 4 * LIMIT  # cut off while it was still writing
    else:
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "content_too_large"
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper")).status_code == 200


def test_a_body_at_the_limit_is_read(served: Served) -> None:
    body = json.dumps(body_of("upper")).encode()
    body += b" " * (LIMIT - len(body))
    headers = {"content-type": "application/json"}
    assert httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers).status_code == 200


def test_a_body_that_does_not_arrive(served: Served) -> None:
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert b"408 Request Timeout" in read_until(connection, b'"request_timeout"}}')


def test_a_compressed_body_is_refused(served: Served) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert httpx.post(f"{served.url}/v1/completions", content=b"x", headers=headers).status_code == 415


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"NaN", b'{"a":Infinity}', b'{"a":"\\ud800"}', b'{"a":' * 5000, b'{"a":"\xff"}', b"9" * 9999]
)
def test_odd_json(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_object(body)
    assert caught.value.code == "invalid_json"


def test_draining(app: Starlette, served: Served) -> None:
    assert httpx.get(f"{served.url}/ready").status_code == 200
    with connect(served, "slow", stream=True) as connection:
        read_until(connection, b'"content":"H"')
        app.state.gateway.drain()
        assert app.state.gateway.in_flight == 1
        ready = httpx.get(f"{served.url}/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        refused = httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper"))
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["connection"] == "close"
        served.backend.thaw_from_outside()
        assert b'"content":"O"' in read_until(connection, b"[DONE]\n\n")
    wait_until(lambda: app.state.gateway.in_flight == 0)


def test_request_ids(served: Served) -> None:
    def returned(request_id: str) -> str:
        return httpx.get(f"{served.url}/version", headers={"x-request-id": request_id}).headers["x-request-id"]

    assert returned("abc-1.2:3_4") == "abc-1.2:3_4"
    assert returned("bad id") != "bad id"
    assert len(returned("x" * 500)) == 32


def test_a_slow_adapter_does_not_stop_others(served: Served) -> None:
    connection = connect(served, "slow")
    wait_until(lambda: served.backend.running == 1)
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper")).status_code == 200
    leave(connection)
