"""Request bodies: what is accepted, what it becomes, and which field an error names."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.chat import parse_chat
from serverlesslora.gateway.completions import parse_completion
from serverlesslora.gateway.http_errors import MESSAGE_LIMIT, answer_for
from serverlesslora.gateway.limits import HttpSettings, decode_object
from serverlesslora.gateway.logprobs import LOWEST, CompletionLogprobs, chat_logprobs, prompt_logprobs
from serverlesslora_ipc.messages import ChatPrompt, TextPrompt, TokenLogprob, TokensPrompt

SETTINGS = HttpSettings()
USER = {"role": "user", "content": "hi"}


def chat(messages: Any = None, **fields: Any) -> GenerationRequest:
    _, generation, _ = parse_chat({"model": "m", "messages": messages or [USER], **fields}, "id", SETTINGS)
    return generation


def rendered(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = chat(list(messages)).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt.messages


def complete(prompt: Any = "hi", **fields: Any) -> list[GenerationRequest]:
    _, generations, _ = parse_completion({"model": "m", "prompt": prompt, **fields}, "id", SETTINGS)
    return generations


def test_defaults() -> None:
    sampling = chat().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1.0, 1.0, 0, None)
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.skip_special_tokens) == (None, None, True)
    assert sampling.seed != chat().sampling.seed
    assert complete()[0].sampling.max_tokens == 16
    assert complete(max_tokens=0)[0].sampling.max_tokens == 0


def test_null_is_the_default() -> None:
    names = [
        field.name for field in msgspec.structs.fields(parse_chat({"model": "m", "messages": [USER]}, "", SETTINGS)[0])
    ]
    optional = dict.fromkeys(set(names) - {"model", "messages", "seed"}) | {"tools": None, "response_format": None}
    assert chat(**optional, seed=1) == chat(seed=1)


def test_every_extension_arrives() -> None:
    sampling = chat(
        top_k=5, min_p=0.1, repetition_penalty=1.2, ignore_eos=True, min_tokens=2, stop_token_ids=[7, 8], stop="x",
        include_stop_str_in_output=True, skip_special_tokens=False, prompt_logprobs=3, logit_bias={"5": -100}, seed=9,
        max_tokens=4, presence_penalty=-2, frequency_penalty=2,
    ).sampling  # fmt: skip
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (5, 0.1, 1.2, 2)
    assert (sampling.stop_token_ids, sampling.stop, sampling.logit_bias) == ((7, 8), ("x",), {5: -100.0})
    assert (sampling.ignore_eos, sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (
        True,
        True,
        False,
    )
    assert (sampling.prompt_logprobs, sampling.seed, sampling.max_tokens) == (3, 9, 4)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 2.0)
    assert chat(top_k=-1).sampling.top_k == 0


def test_greedy() -> None:
    assert chat(temperature=0).sampling.temperature == 0
    nucleus_of_nothing = chat(top_p=0, temperature=1.5).sampling
    assert (nucleus_of_nothing.temperature, nucleus_of_nothing.top_p) == (0.0, 1.0)


def test_seeds() -> None:
    assert chat(seed=-1).sampling.seed == 2**63 - 1
    assert complete(["a", "b"], seed=3)[0].sampling.seed != complete(["a", "b"], seed=3)[1].sampling.seed
    assert complete(["a", "b"], seed=3)[0].sampling == complete("a", seed=3)[0].sampling


def test_limits_of_the_output() -> None:
    assert chat(max_tokens=9, max_completion_tokens=3).sampling.max_tokens == 3
    assert chat(max_completion_tokens=3).sampling.max_tokens == 3


def test_logprobs() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).sampling.logprobs == 5
    assert chat(logprobs=False).sampling.logprobs is None
    (harness,) = complete([[1, 2, 3]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    assert harness.prompt == TokensPrompt((1, 2, 3))
    assert harness.echo
    assert (harness.sampling.logprobs, harness.sampling.prompt_logprobs) == (1, 1)
    assert complete(logprobs=2)[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokensPrompt((1, 2))]),
        ([[1], [2, 3]], [TokensPrompt((1,)), TokensPrompt((2, 3))]),
    ],
)
def test_shapes_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    assert [each.prompt for each in complete(prompt)] == expected


def test_special_tokens_of_a_prompt() -> None:
    assert complete("a", add_special_tokens=False)[0].prompt == TextPrompt("a", add_special_tokens=False)


def test_messages_as_a_template_sees_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert rendered(
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ) == [
        {"role": "system", "content": "d", "name": "n"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": [call | {"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


def test_continuing_a_message() -> None:
    prompt = chat([USER, {"role": "assistant", "content": "so"}], continue_final_message=True).prompt
    assert isinstance(prompt, ChatPrompt)
    assert (prompt.continue_final_message, prompt.add_generation_prompt) == (True, False)
    with pytest.raises(InvalidRequest):
        chat(continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
    "field",
    [
        {"tool_choice": "auto"},
        {"function_call": "auto"},
        {"verbosity": "low"},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"structural_tag": {}},
        {"guided_decoding_backend": "outlines"},
        {"guided_whitespace_pattern": " "},
        {"use_beam_search": True},
        {"chat_template": "{{ x }}"},
        {"suffix": "x"},
    ],
)
def test_unserved_features_are_named(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**field)
    assert caught.value.param == next(iter(field))


@pytest.mark.parametrize(
    "field",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"user": "x", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "unheard_of": [1]},
        {"use_beam_search": False},
    ],
)
def test_what_asks_for_nothing_is_accepted(field: dict[str, Any]) -> None:
    assert chat(**field, seed=1) == chat(seed=1)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),  # it would make every score infinite
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": 2**80}}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [7]}, "messages[0]"),
    ],
)
def test_errors_name_the_field(field: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**field)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "prompt", [[], [[]], [-1], [2**31], [1.0], [True], [None], ["a", 1], {"a": 1}, 5, None, [[["a"]]]]
)
def test_prompts_that_are_none(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(prompt)
    assert caught.value.param == "prompt"


def test_limits_are_settings() -> None:
    tight = HttpSettings(max_n=2, max_prompts=2)
    for body, param in (({"prompt": "a", "n": 3}, "n"), ({"prompt": ["a"] * 3}, "prompt")):
        with pytest.raises(InvalidRequest) as caught:
            parse_completion({"model": "m", **body}, "id", tight)
        assert caught.value.param == param
    with pytest.raises(InvalidRequest):
        complete(best_of=2)
    assert complete(best_of=2, n=2)[0].n == 2


UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
letters = st.text("ab1- é", max_size=5)  # a small alphabet: building the tables of all of Unicode takes seconds
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | letters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    [
        *("model", "messages", "prompt", "n", "stop", "stream", "stream_options", "logit_bias", "seed", "tools"),
        *("temperature", "max_tokens", "logprobs", "top_logprobs", "echo", "best_of", "chat_template_kwargs"),
    ]
)


@UNTIMED
@given(st.dictionaries(field_names, json_values, max_size=6))
def test_any_body_is_parsed_or_refused(fields: dict[str, Any]) -> None:
    for parse, defaults in (
        (parse_chat, {"model": "m", "messages": [USER]}),
        (parse_completion, {"model": "m", "prompt": "x"}),
    ):
        try:
            _, made, _ = parse(defaults | fields, "id", SETTINGS)
        except InvalidRequest as error:
            refusal = answer_for(error).body()
        else:
            refusal = b""
            requests = made if isinstance(made, list) else [made]
            for request in requests:
                msgspec.msgpack.encode((request.prompt, request.sampling))
        assert len(refusal) < 4 * MESSAGE_LIMIT + 200


@UNTIMED
@given(st.binary(max_size=40))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(decode_object(body), dict)


def token(text: str, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(ord(text[0]), text, logprob, text.encode(), top)


def test_logprobs_are_finite() -> None:
    impossible = token("a", -math.inf, (token("b", 0.0), token("c", -math.inf)))
    assert chat_logprobs([impossible]).content[0].logprob == LOWEST
    assert chat_logprobs([impossible]).content[0].top_logprobs[1].logprob == LOWEST
    assert b"null" not in msgspec.json.encode(prompt_logprobs([impossible])[0]).replace(b'"rank":null', b"")


def test_a_chosen_token_is_among_its_alternatives() -> None:
    shape = CompletionLogprobs()
    end = shape.extend([None, token("a", -2.0, (token("b", -0.1),)), token("c", -0.3, (token("c", -0.3),))], 0, "x")
    assert shape.tokens == ["x", "a", "c"]
    assert shape.top_logprobs == [None, {"b": -0.1, "a": -2.0}, {"c": -0.3}]
    assert (shape.text_offset, end) == ([0, 1, 2], 3)


def test_tokens_that_read_the_same_keep_the_most_probable() -> None:
    shape = CompletionLogprobs()
    shape.extend([token("\ufffd", -3.0, (token("\ufffd", -0.2), token("\ufffd", -1.0)))], 0)
    assert shape.top_logprobs == [{"\ufffd": -0.2}]


def test_ranks_of_prompt_logprobs() -> None:
    (first, second) = prompt_logprobs([None, token("a", -2.0, (token("b", -0.1), token("c", -0.5)))])
    assert first is None
    assert second is not None
    assert {each.decoded_token: each.rank for each in second.values()} == {"b": 1, "c": 2, "a": None}
