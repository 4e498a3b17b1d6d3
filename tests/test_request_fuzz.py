"""Valid values in any combination: an answer of the right shape or a refusal that names a parameter, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serverlesslora.gateway.app import create_app
from tests.backend_fake import FakeBackend
from tests.server import running, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
    "required": ["city", "ok"],
    "additionalProperties": False,
}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "parameters": SCHEMA, **more}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": function(name, **more)}


NAMED = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city": "x", "ok": true}'}}
USER = {"role": "user", "content": "hello world"}
MESSAGES = [
    [USER],
    [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, USER],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
     {"role": "tool", "tool_call_id": "call_1", "content": "sun"}],
    [USER, {"role": "assistant", "content": "DL"}],
]  # fmt: skip
SHARED: dict[str, list[Any]] = {
    "n": [1, 2],
    "stop": ["l", ["o", "zz"], []],
    "temperature": [0, 1],
    "seed": [1, -1],
    "stream_options": [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}],
    "min_tokens": [0, 2],
    "ignore_eos": [True],
    "include_stop_str_in_output": [True],
    "return_token_ids": [True],
    "prompt_logprobs": [0, 2],
    "echo": [True, False],
    "logit_bias": [{"65": 5, "66": -100}],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    ],
    "structured_outputs": [{"regex": "[a-c]{1,3}"}, {"json": SCHEMA}],
    "guided_json": [SCHEMA],
    "guided_regex": ["[a-c]{1,3}"],
    "guided_choice": [["yes", "no"]],
    "guided_grammar": ['root ::= "a" | "b" root'],
}
CHAT = SHARED | {
    "messages": MESSAGES,
    "tools": [[], [tool("f")], [tool("f", strict=True), tool("g")]],
    "tool_choice": [
        *("none", "auto", "required"),
        NAMED,
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
    ],
    "parallel_tool_calls": [True, False],
    "functions": [[function("f")]],
    "function_call": ["auto", "none", {"name": "f"}],
    "logprobs": [True, False],
    "top_logprobs": [0, 2],
    "add_generation_prompt": [True, False],
    "continue_final_message": [True, False],
    "reasoning_effort": ["none", "low"],
    "include_reasoning": [False],
}  # fmt: skip
COMPLETION = SHARED | {
    "prompt": ["hello", ["a", "b"], [72, 105], [[72], [105, 106]]],
    "logprobs": [0, 2],
    "best_of": [1, 2],
    "add_special_tokens": [True, False],
}


def bodies(choices: dict[str, list[Any]], always: str, most: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    """A few parameters at once, because each of many would refuse most of the others."""
    names = st.lists(st.sampled_from(sorted(choices.keys() - {always})), unique=True, max_size=most)
    chosen = names.flatmap(
        lambda given: st.fixed_dictionaries({name: st.sampled_from(choices[name]) for name in given})
    )
    model = st.sampled_from(["upper", "reverse"])
    base = st.fixed_dictionaries(
        {"model": model, always: st.sampled_from(choices[always]), "max_tokens": st.integers(1, 24)}
    )
    return st.tuples(base, chosen, st.booleans()).map(
        lambda parts: parts[0] | parts[1] | ({"stream": True} if parts[2] else {})
    )


ASKED = st.one_of(
    bodies(CHAT, "messages").map(lambda body: ("/v1/chat/completions", body)),
    bodies(COMPLETION, "prompt").map(lambda body: ("/v1/completions", body)),
)


def check(client: httpx.Client, asked: tuple[str, dict[str, Any]]) -> None:
    path, body = asked
    answer = client.post(path, json=body, timeout=30)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["param"] and error["param"].partition("[")[0].partition(".")[0] in body, error
        return
    num_prompts = len(body["prompt"]) if _is_many(body.get("prompt")) else 1
    ended = _streamed(answer.text, path) if body.get("stream") else _whole(answer.json(), path)
    assert sorted(ended) == list(range(num_prompts * body.get("n", 1)))
    for choice in ended.values():
        assert choice["finish_reason"] in ("stop", "length", "tool_calls", "function_call")


def _is_many(prompt: Any) -> bool:
    return isinstance(prompt, list) and not isinstance(prompt[0], int)


def _whole(answer: dict[str, Any], path: str) -> dict[int, dict[str, Any]]:
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        if "chat" in path:
            message = choice["message"]
            assert message["role"] == "assistant"
            calls = message.get("tool_calls")
            assert calls is None or (calls and all(call["id"] and call["function"]["name"] for call in calls))
            if choice["finish_reason"] == "tool_calls":
                assert calls
        else:
            assert isinstance(choice["text"], str)
    return {choice["index"]: choice for choice in answer["choices"]}


def _streamed(text: str, path: str) -> dict[int, dict[str, Any]]:
    """The last chunk of each choice; nothing comes behind it."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    ended: dict[int, dict[str, Any]] = {}
    chunks = [json.loads(event) for event in events]
    assert len({(chunk["id"], chunk["object"]) for chunk in chunks}) == 1
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice["index"] not in ended, "a choice that had ended goes on"
        if choice["finish_reason"] is not None:
            ended[choice["index"]] = choice
    return ended


@pytest.fixture(scope="module")
def fake() -> Iterator[httpx.Client]:
    with running(create_app(FakeBackend())) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture(scope="module")
def real() -> Iterator[httpx.Client]:
    with serving("--demo") as url, httpx.Client(base_url=url) as client:
        yield client


@given(asked=ASKED)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_combination_is_answered_or_refused_by_name(fake: httpx.Client, asked: tuple[str, dict[str, Any]]) -> None:
    check(fake, asked)


@given(asked=ASKED)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_combination_on_a_real_worker(real: httpx.Client, asked: tuple[str, dict[str, Any]]) -> None:
    check(real, asked)
