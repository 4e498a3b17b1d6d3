"""The further endpoints on a real server with the demo: real tokenizers, templates and workers behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server import serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def post(url: str, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_tokens_there_and_back(url: str) -> None:
    text = "hello world"
    answer = post(url, "/tokenize", model="upper", prompt=text, return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0
    assert answer["max_model_len"] > 0
    assert text in post(url, "/detokenize", model="upper", tokens=answer["tokens"])["prompt"]


def test_messages_have_as_many_tokens_as_a_chat_is_charged_for(url: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    count = post(url, "/tokenize", model="upper", messages=messages)["count"]
    usage = post(url, "/v1/chat/completions", model="upper", messages=messages, max_tokens=1)["usage"]
    assert count == usage["prompt_tokens"]


def test_token_ids_beyond_the_vocabulary(url: str) -> None:
    assert post(url, "/detokenize", 400, model="upper", tokens=[10**6])["error"]["param"] == "tokens"


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="reverse", input="hello world", temperature=0)
    assert (whole.output_text, whole.status) == ("dlrow olleh", "completed")
    with client.responses.stream(model="reverse", input="hello world", temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage == whole.usage


def test_embeddings_are_of_length_one_and_the_adapters_own(client: openai.OpenAI) -> None:
    def embed(model: str, *texts: str) -> list[list[float]]:
        return [each.embedding for each in client.embeddings.create(model=model, input=list(texts)).data]

    first, second, again = embed("upper", "hello", "world", "hello")
    assert math.isclose(sum(each * each for each in first), 1, rel_tol=1e-4)
    assert first == pytest.approx(again, abs=1e-4)
    assert first != pytest.approx(second, abs=1e-2)
    assert first != pytest.approx(embed("reverse", "hello")[0], abs=1e-2)


def test_tgi(url: str) -> None:
    parameters = {"adapter_id": "reverse", "apply_chat_template": True, "details": True}
    answer = post(url, "/generate", inputs="hello", parameters=parameters)
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("olleh", "eos_token")
    assert len(answer["details"]["tokens"]) == answer["details"]["generated_tokens"]


def test_a_temperature_that_is_almost_none(url: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = post(url, "/v1/chat/completions", model="upper", messages=messages, temperature=2.7e-255)
    assert answer["choices"][0]["message"]["content"] == "HELLO"
