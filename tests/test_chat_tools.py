"""Tools and reasoning over HTTP: a backend that plays given texts, and the real server where a call must come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import httpx
import instructor
import openai
import pydantic
import pytest

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.backend import Cold, Event, Generation, GenerationRequest
from serverlesslora_ipc.messages import ChatPrompt, Delta, Finished, FinishReason, Grammar, Started, TokenLogprob
from tests.backend_fake import FakeBackend
from tests.live import live
from tests.server import running

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "What it will be.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "bye"}},
]
FUNCTIONS = [tool["function"] for tool in TOOLS]
USER: dict[str, Any] = {"role": "user", "content": "Will it rain?"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln {😀", "days": 2}}\n</tool_call>'
ARGUMENTS = '{"city": "Köln {😀", "days": 2}'


class Script(NamedTuple):
    """What the model writes, token by token."""

    tokens: tuple[str, ...]
    started: Started
    finish_reason: FinishReason = "stop"


def script(text: str, tool_format: str = "hermes", *, size: int = 3, **about: Any) -> Script:
    finish_reason = about.pop("finish_reason", "stop")
    tokens = tuple(text[place : place + size] for place in range(0, len(text), size))
    return Script(tokens, Started("played", 5, tool_format=tool_format, **about), finish_reason)


class Played:
    digest = None
    version = None
    cold = Cold()

    def __init__(self, played: Script, request: GenerationRequest) -> None:
        self._script = played
        self._request = request

    async def started(self) -> Started:
        return self._script.started

    async def __aiter__(self) -> AsyncIterator[Event]:
        wants_logprobs = self._request.sampling.logprobs is not None
        for place, token in enumerate(self._script.tokens):
            logprobs = (TokenLogprob(place, token, -0.5, token.encode()),) if wants_logprobs else None
            for index in range(self._request.n):
                yield Delta("played", index, token, (place,), logprobs)
        for index in range(self._request.n):
            yield Delta("played", index, "", (999,), finish_reason=self._script.finish_reason)
        yield Finished("played", 5, (len(self._script.tokens) + 1) * self._request.n)


class Stage(FakeBackend):
    """Plays `script` for whatever is asked."""

    script = script("")

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:  # type: ignore[override]
        self.requests.append(request)
        return self._play(request)

    @asynccontextmanager
    async def _play(self, request: GenerationRequest) -> AsyncIterator[Played]:
        yield Played(self.script, request)


class Theatre(NamedTuple):
    stage: Stage
    url: str

    def post(self, played: Script | None = None, **fields: Any) -> httpx.Response:
        if played is not None:
            self.stage.script = played
        body = {"model": "demo", "messages": [USER], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=20)

    def whole(self, played: Script, **fields: Any) -> dict[str, Any]:
        answer = self.post(played, **fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def chunks(self, played: Script, **fields: Any) -> list[dict[str, Any]]:
        answer = self.post(played, stream=True, **fields)
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    @property
    def prompt(self) -> ChatPrompt:
        prompt = self.stage.requests[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        return prompt

    @property
    def grammar(self) -> Grammar | None:
        return self.stage.requests[-1].sampling.grammar


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    stage = Stage()
    with running(create_app(stage)) as url:
        yield Theatre(stage, url)


def assembled(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that a stream's deltas add up to, and how it ended."""
    message: dict[str, Any] = {"tool_calls": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        for name in ("content", "reasoning_content", "reasoning"):
            if delta.get(name) is not None:
                message[name] = message.get(name, "") + delta[name]
        if "function_call" in delta:
            call = message.setdefault("function_call", {"name": "", "arguments": ""})
            for name, text in delta["function_call"].items():
                call[name] += text
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(message["tool_calls"]):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                message["tool_calls"].append(part | {"function": dict(part["function"])})
            else:
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                message["tool_calls"][part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        if choice["finish_reason"] is not None:
            message["finish_reason"] = choice["finish_reason"]
    return message


FAMILIES = {
    "hermes": CALL,
    "llama3_json": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}]',
    "pythonic": '[weather(city="Köln {😀", days=2)]',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nKöln {😀\n</parameter>\n<parameter=days>2"
    "</parameter>\n</function>\n</tool_call>",
    "functionary": f"<function=weather>{ARGUMENTS}</function>",
}


@pytest.mark.parametrize("tool_format", FAMILIES)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_whole_and_streamed_calls_are_the_same(theatre: Theatre, tool_format: str, size: int) -> None:
    played = script(FAMILIES[tool_format], tool_format, size=size)
    choice = theatre.whole(played, tools=TOOLS)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": ARGUMENTS})
    streamed = assembled(theatre.chunks(played, tools=TOOLS))
    assert [each["function"] for each in streamed["tool_calls"]] == [call["function"]]
    assert (streamed["content"], streamed["finish_reason"]) == ("", "tool_calls")
    length = 9 if tool_format == "mistral" else 29  # Mistral's templates insist on nine
    assert [len(each["id"]) for each in (call, *streamed["tool_calls"])] == [length, length]


def test_words_around_calls_of_several_choices(theatre: Theatre) -> None:
    played = script(f"One moment.\n{CALL}\n{CALL}")
    message = theatre.whole(played, tools=TOOLS, n=2)["choices"][1]["message"]
    assert message["content"] == "One moment.\n"
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    chunks = theatre.chunks(played, tools=TOOLS, n=2)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for index in (0, 1):
        streamed = assembled(chunks, index)
        assert (streamed["content"], len(streamed["tool_calls"])) == ("One moment.\n", 2)
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_words_without_a_call(theatre: Theatre) -> None:
    for text in ("No rain.", '<tool_call>{"name": "nobody"}</tool_call>', '<tool_call>{"name": "wea', ""):
        choice = theatre.whole(script(text), tools=TOOLS)["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)
        assert "tool_calls" not in choice["message"]
        streamed = assembled(theatre.chunks(script(text), tools=TOOLS))
        assert streamed == {"tool_calls": [], "content": text, "finish_reason": "stop"}


def test_a_call_that_is_cut_off_ends_with_length(theatre: Theatre) -> None:
    played = script(CALL[:60], finish_reason="length")
    choice = theatre.whole(played, tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert ARGUMENTS.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_nothing_is_looked_for_where_nothing_was_offered(theatre: Theatre) -> None:
    offers: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}]
    for fields in offers:
        message = theatre.whole(script(CALL), **fields)["choices"][0]["message"]
        assert message == {"content": CALL, "role": "assistant", "refusal": None}
        assert theatre.prompt.tools is None


def test_logprobs_and_token_ids_are_those_of_all_tokens(theatre: Theatre) -> None:
    played = script(CALL)
    count = len(played.tokens)
    fields: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    choice = theatre.whole(played, **fields)["choices"][0]
    assert len(choice["logprobs"]["content"]) == count
    streamed = [chunk["choices"][0] for chunk in theatre.chunks(played, **fields)]
    tokens = [entry["token"] for choice in streamed for entry in (choice["logprobs"] or {"content": ()})["content"]]
    assert tokens == list(played.tokens)
    assert [each for choice in streamed for each in choice.get("token_ids", ())] == [*range(count), 999]


def test_a_required_call(theatre: Theatre) -> None:
    text = f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "bye", "parameters": {{}}}}]'
    choice = theatre.whole(script(text), tools=TOOLS, tool_choice="required")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather", "bye"]
    grammar = theatre.stage.requests[-1].sampling.grammar
    assert grammar is not None and grammar.kind == "json_schema"
    assert "maxItems" not in json.loads(grammar.text)
    assert theatre.prompt.tools == TOOLS
    theatre.whole(script(text), tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    grammar = theatre.stage.requests[-1].sampling.grammar
    assert grammar is not None and json.loads(grammar.text)["maxItems"] == 1


def test_a_named_call(theatre: Theatre) -> None:
    choice_ = {"type": "function", "function": {"name": "weather"}}
    choice = theatre.whole(script(ARGUMENTS), tools=TOOLS, tool_choice=choice_)["choices"][0]
    assert choice["finish_reason"] == "stop"  # as OpenAI answers
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ARGUMENTS}
    streamed = assembled(theatre.chunks(script(ARGUMENTS), tools=TOOLS, tool_choice=choice_))
    assert streamed["tool_calls"][0]["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert streamed["finish_reason"] == "stop"


def test_functions_by_their_older_name(theatre: Theatre) -> None:
    choice = theatre.whole(script(CALL), functions=FUNCTIONS)["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": ARGUMENTS}
    assert "tool_calls" not in choice["message"]
    assert theatre.prompt.tools == TOOLS
    streamed = assembled(theatre.chunks(script(CALL), functions=FUNCTIONS))
    assert streamed["function_call"] == {"name": "weather", "arguments": ARGUMENTS}
    assert streamed["finish_reason"] == "function_call"
    named = theatre.whole(script("{}"), functions=FUNCTIONS, function_call={"name": "bye"})["choices"][0]
    assert named["message"]["function_call"] == {"name": "bye", "arguments": "{}"}


def test_what_was_called_goes_back_to_the_template(theatre: Theatre) -> None:
    called = {"name": "weather", "arguments": ARGUMENTS}
    call = {"id": "call_1", "type": "function", "function": called}
    theatre.whole(
        script("Yes."),
        tools=TOOLS,
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
            {"role": "assistant", "content": None, "function_call": called},
            {"role": "function", "name": "weather", "content": "sun"},
        ],
    )
    parsed = {"name": "weather", "arguments": json.loads(ARGUMENTS)}
    old = {"id": "function0", "type": "function", "function": parsed}
    assert theatre.prompt.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call | {"function": parsed}], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "", "tool_calls": [old]},
        {"role": "tool", "name": "weather", "content": "sun", "tool_call_id": "function0"},
    ]


