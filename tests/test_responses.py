"""OpenAI's Responses API: input items as messages, output items and typed events, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.responses_body import parse_responses
from serverlesslora.gateway.responses_output import Output, OutputCall, OutputMessage, OutputReasoning
from tests.backend_fake import TEACHER, FakeBackend
from tests.server import running

SAID = '<think>hm</think>yes<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def url(backend: FakeBackend) -> Iterator[str]:
    with running(create_app(backend)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def respond(url: str, value: Any = "hello", status: int = 200, **fields: Any) -> dict[str, Any]:
    body = {"model": "upper", "input": value, "temperature": 0, **fields}
    response = httpx.post(f"{url}/v1/responses", json=body, timeout=30)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(url: str, value: Any = "hello", **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "upper", "input": value, "temperature": 0, "stream": True, **fields}
    response = httpx.post(f"{url}/v1/responses", json=body, timeout=30)
    assert response.status_code == 200, response.text
    found = []
    *blocks, end = response.text.split("\n\n")
    assert end == ""
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="upper", input="hello", temperature=0, metadata={"a": "b"})
    assert (answer.output_text, answer.status, answer.model, answer.metadata) == (
        "HELLO",
        "completed",
        "upper",
        {"a": "b"},
    )
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")  # type: ignore[union-attr]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens == 6


def test_a_stream_of_a_text(client: openai.OpenAI) -> None:
    with client.responses.stream(model="upper", input="hello", temperature=0) as stream:
        kinds = [each.type for each in stream]
        final = stream.get_final_response()
    assert final.output_text == "HELLO"
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 5,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_stream_ends_with_the_whole_answer(url: str) -> None:
    last = events(url, instructions="be brief", max_output_tokens=9)[-1]["response"]
    whole = respond(url, instructions="be brief", max_output_tokens=9)
    for each in (last, whole):
        for name in ("id", "created_at"):
            del each[name]
        for item in each["output"]:
            del item["id"]
    assert last == whole


def test_reasoning_and_calls_are_items_of_their_own(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=TEACHER, input=SAID, temperature=0, tools=[TOOL])  # type: ignore[list-item]
    reasoning, message, call = answer.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "hm"
    assert message.type == "message"
    assert answer.output_text == "yes"
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("f", {"a": 1})
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


def test_their_streams(url: str) -> None:
    found = events(url, SAID, model=TEACHER, tools=[TOOL])
    by_kind = {
        kind: "".join(each["delta"] for each in found if each["type"] == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text", "function_call_arguments")
    }
    assert (by_kind["reasoning_text"], by_kind["output_text"]) == ("hm", "yes")
    assert json.loads(by_kind["function_call_arguments"]) == {"a": 1}
    done = [each["item"] for each in found if each["type"] == "response.output_item.done"]
    assert done == found[-1]["response"]["output"]
    assert [each["type"] for each in done] == ["reasoning", "message", "function_call"]
    places = [each["output_index"] for each in found if "output_index" in each]
    assert places == sorted(places)


def test_an_answer_that_was_cut(url: str) -> None:
    for answer in (respond(url, max_output_tokens=2), events(url, max_output_tokens=2)[-1]["response"]):
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert answer["output"][0]["status"] == "incomplete"
        assert answer["output"][0]["content"][0]["text"] == "HE"
    assert events(url, max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_a_stream_that_breaks_ends_with_what_there_is(url: str) -> None:
    last = events(url, model="broken")[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "worker" in last["response"]["error"]["message"]
    assert last["response"]["output"][0]["content"][0]["text"] == "HE"


# --- requests ----------------------------------------------------------------------------------------------------


def chat_of(value: Any, **fields: Any) -> dict[str, Any]:
    return parse_responses({"model": "m", "input": value, **fields})[1]


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


def test_items_as_messages() -> None:
    items = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        CALL,
        CALL | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "bye"},
    ]
    function = {"name": "f", "arguments": "{}"}
    assert chat_of(items, instructions="i")["messages"] == [
        {"role": "system", "content": "i"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "so",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "bye"},
    ]


def test_an_answer_goes_back_as_input(url: str, backend: FakeBackend) -> None:
    output = respond(url, SAID, model=TEACHER, tools=[TOOL])["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "42"}
    said = respond(url, [{"role": "user", "content": "x"}, *output, result], model=TEACHER, tools=[TOOL])
    assert said["output"][0]["content"][0]["text"] == "42"
    assistant = getattr(backend.requests[-1].prompt, "messages", [])[1]
    assert (assistant["content"], assistant["tool_calls"][0]["function"]["arguments"]) == ("yes", {"a": 1})


def test_other_parameters_in_a_chats_words() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    chat = chat_of(
        "x",
        max_output_tokens=5,
        top_p=0.5,
        seed=3,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        text={"format": schema},
        reasoning={"effort": "low"},
    )
    assert (chat["max_completion_tokens"], chat["top_p"], chat["seed"]) == (5, 0.5, 3)
    function = {"name": "f", "parameters": {"type": "object"}, "strict": False}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    inner = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": inner}
    assert chat["reasoning_effort"] == "low"
    assert chat_of("x", text={"format": {"type": "text"}})["response_format"] == {"type": "text"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [CALL | {"arguments": "{"}]}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 511}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters"),
    ],
)
def test_refusals_name_the_parameter(url: str, fields: dict[str, Any], param: str) -> None:
    body = {"model": "upper", "input": "hi"} | fields
    response = httpx.post(f"{url}/v1/responses", json=body, timeout=30)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "include": [], "truncation": "disabled", "background": False, "top_logprobs": 0},
        {"previous_response_id": None, "conversation": None, "text": None, "reasoning": None, "tools": None},
        {"service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "k", "user": "u"},
        {
            "text": {"verbosity": "medium"},
            "reasoning": {},
            "tools": [],
            "stream_options": {"include_obfuscation": False},
        },
    ],
)
def test_what_asks_for_nothing_is_accepted(url: str, fields: dict[str, Any]) -> None:
    assert respond(url, **fields)["status"] == "completed"


def test_unknown_models(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="nobody", input="x")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


# --- the state machine -------------------------------------------------------------------------------------------

pieces = st.lists(
    st.tuples(st.sampled_from(["content", "reasoning_content", "call"]), st.text("ab", min_size=1, max_size=3)),
    max_size=8,
)


@given(pieces, st.integers(1, 4))
def test_any_chunks_make_a_proper_sequence(said: list[tuple[str, str]], together: int) -> None:
    """Every item is opened, told and closed once, one after the other, and its parts add up."""
    chunks, index = [], -1
    for kind, text in said:
        if kind == "call":
            index += 1
            delta: dict[str, Any] = {
                "tool_calls": [{"index": index, "id": f"c{index}", "function": {"name": "f", "arguments": text}}]
            }
        else:
            delta = {kind: text}
        chunks.append(b"data: " + msgspec.json.encode({"choices": [{"delta": delta}]}) + b"\n\n")
    output = Output("id")
    found: list[tuple[str, dict[str, Any]]] = []
    for start in range(0, len(chunks), together):
        found += output.read(b"".join(chunks[start : start + together]))
    found += output.close("completed")
    assert list(output.close("completed")) == []
    kinds: list[type] = [OutputMessage, OutputReasoning, OutputCall]
    texts = ["", "", ""]
    for item in output.items:
        assert item.status == "completed"
        place = kinds.index(type(item))
        texts[place] += item.arguments if isinstance(item, OutputCall) else item.content[0].text
    assert sum(isinstance(item, OutputCall) for item in output.items) == index + 1
    names = ("content", "reasoning_content", "call")
    assert texts == ["".join(text for each, text in said if each == name) for name in names]
    added = [fields["output_index"] for kind, fields in found if kind == "response.output_item.added"]
    done = [fields["output_index"] for kind, fields in found if kind == "response.output_item.done"]
    assert added == done == list(range(len(output.items)))


@given(
    st.recursive(
        st.none() | st.text("ab", max_size=3) | st.integers(),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "role",
                        "content",
                        "text",
                        "name",
                        "call_id",
                        "arguments",
                        "output",
                        "message",
                        "user",
                        "reasoning",
                    ]
                ),
                x,
                max_size=4,
            )
        ),
        max_leaves=6,
    )
)
def test_any_input_is_parsed_or_refused(value: Any) -> None:
    with contextlib.suppress(InvalidRequest):
        assert chat_of(value)["messages"]
