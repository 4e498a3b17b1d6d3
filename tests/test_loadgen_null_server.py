"""The null server: exact answers at its cadence, whatever clients do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen import null_server as null_process
from serverlesslora_loadgen.errors import LoadgenError, TargetError
from serverlesslora_loadgen.null_answers import WORDS, words_of
from serverlesslora_loadgen.null_server import null_server
from serverlesslora_loadgen.null_streams import TICK_S, NullOptions, NullServer, Wheel
from tests.server import wait_until

TTFT_MS, TPOT_MS = 30.0, 10.0


@pytest.fixture(scope="module")
def quick_url() -> Iterator[str]:
    """Of one that answers at once."""
    with null_server(models=("anna", "ben")) as url:
        yield url


@pytest.fixture(scope="module")
def paced_url() -> Iterator[str]:
    with null_server(ttft_ms=TTFT_MS, tpot_ms=TPOT_MS) as url:
        yield url


def completion(count: int, *, model: str = "anna", prompt: object = (5, 6, 7), **more: Any) -> dict[str, Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "prompt": prompt, "max_tokens": count, **options, **more}


def events(text: str) -> list[str]:
    """Of a stream, without its comments."""
    assert text.endswith("\n\n")
    return [each.removeprefix("data: ") for each in text.split("\n\n") if each.startswith("data: ")]


def stamp(text: str) -> float:
    comment, _, _ = text.removeprefix(": stamp=").partition("\n\n")
    return float(comment)


def stats(url: str) -> dict[str, float]:
    found: dict[str, float] = httpx.get(f"{url}/stats").json()
    return found


# --- the wheel


@given(st.lists(st.floats(0, 0.05)), st.lists(st.floats(0, 0.01), min_size=1))
def test_everything_comes_once_and_within_a_tick_of_its_time(times: list[float], steps: list[float]) -> None:
    wheel: Wheel[int] = Wheel()
    for number, at_s in enumerate(times):
        wheel.put(at_s, number)
    now, before, seen = 0.0, -1.0, []
    for step in [*steps, 1.0]:
        now += step
        for number in wheel.take(now):
            assert times[number] <= now + 1e-9
            assert times[number] > before - TICK_S - 1e-9
            seen.append(number)
        assert (following := wheel.next_s()) is None or following > now
        before = now
    assert sorted(seen) == list(range(len(times)))


# --- texts


def test_the_text_follows_from_model_and_prompt_alone() -> None:
    code = "from serverlesslora_loadgen.null_answers import words_of; print(words_of('anna', [1, 2], 12))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="loadgen", check=True)
    assert json.loads(elsewhere.stdout) == words_of("anna", [1, 2], 12)


@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from("abc"), st.sampled_from("abc"))
def test_adapters_answer_differently(prompt: list[int], one: str, other: str) -> None:
    assert (words_of(one, prompt, 12) == words_of(other, prompt, 12)) == (one == other)


def test_a_short_answer_is_the_beginning_of_a_long_one() -> None:
    assert words_of("anna", "hello", 40)[:5] == words_of("anna", "hello", 5)


# --- streams


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("paced", [False, True])
def test_a_completion_is_exact(quick_url: str, paced_url: str, count: int, paced: bool) -> None:
    url = paced_url if paced else quick_url
    response = httpx.post(f"{url}/v1/completions", json=completion(count, return_token_ids=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    *tokens, usage, done = events(response.text)
    assert done == "[DONE]"
    assert json.loads(usage)["usage"] == {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
    choices = [json.loads(each)["choices"][0] for each in tokens]
    assert {json.loads(each)["model"] for each in tokens} == {"anna"}
    assert [each["token_ids"] for each in choices] == [[word] for word in words_of("anna", [5, 6, 7], count)]
    assert [each["text"] for each in choices] == [WORDS[word] for word in words_of("anna", [5, 6, 7], count)]
    assert [each["finish_reason"] for each in choices] == [None] * (count - 1) + ["length"]


def test_the_stamp_comes_with_the_first_token(paced_url: str) -> None:
    text = httpx.post(f"{paced_url}/v1/completions", json=completion(3)).text
    assert text.count("stamp=") == 1
    assert TTFT_MS / 1e3 <= stamp(text) < 10


def test_tokens_never_come_before_their_time(paced_url: str) -> None:
    with httpx.Client() as client:
        client.get(f"{paced_url}/health")
        took = client.post(f"{paced_url}/v1/completions", json=completion(6)).elapsed.total_seconds()
        whole = client.post(f"{paced_url}/v1/completions", json=completion(6, stream=False, stream_options=None))
    for seconds in (took, whole.elapsed.total_seconds()):
        assert seconds >= (TTFT_MS + 5 * TPOT_MS) / 1e3


def test_usage_only_when_it_is_asked_for(quick_url: str) -> None:
    text = httpx.post(f"{quick_url}/v1/completions", json=completion(2, stream_options=None)).text
    assert "usage" not in text
    assert events(text)[-1] == "[DONE]"


def test_names_are_echoed_whatever_they_hold(quick_url: str) -> None:
    name = 'x%b%s"\\ü'
    text = httpx.post(f"{quick_url}/v1/completions", json=completion(3, model=name)).text
    assert {json.loads(each)["model"] for each in events(text)[:-1]} == {name}


def test_openais_client_reads_both_streams_and_whole_answers(quick_url: str) -> None:
    with openai.OpenAI(base_url=f"{quick_url}/v1", api_key="none") as client:
        assert [each.id for each in client.models.list()] == ["anna", "ben"]
        chunks = list(
            client.chat.completions.create(
                model="ben",
                messages=[{"role": "user", "content": "one two three"}],
                max_completion_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        whole = client.chat.completions.create(
            model="ben", messages=[{"role": "user", "content": "one two three"}], max_tokens=5
        )
        plain = client.completions.create(model="ben", prompt="one two", max_tokens=4)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 3
    assert whole.choices[0].message.content == text and text.count(" ") == 5
    assert whole.usage == chunks[-1].usage
    assert plain.choices[0].text == "".join(WORDS[word] for word in words_of("ben", "one two", 4))


# --- connections


def send(connection: socket.socket, body: dict[str, Any], *headers: str) -> None:
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: x", f"content-length: {len(data)}", *headers]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)


def receive(connection: socket.socket) -> bytes:
    """Until the last chunk, or the end of the connection."""
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        if not (more := connection.recv(1 << 16)):
            break
        data += more
    return data


def connect(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port or 0), timeout=10)


def test_connections_are_kept_or_closed_as_asked(quick_url: str) -> None:
    with connect(quick_url) as connection:
        for _ in range(3):
            send(connection, completion(2))
            assert b"connection: close" not in receive(connection)
        send(connection, completion(2), "connection: close")
        assert b"connection: close" in receive(connection)
        assert connection.recv(1) == b""


def test_requests_in_pieces(quick_url: str) -> None:
    data = json.dumps(completion(2)).encode()
    request = b"POST /v1/completions?x=1 HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)
    with connect(quick_url) as connection:
        for at in range(len(request)):
            connection.sendall(request[at : at + 1])
        assert receive(connection).count(b"data: ") == 4


def test_a_request_before_the_answer_has_ended_costs_the_connection(paced_url: str) -> None:
    with connect(paced_url) as connection:
        send(connection, completion(1000))
        send(connection, completion(1))
        with contextlib.suppress(ConnectionResetError):
            assert b"[DONE]" not in receive(connection)
    wait_until(lambda: stats(paced_url)["open"] == 0)


def test_a_client_that_leaves_is_forgotten() -> None:
    """Nothing is written to where it was, and it does not end a second time."""
    wrong: list[dict[str, Any]] = []

    async def leave_and_ask_again() -> bytes | None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: wrong.append(context))
        server = NullServer(NullOptions(ttft_ms=TTFT_MS, tpot_ms=TPOT_MS))
        listener = await server.listen("127.0.0.1", 0)
        address = listener.sockets[0].getsockname()
        for count in (20, 30):  # the second answer takes longer than what is left of the first
            reader, writer = await asyncio.open_connection(*address)
            data = json.dumps(completion(count)).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
            await reader.readuntil(b"stamp=" if count == 20 else b"[DONE]")
            writer.close()
            await writer.wait_closed()
        server.close()
        listener.close()
        return server.get("/stats")

    told = json.loads(asyncio.run(leave_and_ask_again()) or b"{}")
    assert (told["open"], told["requests"], wrong) == (0, 2, [])


def test_many_streams_at_once_are_all_exact(paced_url: str) -> None:
    async def one(client: httpx.AsyncClient, number: int) -> str:
        prompt = [number]
        answer = await client.post(f"{paced_url}/v1/completions", json=completion(40, prompt=prompt), timeout=30)
        texts = [json.loads(each)["choices"][0]["text"] for each in events(answer.text)[:-2]]
        assert texts == [WORDS[word] for word in words_of("anna", prompt, 40)]
        return answer.text

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits) as client, asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(one(client, number))

    before = stats(paced_url)["requests"]
    asyncio.run(all_of_them())
    assert stats(paced_url)["requests"] == before + 100
    assert stats(paced_url)["open"] == 0
    assert stats(paced_url)["peak_open"] > 1


# --- what is wrong


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{", "truncated"),
        ("[]", "object"),
        ('{"prompt": "x"}', "model"),
        ('{"model": "a"}', "prompt"),
        ('{"model": "a", "prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"model": "a", "prompt": "x", "max_tokens": 999999999}', "max_tokens"),
        ('{"model": "a", "prompt": [[1]]}', "prompt"),
    ],
)
def test_requests_that_make_no_sense_are_refused(quick_url: str, body: str, told: str) -> None:
    answer = httpx.post(f"{quick_url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_chat_needs_messages(quick_url: str) -> None:
    answer = httpx.post(f"{quick_url}/v1/chat/completions", json=completion(1))
    assert (answer.status_code, "messages" in answer.text) == (400, True)


def test_other_paths_are_not_found(quick_url: str) -> None:
    assert httpx.get(f"{quick_url}/v1/completions").status_code == 404
    assert httpx.post(f"{quick_url}/v1/embeddings", json={}).status_code == 404


def test_what_is_not_http_is_answered_once_and_closed(quick_url: str) -> None:
    with connect(quick_url) as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        data = b""
        while more := connection.recv(1 << 16):
            data += more
    assert data.startswith(b"HTTP/1.1 400")


# --- the process


def test_it_ends_with_whoever_started_it() -> None:
    command = [sys.executable, "-m", "serverlesslora_loadgen.null_server", "--with-parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="loadgen") as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().startswith(b"null server on http://127.0.0.1:")
        process.stdin.close()
        assert process.wait(timeout=10) == 0


def test_a_port_that_is_taken_is_said_in_one_line(quick_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = httpx.URL(quick_url).port
    assert null_process.main(["--port", str(port)]) == 1
    assert capsys.readouterr().err.startswith(f"the null server cannot listen on 127.0.0.1:{port}: ")


def test_options_that_make_no_sense_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert null_process.main(["--ttft-ms", "-1"]) == 1
    assert "ttft_ms" in capsys.readouterr().err


def test_one_that_does_not_start_is_an_error() -> None:
    with pytest.raises(TargetError, match="did not start"), null_server(tpot_ms=-1):
        pass
    assert issubclass(TargetError, LoadgenError)