STRICT = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": WEATHER}}]


DEEP: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": json.loads('{"x":' * 300 + "1" + "}" * 300)},
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
        ({"tools": TOOLS + TOOLS}, "tools[2]"),
        ({"tools": TOOLS, "guided_choice": ["a"]}, "guided_choice"),
        ({"functions": FUNCTIONS + FUNCTIONS}, f"functions[{len(FUNCTIONS)}]"),
        ({"functions": [{"name": "f", "parameters": {"type": "array"}}]}, "functions[0].parameters"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "x"}, "guided_regex"),
        ({"tools": [DEEP]}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "functions": FUNCTIONS}, "functions"),
        ({"functions": FUNCTIONS, "function_call": {"name": "nobody"}}, "function_call"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"verbosity": "high"}, "verbosity"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_served_is_named(theatre: Theatre, fields: dict[str, Any], param: str) -> None:
    answer = theatre.post(script(""), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_is_strict_holds_a_free_model_to_its_schema(theatre: Theatre) -> None:
    loose = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"x": {"type": "null"}}}}}
    assert theatre.post(script(""), tools=[loose, *STRICT]).status_code == 200
    grammar = theatre.grammar
    assert grammar is not None and (grammar.kind, grammar.param) == ("tools", "tools[1].function.strict")
    asked = json.loads(grammar.text)
    assert asked["functions"] == {"g": {"$ref": "#/$defs/0"}, "f": {"$ref": "#/$defs/1"}}
    assert asked["$defs"] == {"0": {"type": "object"}, "1": WEATHER}
    functions = [STRICT[0]["function"]]
    assert theatre.post(script(""), functions=functions).status_code == 200
    assert theatre.grammar is not None and theatre.grammar.param == "functions[0].strict"
    # Also where there is more to match: an answer without a call.
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    assert theatre.post(script(""), tools=STRICT, response_format=form).status_code == 200
    assert theatre.grammar is not None
    assert json.loads(theatre.grammar.text)["answer"] == {"type": "integer"}
    assert theatre.grammar.param == "tools[0].function.strict"
    assert theatre.post(script(""), tools=[loose], response_format=form).status_code == 200
    assert theatre.grammar is not None and theatre.grammar.param == "response_format"
    # A call that must come leaves no answer to be held to anything.
    assert theatre.post(script(""), tools=STRICT, response_format=form, tool_choice="required").status_code == 200
    assert theatre.grammar is not None and theatre.grammar.kind == "json_schema"
    assert theatre.post(script(""), tools=STRICT, tool_choice="none").status_code == 200
    assert theatre.grammar is None


