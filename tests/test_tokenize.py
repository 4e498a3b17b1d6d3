"""Token ids of texts and messages, and texts of token ids, without a tokenizer in the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serverlesslora.gateway.app import create_app
from tests.backend_fake import CONTEXT, EOS, FakeBackend
from tests.server import running


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def client(backend: FakeBackend) -> Iterator[httpx.Client]:
    with running(create_app(backend)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def post(client: httpx.Client, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": "upper"} | body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_text_as_token_ids(client: httpx.Client) -> None:
    assert post(client, "/tokenize", prompt="hé") == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": list("hé".encode()),
        "token_strs": None,
    }


def test_strings_of_the_tokens(client: httpx.Client) -> None:
    assert post(client, "/tokenize", prompt="ab", return_token_strs=True)["token_strs"] == ["a", "b"]


def test_nothing_is_computed_and_the_prompt_is_counted(client: httpx.Client, backend: FakeBackend) -> None:
    post(client, "/tokenize", prompt="abc", add_special_tokens=False)
    sent = backend.requests[-1]
    assert (sent.sampling.max_tokens, sent.sampling.prompt_logprobs, sent.echo) == (0, None, True)
    assert not getattr(sent.prompt, "add_special_tokens", True)
    metrics = client.get("/metrics").text
    assert 'serverlesslora_prompt_tokens_total{function="upper"}' in metrics


def test_messages_are_what_a_chat_request_would_run(client: httpx.Client, backend: FakeBackend) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = post(client, "/tokenize", messages=messages, chat_template_kwargs={"a": 1})["tokens"]
    asked = backend.requests[-1].prompt
    usage = post(client, "/v1/chat/completions", messages=messages, chat_template_kwargs={"a": 1}, max_tokens=1)[
        "usage"
    ]
    assert asked == backend.requests[-1].prompt
    assert usage["prompt_tokens"] == len(tokens)


def test_a_message_that_goes_on(client: httpx.Client, backend: FakeBackend) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    post(client, "/tokenize", messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert getattr(backend.requests[-1].prompt, "continue_final_message", False)


def test_token_ids_as_text(client: httpx.Client) -> None:
    assert post(client, "/detokenize", tokens=list("hé".encode())) == {"prompt": "hé"}
    text = "round trip: 日本語"
    assert post(client, "/detokenize", tokens=post(client, "/tokenize", prompt=text)["tokens"])["prompt"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "a", "model": 5}, "model"),
        ("/tokenize", {"prompt": "a", "adapter_id": "reverse"}, "adapter_id"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [65], "adapter_id": "reverse"}, "adapter_id"),
        ("/tokenize", {"prompt": "a" * (CONTEXT + 1)}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [EOS + 1]}, "tokens"),
    ],
)
def test_errors_name_the_field(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    error = post(client, path, 400, **body)["error"]
    assert error["param"].removesuffix("[0]") == param.removesuffix("[0]"), error


def test_unknown_models(client: httpx.Client) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert post(client, path, 404, model="nobody", **body)["error"]["param"] == "model"


def test_a_server_that_is_busy_says_so(client: httpx.Client) -> None:
    assert client.post("/tokenize", json={"model": "busy", "prompt": "a"}).headers["retry-after"] == "7"
