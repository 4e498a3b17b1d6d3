"""Streams on a real socket: the first token, keep-alive comments, late errors, and clients that leave."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.sse import DONE, PING
from tests.backend_fake import FakeBackend
from tests.server import running, wait_until


class Served(NamedTuple):
    backend: FakeBackend
    url: str


@pytest.fixture
def served() -> Iterator[Served]:
    backend = FakeBackend()
    with running(create_app(backend, HttpSettings(ping_s=0.05, write_timeout_s=0.3))) as url:
        yield Served(backend, url)


def body_of(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, **fields}


def connect(served: Served, model: str, **fields: Any) -> socket.socket:
    """A client that has sent its request and reads nothing by itself."""
    body = json.dumps(body_of(model, **fields)).encode()
    url = httpx.URL(served.url)
    connection = socket.create_connection((url.host, url.port or 80), timeout=10)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    return connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    received = b""
    while wanted not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def leave(connection: socket.socket, *, reset: bool = False) -> None:
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_the_first_token_waits_for_no_other(served: Served) -> None:
    with connect(served, "slow", stream=True) as connection:
        received = read_until(connection, b'"content":"H"')
        assert b'"content":"E"' not in received
        served.backend.thaw_from_outside()
        assert b'"content":"E"' in read_until(connection, DONE)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("model", ["slow", "cold"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_aborts_its_request(served: Served, *, stream: bool, model: str, reset: bool) -> None:
    connection = connect(served, model, stream=stream)
    wait_until(lambda: served.backend.running == 1)
    if stream:
        read_until(connection, PING if model == "cold" else b'"content":"H"')
    leave(connection, reset=reset)
    wait_until(lambda: served.backend.running == 0)
    assert served.backend.aborted == 1
    pattern = f'serverlesslora_requests_total{{function="{model}",status="499"}} 1.0'
    wait_until(lambda: pattern in httpx.get(f"{served.url}/metrics").text)


def test_many_clients_leave_and_the_next_one_is_served(served: Served) -> None:
    connections = [connect(served, "slow", stream=bool(number % 2)) for number in range(50)]
    wait_until(lambda: served.backend.running == 50)
    for connection in connections:
        leave(connection)
    wait_until(lambda: served.backend.running == 0)
    assert served.backend.aborted == 50
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper")).json()
    assert answer["choices"][0]["message"]["content"] == "HELLO"


def test_several_prompts_are_aborted_together(served: Served) -> None:
    body = {"model": "slow", "prompt": ["a", "b", "c"], "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: collecting it would close the connection
        assert next(lines).startswith("data: ")
        assert served.backend.running == 3
    wait_until(lambda: served.backend.running == 0)
    assert served.backend.aborted == 3


def test_comments_keep_a_waiting_stream_alive(served: Served) -> None:
    with connect(served, "cold", stream=True) as connection:
        head = read_until(connection, PING)
        assert b"200 OK" in head
        assert b"data:" not in head
        assert b"x-serverlesslora-cold" not in head.lower()  # nobody knows yet
        read_until(connection, PING)
        served.backend.thaw_from_outside()
        rest = read_until(connection, DONE)
        assert b'"content":"H"' in rest
        told = rest.partition(b": x-serverlesslora-cold: ")[2]
        assert told.startswith(b"worker;dur=12.3, adapter;dur=4.5\n") and b"data:" in told


def test_a_cold_start_is_told(served: Served) -> None:
    connection = connect(served, "cold")
    wait_until(lambda: served.backend.running == 1)
    served.backend.thaw_from_outside()
    head = read_until(connection, b"\r\n\r\n").lower()
    assert b"x-serverlesslora-cold: worker;dur=12.3, adapter;dur=4.5\r\n" in head
    leave(connection)


def test_an_error_after_the_first_byte_goes_into_the_stream(served: Served) -> None:
    body = body_of("broken", stream=True, stream_options={"include_usage": True})
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.status_code == 200
    *_, failure, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    error = json.loads(failure.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "worker_lost"
    assert '"total_tokens"' not in response.text
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as sdk:
        chunks = sdk.chat.completions.create(
            model="broken", messages=[{"role": "user", "content": "hello"}], stream=True, temperature=0
        )
        with pytest.raises(openai.APIError, match="worker ended"):
            list(chunks)
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body_of("broken")).status_code == 500
    assert served.backend.running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_comes_before_the_stream(served: Served, *, stream: bool) -> None:
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body_of("busy", stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert "x-should-retry" not in response.headers
    assert response.json()["error"]["code"] == "server_overloaded"


def test_a_client_that_stops_reading_is_given_up(served: Served) -> None:
    fields: dict[str, Any] = {"ignore_eos": True, "logprobs": True, "top_logprobs": 5, "n": 16, "max_tokens": 480}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(served.url)
        connection.connect((url.host, url.port or 80))
        body = json.dumps(body_of("upper", stream=True, **fields)).encode()
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_until(lambda: served.backend.running == 1)
        wait_until(lambda: served.backend.running == 0, 30)
    assert served.backend.aborted == 1


def test_running_usage(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = httpx.post(
        f"{served.url}/v1/chat/completions", json=body_of("upper", stream=True, stream_options=options)
    )
    usages = [json.loads(line[6:])["usage"] for line in response.text.split("\n\n") if line.startswith("data: {")]
    assert [usage["completion_tokens"] for usage in usages] == [1, 1, 2, 3, 4, 5, 6, 6]
    assert len({usage["prompt_tokens"] for usage in usages}) == 1


def test_logprobs_of_a_stream_are_those_of_the_whole(served: Served) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    whole = httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper", **fields)).json()
    text = httpx.post(f"{served.url}/v1/chat/completions", json=body_of("upper", stream=True, **fields)).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for part in parts if part for token in part["content"]] == whole["choices"][0]["logprobs"]["content"]


def test_echo_of_a_completion_stream_is_that_of_the_whole(served: Served) -> None:
    body = {"model": "upper", "prompt": ["one", "two"], "n": 2, "echo": True, "logprobs": 2, "temperature": 0}
    whole = httpx.post(f"{served.url}/v1/completions", json=body).json()["choices"]
    text = httpx.post(f"{served.url}/v1/completions", json=body | {"stream": True}).text
    choices = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n") if line.startswith("data: {")]
    for expected in whole:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [each for choice in mine for each in choice["logprobs"][key]] == expected["logprobs"][key]