def test_numbers_that_no_message_can_carry(theatre: Theatre) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"maximum": 2**70}}}}}
    assert theatre.post(script(""), tools=[tool]).status_code == 400


def test_fields_that_ask_for_nothing_are_accepted(theatre: Theatre) -> None:
    theatre.whole(
        script("x"), store=False, metadata={"a": "b"}, user="u", safety_identifier="s", prompt_cache_key="k",
        service_tier="auto", verbosity="medium", parallel_tool_calls=True,
    )  # fmt: skip


THINK = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "is_open"), [("<think>\nhm\n</think>\n\nYes.", False), ("hm\n</think>\n\nYes.", True)]
)
def test_reasoning_stands_beside_the_content(theatre: Theatre, text: str, is_open: bool) -> None:
    played = script(text, size=1, reasoning_tags=THINK, reasoning_open=is_open)
    body = theatre.whole(played)
    message = body["choices"][0]["message"]
    assert message == {
        "content": "Yes.",
        "role": "assistant",
        "refusal": None,
        "reasoning_content": "hm",
        "reasoning": "hm",
    }
    tokens = text.index("</think>") + len("</think>") - (text.index("<think>") + 6 if not is_open else 0)
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}
    chunks = theatre.chunks(played, stream_options={"include_usage": True})
    streamed = assembled(chunks)
    assert (streamed["reasoning_content"], streamed["reasoning"], streamed["content"]) == ("hm", "hm", "Yes.")
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}


