"""Structured output of the real server: the demo's functions, asked over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from serverlesslora import demo
from tests.server import serving

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
NO_SPACES = {"logit_bias": {str(token_id): -100 for token_id in (9, 10, 13, 32)}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    paths = demo.adapter_paths()
    named = [f"--adapter=acme/{name}={paths[name]}" for name in ("upper", "reverse")]
    with serving(str(demo.backbone_path()), *named) as address:
        yield address


def ask(url: str, model: str, text: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def choice_of(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def streamed(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 200, answer.text
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, next(choice["finish_reason"] for choice in reversed(choices) if choice["finish_reason"])


@pytest.mark.parametrize("model", ["upper", "reverse"])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": FORMAT, "temperature": 1, "seed": 3},
    ],
    ids=["response_format", "guided_json", "structured_outputs", "drawn"],
)
def test_answers_match_the_schema_whole_and_streamed(url: str, model: str, fields: dict[str, Any]) -> None:
    text, reason = choice_of(ask(url, model, "hello", **fields))
    assert reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)
    assert streamed(ask(url, model, "hello", stream=True, **fields)) == (text, reason)


def test_the_model_still_chooses(url: str) -> None:
    """Where the grammar leaves a choice it is the adapter's."""
    choices = {"guided_choice": ["hello", "HELLO", "olleh"]}
    assert choice_of(ask(url, "upper", "hello", **choices)) == ("HELLO", "stop")
    assert choice_of(ask(url, "reverse", "hello", **choices)) == ("olleh", "stop")
    text, reason = choice_of(ask(url, "upper", "hello", guided_regex="[a-z]{3}"))
    assert re.fullmatch("[a-z]{3}", text)
    assert reason == "stop"
    assert choice_of(ask(url, "upper", "hello")) == ("HELLO", "stop")


def test_json_object_and_what_is_cut(url: str) -> None:
    text, reason = choice_of(
        ask(url, "upper", "hello", response_format={"type": "json_object"}, max_tokens=100, **NO_SPACES)
    )
    assert text.startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)
    text, reason = choice_of(ask(url, "upper", "hello", response_format=FORMAT, max_tokens=3))
    assert (len(text), reason) == (3, "length")


def test_completions_and_many_choices(url: str) -> None:
    body = {
        "model": "upper",
        "prompt": ["hello\n", "there\n"],
        "n": 2,
        "max_tokens": 60,
        "structured_outputs": {"grammar": 'root ::= ("yes" | "no") [0-9]'},
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert re.fullmatch("(yes|no)[0-9]", choice["text"])
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "not",
        ),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_grammar": "nothing"}, "guided_grammar", ""),
        ({"structured_outputs": {"json": {"type": "strange"}}}, "structured_outputs.json", "strange"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "both"),
    ],
    ids=["schema", "regex", "grammar", "structured", "two"],
)
def test_refusals_are_json_also_in_a_stream(
    url: str, stream: bool, fields: dict[str, Any], param: str, reason: str
) -> None:
    answer = ask(url, "upper", "hello", stream=stream, **fields)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"


def test_together_with_others(url: str) -> None:
    hard = {"properties": {f"p{i}": {"type": "integer", "multipleOf": 9973} for i in range(60)}}
    with ThreadPoolExecutor(8) as pool:
        bound = [pool.submit(ask, url, "reverse", f"text {i}", response_format=FORMAT) for i in range(4)]
        slow = pool.submit(ask, url, "upper", "hello", guided_json=hard, max_tokens=5)
        free = [pool.submit(ask, url, "upper", f"ab{i}") for i in range(4)]
        for each in bound:
            jsonschema.validate(json.loads(choice_of(each.result())[0]), SCHEMA)
        for i, each in enumerate(free):
            assert choice_of(each.result()) == (f"AB{i}", "stop")
        assert slow.result().status_code in (200, 400)
