"""Strict calls of a model that is free to make them: what each format's grammar lets through, by the very reader."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.engine.constraint import CompiledGrammar, Grammars
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.tool_grammar import in_lark
from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.tools.offer import FunctionObject, Offer, Tool, offer_of
from serverlesslora.gateway.tools.speech import Dialect, Said, Speech, joined
from serverlesslora_ipc.messages import Grammar
from tests.fakes import byte_tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "next": {"$ref": "#/$defs/day"}},
    "required": ["city", "next"],
    "additionalProperties": False,
    "$defs": {"day": {"enum": ["mo", "tu"]}},
}
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>",
    "llama3_json": "{{ tools }}<|python_tag|>",
    "mistral": "{{ tools }}[TOOL_CALLS]",
    "functionary": "{{ tools }}<function=",
    "deepseek": "{{ tools }}<｜tool▁calls▁begin｜>",
}
MARKS = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"]


def offer() -> Offer:
    strict = FunctionObject("weather", None, CITY, True)
    free = FunctionObject("note", None, {"properties": {"text": {"type": "string"}}, "required": ["text"]})
    made = offer_of([Tool("function", strict), Tool("function", free)], None, parallel=True)
    assert made is not None
    return made


def codec(tool_format: str, *, specials: bool = False) -> TextCodec:
    tokenizer = byte_tokenizer()
    if specials:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return TextCodec(tokenizer, template=TEMPLATES[tool_format])


def compiled(tool_format: str, *, answer: Any = None, specials: bool = False) -> CompiledGrammar:
    grammar = offer().grammar
    assert grammar is not None and grammar.kind == "tools"
    if answer is not None:
        grammar = Grammar("tools", json.dumps(json.loads(grammar.text) | {"answer": answer}), grammar.param)
    return Grammars().compile(grammar, codec(tool_format, specials=specials))


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Whether a model may write this and then end."""
    matcher = grammar.matcher.deep_copy()
    ids = grammar.words.vocabulary.tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def said(tool_format: str, text: str) -> Said:
    return joined(Speech(offer(), Dialect(tool_format)).end(text))


GOOD = '{"city": "Ulm", "next": "mo"}'
WRONG = ['{"city": 7, "next": "mo"}', '{"city": "Ulm"}', '{"city": "Ulm", "next": "we"}', '{"town": "Ulm"}']
# As each format writes a call of a function with these arguments.
CALLS: dict[str, str] = {
    "hermes": '<tool_call>\n{{"name": "{0}", "arguments": {1}}}\n</tool_call>',
    "llama3_json": '{{"name": "{0}", "parameters": {1}}}',
    "mistral": '[TOOL_CALLS][{{"name": "{0}", "arguments": {1}}}]',
    "functionary": "<function={0}>{1}</function>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{0}"
    "\n```json\n{1}\n```<｜tool▁call▁end｜>",
}
OTHER_WAYS = {
    "llama3_json": ["Let me see. <|python_tag|>" + CALLS["llama3_json"], " \n" + CALLS["llama3_json"] + "; "],
    "mistral": ["x[TOOL_CALLS]{0}[ARGS]{1}", "[TOOL_CALLS]{0}[CALL_ID]abc123def[ARGS]{1}"],
    "deepseek": ["x<｜tool▁call▁begin｜>{0}<｜tool▁sep｜>{1}<｜tool▁call▁end｜>"],
}


@pytest.mark.parametrize("specials", [False, True])
@pytest.mark.parametrize("tool_format", CALLS)
def test_a_call_fits_its_schema_or_is_not_written(tool_format: str, specials: bool) -> None:
    grammar = compiled(tool_format, specials=specials)
    ways = [CALLS[tool_format], *(way for way in OTHER_WAYS.get(tool_format, ()) if not way.endswith("; "))]
    for way in ways:
        call = way.format("weather", GOOD)
        assert accepts(grammar, call), call
        assert [each.name for each in said(tool_format, call).calls] == ["weather"]
        assert json.loads(said(tool_format, call).calls[0].arguments) == json.loads(GOOD)
        assert accepts(grammar, way.format("note", '{"text": "a", "more": [1]}'))
        assert not accepts(grammar, way.format("nobody", "{}"))
        for wrong in WRONG:
            assert said(tool_format, way.format("weather", wrong)).calls  # it would have been taken for a call
            assert not accepts(grammar, way.format("weather", wrong)), wrong
        assert not accepts(grammar, call[:-14])  # begun, it is brought to its end