def test_reasoning_that_is_not_wanted_is_left_out(theatre: Theatre) -> None:
    played = script("<think>hm</think>Yes.", reasoning_tags=THINK)
    message = theatre.whole(played, include_reasoning=False)["choices"][0]["message"]
    assert message == {"content": "Yes.", "role": "assistant", "refusal": None}
    assert "hm" not in json.dumps(theatre.chunks(played, include_reasoning=False))


def test_tags_that_the_template_does_not_know_are_text(theatre: Theatre) -> None:
    text = "<think>hm</think>Yes."
    body = theatre.whole(script(text))
    assert body["choices"][0]["message"]["content"] == text
    assert "completion_tokens_details" not in body["usage"]


def test_reasoning_before_a_required_call(theatre: Theatre) -> None:
    text = 'hm</think>[{"name": "bye", "parameters": {}}]'
    played = script(text, reasoning_tags=THINK, reasoning_open=True)
    message = theatre.whole(played, tools=TOOLS, tool_choice="required")["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", None)
    assert message["tool_calls"][0]["function"] == {"name": "bye", "arguments": "{}"}


def test_reasoning_effort_goes_to_the_template(theatre: Theatre) -> None:
    theatre.whole(script("x"), reasoning_effort="low", chat_template_kwargs={"enable_thinking": True})
    assert theatre.prompt.template_kwargs == {"reasoning_effort": "low", "enable_thinking": True}


def test_the_openai_client_puts_a_stream_together(theatre: Theatre) -> None:
    theatre.stage.script = script(f"Wait.\n{CALL}")
    with (
        openai.OpenAI(base_url=f"{theatre.url}/v1", api_key="x", max_retries=0) as client,
        client.chat.completions.stream(
            model="demo", messages=[{"role": "user", "content": "?"}], tools=TOOLS
        ) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Wait.\n"
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == ARGUMENTS


# --- the real server ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        live("--demo") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made,
    ):
        yield made


class Person(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)


def check_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert set(given) == {"city", "days"} and 1 <= given["days"] <= 9 and len(given["city"]) <= 12


def test_calls_that_must_come_come_and_fit(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "upper", "messages": [USER], "tools": TOOLS[:1], "max_tokens": 250}
    asked["temperature"] = 0
    required = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert required.finish_reason == "tool_calls"
    (call,) = required.message.tool_calls
    assert call.function.name == "weather"
    check_weather(call.function.arguments)
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    named = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
    assert named.finish_reason == "stop"
    check_weather(named.message.tool_calls[0].function.arguments)
    with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
        calls: Any = stream.get_final_completion().choices[0].message.tool_calls
    assert calls[0].function.arguments == named.message.tool_calls[0].function.arguments


def test_tools_are_told_in_words_where_the_template_takes_none(client: openai.OpenAI) -> None:
    def prompt_tokens(messages: list[Any], **fields: Any) -> int:
        asked: dict[str, Any] = {"model": "upper", "messages": messages, "max_tokens": 1, **fields}
        usage = client.chat.completions.create(**asked).usage
        return int(usage.prompt_tokens)

    assert prompt_tokens([USER], tools=TOOLS) > prompt_tokens([USER]) + 500
    call = {"id": "call_1", "type": "function", "function": {"name": "bye", "arguments": "{}"}}
    made = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert prompt_tokens([USER, made, {"role": "tool", "tool_call_id": "call_1", "content": "bye"}]) > 100


def test_a_template_without_reasoning_refuses_an_effort(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "upper", "messages": [USER], "max_tokens": 1}
    for fields in ({"reasoning_effort": "high"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, **fields)
    client.chat.completions.create(**asked, reasoning_effort="none")
    client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"enable_thinking": False}})


def test_instructor_gets_its_model_in_tools_mode(client: openai.OpenAI) -> None:
    wrapped = instructor.from_openai(client)
    person = wrapped.chat.completions.create(
        model="demo", response_model=Person, messages=[USER], temperature=0, max_tokens=300, max_retries=0
    )
    assert isinstance(person, Person)
