"""LoRAX's and TGI's words: `adapter_id` in OpenAI's bodies, /generate, /generate_stream, and errors in their shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serverlesslora.gateway.app import create_app
from tests.backend_fake import EOS, FakeBackend
from tests.server import running

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def client(backend: FakeBackend) -> Iterator[httpx.Client]:
    with running(create_app(backend)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def generate(client: httpx.Client, inputs: str = "hello", status: int = 200, **parameters: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(client: httpx.Client, **parameters: Any) -> list[dict[str, Any]]:
    response = client.post("/generate_stream", json={"inputs": "hello", "parameters": parameters})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = response.text.split("\n\n")
    assert end == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# --- adapter_id at /v1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}, {"model": "demo"}, {"model": "reverse"}])
def test_adapter_id_names_the_function(client: httpx.Client, model: dict[str, Any]) -> None:
    body = model | {"adapter_id": "reverse", "adapter_source": "local", "temperature": 0}
    chat = client.post("/v1/chat/completions", json=body | {"messages": MESSAGES}).json()
    assert (chat["choices"][0]["message"]["content"], chat["model"]) == ("olleh", "reverse")
    assert client.post("/v1/completions", json=body | {"prompt": "hello"}).json()["choices"][0]["text"] == "olleh"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"adapter_id": "reverse", "model": "upper"}, 400, "adapter_id"),
        ({"adapter_id": "nobody"}, 404, "adapter_id"),
        ({"adapter_id": 5}, 400, "adapter_id"),
        ({"adapter_id": "reverse", "adapter_source": "hub"}, 400, "adapter_source"),
        ({"model": "upper", "adapter_source": "s3"}, 400, "adapter_source"),
        ({"model": "upper", "merged_adapters": {"ids": ["a"]}}, 400, "merged_adapters"),
        ({"model": "upper", "api_token": "x"}, 400, "api_token"),
        ({"adapter_id": ""}, 400, "model"),
    ],
)
def test_adapter_ids_that_are_refused(client: httpx.Client, fields: dict[str, Any], status: int, param: str) -> None:
    response = client.post("/v1/chat/completions", json=fields | {"messages": MESSAGES})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


# --- /generate ---------------------------------------------------------------------------------------------------


def test_generating(client: httpx.Client) -> None:
    assert generate(client, adapter_id="upper") == {"generated_text": "HELLO"}
    assert generate(client) == {"generated_text": "hello"}
    assert client.post("/generate", json={"inputs": "hello"}).json() == {"generated_text": "hello"}
    assert generate(client, adapter_id="reverse", return_full_text=True)["generated_text"] == "helloolleh"


def test_details(client: httpx.Client) -> None:
    details = generate(client, "hi", adapter_id="upper", details=True)["details"]
    tokens = details.pop("tokens")
    assert details == {
        "finish_reason": "eos_token",
        "prompt_tokens": 2,
        "generated_tokens": 3,
        "seed": None,
        "prefill": [],
    }
    assert [(each["id"], each["text"], each["special"]) for each in tokens] == [
        (ord("H"), "H", False),
        (ord("I"), "I", False),
        (EOS, "", True),
    ]
    assert all(each["logprob"] <= 0 for each in tokens)


@pytest.mark.parametrize(
    ("parameters", "ending", "text"),
    [
        ({"max_new_tokens": 2}, "length", "he"),
        ({"stop": ["ll"]}, "stop_sequence", "hell"),
        ({"max_new_tokens": 5}, "length", "hello"),
        ({}, "eos_token", "hello"),
    ],
)
def test_endings(client: httpx.Client, parameters: dict[str, Any], ending: str, text: str) -> None:
    answer = generate(client, details=True, **parameters)
    assert (answer["details"]["finish_reason"], answer["generated_text"]) == (ending, text)
    *rest, last = events(client, **parameters)
    assert (last["details"]["finish_reason"], last["generated_text"]) == (ending, text)
    assert last["details"]["generated_tokens"] == len(rest) + 1 == answer["details"]["generated_tokens"]
    assert "".join(each["token"]["text"] for each in [*rest, last]) == text
    assert all(each["generated_text"] is None and each["details"] is None for each in rest)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, (0.0, 1.0, 0)),
        ({"top_k": 5}, (1.0, 1.0, 5)),
        ({"do_sample": True}, (1.0, 1.0, 0)),
        ({"temperature": 0.5, "top_p": 0.9}, (0.5, 0.9, 0)),
        ({"temperature": 1.0}, (0.0, 1.0, 0)),
    ],
)
def test_what_asks_to_sample(
    client: httpx.Client, backend: FakeBackend, parameters: dict[str, Any], expected: tuple[float, float, int]
) -> None:
    answer = generate(client, seed=7, details=True, **parameters)
    sampling = backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (*expected, 7)
    assert answer["details"]["seed"] == (7 if sampling.temperature else None)


def test_chat_templates_are_applied_on_request(client: httpx.Client, backend: FakeBackend) -> None:
    generate(client, apply_chat_template=True)
    assert getattr(backend.requests[-1].prompt, "messages", None) == MESSAGES


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"merged_adapters": {"ids": ["a", "b"]}}, "merged_adapters"),
        ({"api_token": "secret"}, "api_token"),
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"best_of": 2}, "best_of"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"adapter_id": 7}, "adapter_id"),
    ],
)
def test_errors_in_their_shape(client: httpx.Client, parameters: dict[str, Any], name: str) -> None:
    error = generate(client, status=422, **parameters)
    assert set(error) == {"error", "error_type"}
    assert error["error_type"] == "validation"
    assert name in error["error"]
    assert "secret" not in error["error"]


def test_other_errors(client: httpx.Client) -> None:
    assert generate(client, status=404, adapter_id="nobody")["error_type"] == "validation"
    assert generate(client, "x" * 600, 422)["error_type"] == "validation"
    assert generate(client, "", 422)["error_type"] == "validation"
    busy = client.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "busy"}})
    assert (busy.status_code, busy.json()["error_type"], busy.headers["retry-after"]) == (429, "overloaded", "7")
    broken = generate(client, status=424, adapter_id="broken")
    assert (broken["error_type"], "worker" in broken["error"]) == ("generation", True)
    text = client.post("/generate", content="x", headers={"content-type": "text/plain"})
    assert (text.status_code, set(text.json())) == (415, {"error", "error_type"})


def test_a_stream_that_breaks_says_so(client: httpx.Client) -> None:
    *tokens, error = events(client, adapter_id="broken")
    assert len(tokens) == 2
    assert error["error_type"] == "generation"


def test_several_backbones_need_a_name() -> None:
    backend = FakeBackend()
    with running(create_app(backend)) as url:
        backend._cards["other"] = backend._cards["demo"]
        backend._cards["other"] = type(backend._cards["demo"])("other", "other", None, 0, 1)
        response = httpx.post(f"{url}/generate", json={"inputs": "a"})
        assert response.status_code == 422
        assert "adapter_id" in response.json()["error"]
