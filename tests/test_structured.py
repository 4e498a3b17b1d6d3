"""From a request body to the grammar that its output must match, or a refusal that names the parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.chat_body import ChatBody
from serverlesslora.gateway.completions import CompletionBody, parse_completion
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.openai import GenerationBody, parse_body
from serverlesslora.gateway.structured import ANY_OBJECT, FIELDS, MAX_CHARACTERS, MAX_CHOICES, MAX_DEPTH, grammar_of
from serverlesslora_ipc.messages import Grammar

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"ä": {"type": "integer"}}}
TEXT = '{"type":"object","properties":{"ä":{"type":"integer"}}}'
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True, "description": "d"},
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        (dict.fromkeys(FIELDS), None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", ANY_OBJECT, "response_format")),
        ({"response_format": FORMAT}, ("json_schema", TEXT, "response_format.json_schema.schema")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a-b_1"}}},
            ("json_schema", ANY_OBJECT, "response_format.json_schema.schema"),
        ),
        ({"guided_json": SCHEMA}, ("json_schema", TEXT, "guided_json")),
        ({"guided_json": json.dumps(SCHEMA)}, ("json_schema", TEXT, "guided_json")),
        ({"guided_json": True}, ("json_schema", "true", "guided_json")),
        ({"guided_regex": "[a-z]+"}, ("regex", "[a-z]+", "guided_regex")),
        ({"guided_choice": ["yes", "ñ", ""]}, ("choice", '["yes", "ñ", ""]', "guided_choice")),
        ({"guided_grammar": 'root ::= "a"'}, ("gbnf", 'root ::= "a"', "guided_grammar")),
        ({"guided_grammar": 'start: "a"'}, ("lark", 'start: "a"', "guided_grammar")),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": None, "disable_any_whitespace": False}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"regex": "a"}}, ("regex", "a", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["a"]}}, ("choice", '["a"]', "structured_outputs.choice")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("lark", 'start: "a"', "structured_outputs.grammar")),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", ANY_OBJECT, "structured_outputs.json_object")),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, ("regex", "a", "guided_regex")),
    ],
)
def test_what_is_asked(fields: dict[str, Any], grammar: tuple[Any, str, str] | None) -> None:
    assert grammar_of(fields) == (None if grammar is None else Grammar(*grammar))
    body = {"model": "m", "prompt": "p", **fields}
    request, (generation,), _ = parse_completion(body, "id", HttpSettings())
    assert generation.sampling.grammar == grammar_of(fields)
    assert isinstance(request, CompletionBody)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": [1]}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        *(
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a", **wrong}}},
                f"response_format.json_schema.{next(iter(wrong))}",
            )
            for wrong in (
                {"name": ""},
                {"name": "a b"},
                {"name": "ä"},
                {"name": "x" * 65},
                {"name": 3},
                {"strict": "yes"},
                {"description": 3},
                {"schema": "{}"},
                {"schema": [1]},
                {"schema": deep(MAX_DEPTH + 1)},
                {"schema": {"enum": ["x" * MAX_CHARACTERS]}},
                {"schema": {"const": "\ud800"}},
            )
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_json": "x" * (MAX_CHARACTERS + 1)}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_json": '{"const": NaN}'}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_regex": "x" * (MAX_CHARACTERS + 1)}, "guided_regex"),
        ({"guided_regex": "\udfff"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": ["yes", 1]}, "guided_choice"),
        ({"guided_choice": ["x"] * (MAX_CHOICES + 1)}, "guided_choice"),
        ({"guided_grammar": {}}, "guided_grammar"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.disable_any_whitespace"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structural_tag": {}}, "structural_tag"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion({"model": "m", "prompt": "p", **fields}, "id", HttpSettings())
    assert caught.value.param == param
    assert caught.value.status == 400
    assert len(caught.value.message) < 1000


def test_the_deepest_schema_and_both_kinds_of_bodies() -> None:
    assert grammar_of({"guided_json": deep(MAX_DEPTH)}) is not None
    for kind in (ChatBody, CompletionBody):
        assert issubclass(kind, GenerationBody)
        rest = {"messages": [{"role": "user", "content": "x"}], "prompt": "p"}
        assert parse_body({"model": "m", "response_format": FORMAT, **rest}, kind, max_n=1).response_format == FORMAT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.sampled_from(
    ["type", "json_schema", "name", "schema", "strict", "json", "regex", "choice", "grammar", "text"]
)
SHAPES = JSON | st.dictionaries(WORDS, JSON | st.dictionaries(WORDS, JSON, max_size=3), max_size=3)


@given(st.dictionaries(st.sampled_from(FIELDS), SHAPES, max_size=3))
def test_whatever_comes_is_read_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        grammar = grammar_of(fields)
    except InvalidRequest as error:
        grammar, param = None, error.param
    else:
        param = None if grammar is None else grammar.param
    assert param is None or param.split(".")[0] in FIELDS
    if grammar is not None:
        assert param is not None
        grammar.text.encode()
        if grammar.kind in ("json_schema", "choice"):
            json.loads(grammar.text)


@given(JSON)
def test_a_schema_means_the_same_as_object_and_as_text(schema: Any) -> None:
    if not isinstance(schema, (dict, bool)):
        return
    try:
        grammar = grammar_of({"guided_json": schema})
    except InvalidRequest:
        return
    assert grammar is not None
    assert json.loads(grammar.text) == schema
    assert grammar_of({"guided_json": grammar.text}) == grammar