@pytest.mark.parametrize("tool_format", CALLS)
def test_without_a_call_the_model_says_what_it_likes(tool_format: str) -> None:
    grammar = compiled(tool_format)
    for text in ("", "Hello! <b>1 < 2</b>", "[1, 2]", "  \n", "ünï {x} [TOOL", "a\n\n{}"):
        assert accepts(grammar, text), text


@pytest.mark.parametrize("tool_format", ["hermes", "mistral", "functionary", "deepseek"])
def test_words_and_calls_in_turn(tool_format: str) -> None:
    grammar, call = compiled(tool_format), CALLS[tool_format].format("weather", GOOD)
    assert accepts(grammar, f"First {call} then\n{call}")
    assert not accepts(grammar, f"First {call} then\n{CALLS[tool_format].format('weather', WRONG[0])}")


def test_several_calls_without_a_mark() -> None:
    grammar, call = compiled("llama3_json"), CALLS["llama3_json"].format("weather", GOOD)
    bad = CALLS["llama3_json"].format("weather", WRONG[0])
    assert accepts(grammar, f"{call}; {call}")
    for text in (f"{call}; {bad}", f"{call}, {bad}", f"{call} {bad}", f"[{bad}]", f"[ {bad}"):
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("tool_format", CALLS)
def test_an_answer_with_a_schema_of_its_own(tool_format: str) -> None:
    grammar = compiled(tool_format, answer={"type": "object", "properties": {"x": {"type": "integer"}},
                                            "required": ["x"], "additionalProperties": False})  # fmt: skip
    assert accepts(grammar, '{"x": 1}')
    assert accepts(grammar, CALLS[tool_format].format("weather", GOOD))
    for text in ("", "Hello", '{"x": "1"}', f'{{"x": 1}} {CALLS[tool_format]}', CALLS[tool_format].format("f", "{}")):
        assert not accepts(grammar, text), text


def test_formats_that_cannot_be_held_to_it() -> None:
    grammar = offer().grammar
    assert grammar is not None
    for tool_format in ("qwen3_coder", "pythonic", ""):
        with pytest.raises(InvalidRequest) as refused:
            in_lark(grammar, tool_format, codec("hermes").vocabulary)
        assert (refused.value.param, refused.value.code) == ("tools[0].function.strict", "unsupported_parameter")


def test_templates_that_share_a_vocabulary_do_not_share_their_grammars() -> None:
    grammars, grammar = Grammars(), offer().grammar
    assert grammar is not None
    one = codec("hermes")
    other = TextCodec(one.tokenizer, template=TEMPLATES["functionary"], vocabulary=one.vocabulary)
    assert not accepts(grammars.compile(grammar, one), CALLS["hermes"].format("weather", "{}"))
    assert accepts(grammars.compile(grammar, other), CALLS["hermes"].format("weather", "{}"))


@pytest.mark.parametrize("tool_format", CALLS)
@given(data=st.data())
def test_whatever_a_grammar_lets_through_is_read_as_calls_that_fit(tool_format: str, data: st.DataObject) -> None:
    """A writer that chooses among what is allowed, often a piece of a call; the reader judges what came of it."""
    grammar = _KEPT[tool_format]
    matcher = grammar.matcher.deep_copy()
    parts = [CALLS[tool_format].format("weather", GOOD), CALLS[tool_format].format("note", '{"text": ""}')]
    pieces = st.sampled_from(["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<function=", '{"name": "weather"', "; ",
                              '"', "7", " ", "x", "}", "{", "[", '"city": ', *parts])  # fmt: skip
    text = ""
    for character in "".join(data.draw(st.lists(pieces, max_size=8))):
        ids = grammar.words.vocabulary.tokenizer.encode(character, add_special_tokens=False)
        if matcher.try_consume_tokens(ids) == len(ids):
            text += character
    heard = said(tool_format, text)
    if matcher.is_accepting():
        for call in heard.calls:
            schema = CITY if call.name == "weather" else {"type": "object"}
            jsonschema.validate(json.loads(call.arguments), schema)


_KEPT = {tool_format: compiled(tool_format) for tool_format in CALLS}
