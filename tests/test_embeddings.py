"""/v1/embeddings: shapes of inputs, order, encodings and what is refused."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.embeddings import floats
from serverlesslora.gateway.limits import HttpSettings
from tests.backend_fake import HIDDEN, FakeBackend, embedding_of
from tests.server import running


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def url(backend: FakeBackend) -> Iterator[str]:
    with running(create_app(backend, HttpSettings(max_prompts=4))) as url:
        yield url


def embed(url: str, value: Any, status: int = 200, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/embeddings", json={"model": "upper", "input": value, **fields}, timeout=30)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def expected(*texts: str) -> list[list[float]]:
    return [floats(embedding_of("upper", list(text.encode()))) for text in texts]


def test_one_text(url: str) -> None:
    answer = embed(url, "hello")
    (vector,) = expected("hello")
    assert answer == {
        "object": "list",
        "model": "upper",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    assert math.isclose(sum(each * each for each in vector), 1, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (["a", "bc"], ["a", "bc"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
        (["a", [98, 99]], ["a", "bc"]),
    ],
)
def test_shapes_of_inputs(url: str, value: Any, texts: list[str]) -> None:
    answer = embed(url, value)
    assert [each["index"] for each in answer["data"]] == list(range(len(texts)))
    assert [each["embedding"] for each in answer["data"]] == expected(*texts)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_base64_is_float32_in_little_endian(url: str) -> None:
    (item,) = embed(url, "hello", encoding_format="base64")["data"]
    assert base64.b64decode(item["embedding"]) == embedding_of("upper", list(b"hello"))


def test_openai_client_in_its_own_encoding(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    answer = client.embeddings.create(model="upper", input=["a", "bc"])  # asks for base64 and decodes it
    assert [each.embedding for each in answer.data] == [pytest.approx(each) for each in expected("a", "bc")]
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="upper", input="a", dimensions=3)
    assert caught.value.param == "dimensions"


def test_dimensions_that_are_the_size(url: str) -> None:
    assert len(embed(url, "a", dimensions=HIDDEN)["data"][0]["embedding"]) == HIDDEN
    assert str(HIDDEN) in embed(url, "a", 400, dimensions=HIDDEN + 1)["error"]["message"]


def test_what_is_asked_of_the_worker(url: str, backend: FakeBackend) -> None:
    embed(url, ["a", "b"], pooling="mean")
    first, second = backend.requests[-2:]
    assert (first.pooling, second.pooling, first.is_batch, first.sampling.max_tokens) == ("mean", "mean", True, 0)
    embed(url, "a")
    assert (backend.requests[-1].pooling, backend.requests[-1].is_batch) == ("last", False)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a"] * 5}, "input"),
        ({"input": "a" * 600}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"pooling": "first"}, "pooling"),
        ({"model": ""}, "model"),
        ({"model": "upper", "adapter_id": "reverse"}, "adapter_id"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"normalize": False}, "normalize"),
    ],
)
def test_errors_name_the_field(url: str, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{url}/v1/embeddings", json={"model": "upper", "input": "a"} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_an_adapter_by_its_other_name(url: str, backend: FakeBackend) -> None:
    body = {"model": "demo", "adapter_id": "upper", "input": "a"}
    assert httpx.post(f"{url}/v1/embeddings", json=body).json()["model"] == "upper"
    assert backend.requests[-1].model == "upper"


def test_one_failure_fails_all(url: str) -> None:
    assert embed(url, ["a", "b" * 600], 400)["error"]["code"] == "context_length_exceeded"
    assert embed(url, "a", 404, model="nobody")["error"]["code"] == "model_not_found"


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_are_what_was_packed(values: list[float]) -> None:
    assert floats(struct.pack(f"<{len(values)}f", *values)) == values
