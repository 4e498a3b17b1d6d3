"""What models write, family by family, taken apart into content, reasoning and calls, however it is cut."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.engine.dialect import dialect_of
from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.tools.formats import FORMATS
from serverlesslora.gateway.tools.offer import (
    AllowedChoice,
    AllowedTools,
    FunctionChoice,
    FunctionObject,
    NamedChoice,
    NamedTool,
    Offer,
    Tool,
    calls_schema,
    legacy_offer,
    offer_of,
)
from serverlesslora.gateway.tools.reader import CallArguments, CallBegun, Content, Piece, Reader, Reasoning
from serverlesslora.gateway.tools.speech import Dialect, Said, Speech, SpokenCall, joined

SCHEMAS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}},
    "g": {"type": "object"},
}
OFFER = Offer((), SCHEMAS)
THINK = ("<think>", "</think>")


def hear(speech: Speech, pieces: list[str]) -> list[Piece]:
    said: list[Piece] = []
    for piece in pieces:
        said += speech.feed(piece)
    return said + speech.end()


def whole(text: str, tool_format: str, offer: Offer | None = OFFER, **dialect: Any) -> Said:
    return joined(Speech(offer, Dialect(tool_format, **dialect)).end(text))


def both_ways(text: str, tool_format: str, offer: Offer | None = OFFER, **dialect: Any) -> Said:
    """The whole, after it was found the same cut in two at every place and cut everywhere."""
    said = whole(text, tool_format, offer, **dialect)
    cuts = [[text[:place], text[place:]] for place in range(len(text) + 1)] + [list(text)]
    for cut in cuts:
        assert joined(hear(Speech(offer, Dialect(tool_format, **dialect)), cut)) == said, cut
    return said


HARD = '{"s": "a}</tool_call>\\" {[ é😀 \\\\", "n": [{"x": {}}, 1.5e3, null]}'
# format, text, content, calls
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"s": "x"}}\n</tool_call>', "", [("f", '{"s": "x"}')]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {HARD}}}</tool_call>', "", [("f", HARD)]),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\n'
        '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>\n',
        "Let me see.\n",
        [("f", "{}"), ("g", '{"a": 1}')],
    ),
    ("hermes", '<tool_call>{"id": [1, {"a": "}"}], "name": "g"}</tool_call> done', " done", [("g", "{}")]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [("g", "{}")]),
    ("hermes", '<tool_call>[{"name": "g"}, {"name": "f"}]</tool_call>', "", [("g", "{}"), ("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "cut o', "", [("f", '{"s": "cut o')]),
    ("hermes", '<tool_call>{"name": "g", "arguments": {"a": 1}}', "", [("g", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "g", "arguments": {"a": 1</tool_call> on', " on", [("g", '{"a": 1')]),
    ("llama3_json", '{"name": "f", "parameters": {"s": "é😀"}}', "", [("f", '{"s": "é😀"}')]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "g", "parameters": {}}', "", [("g", "{}")]),
    ("llama3_json", '\n{"name": "g"}; {"name": "f", "parameters": {"n": 1}}', "", [("g", "{}"), ("f", '{"n": 1}')]),
    ("llama3_json", 'Sure. <|python_tag|>{"name": "g", "parameters": {}}', "Sure. ", [("g", "{}")]),
    ("llama3_json", '{"name": "g"} and more', " and more", [("g", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"s": "]"}}, {"name": "g", "arguments": {}}]', "",
     [("f", '{"s": "]"}'), ("g", "{}")]),
    ("mistral", 'Now:[TOOL_CALLS]f[ARGS]{"s": "x"}[TOOL_CALLS]g[CALL_ID]abcdef123[ARGS]{}', "Now:",
     [("f", '{"s": "x"}'), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS]g{"a": 1}', "", [("g", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS][{"name": "g", "arguments": {}}, oops', ", oops", [("g", "{}")]),
    ("pythonic", '[f(s="a)\\"b, [", n=-3), g(a=[1, {"x": True}], b=None)]', "",
     [("f", '{"s": "a)\\"b, [", "n": -3}'), ("g", '{"a": [1, {"x": true}], "b": null}')]),
    ("pythonic", "<|python_start|>[g()]<|python_end|>", "", [("g", "{}")]),
    ("pythonic", "[f(s='\\d é'), g(1)] x", ", g(1)] x", [("f", '{"s": "\\\\d é"}')]),
    ("qwen3_coder",
     'Sure.\n<tool_call>\n<function=f>\n<parameter=s>\nprint("1")\n</par\n</parameter>\n<parameter=n>\n42\n</parameter>'
     "\n</function>\n</tool_call>",
     "Sure.\n", [("f", '{"s": "print(\\"1\\")\\n</par", "n": 42}')]),
    ("qwen3_coder", "<function=g>\n<parameter=a>[1, 2]</parameter><parameter=b>two words</parameter></function>", "",
     [("g", '{"a": [1, 2], "b": "two words"}')]),
    ("qwen3_coder", "<tool_call><function=g></function></tool_call><tool_call><function=f><parameter=n>True</parameter>"
     "</function></tool_call>", "", [("g", "{}"), ("f", '{"n": true}')]),
    ("qwen3_coder", "<tool_call><function=f><parameter=s>half a val", "", [("f", '{"s": "half a val')]),
    ("deepseek",
     "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"s\": \"a\"}\n```"
     "<｜tool▁call▁end｜>\n"
     "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{\"q\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
     "x", [("f", '{"s": "a"}'), ("g", '{"q": 1}')]),
    ("functionary", 'a <function=f>{"s": "</function>"}</function>', "a ", [("f", '{"s": "</function>"}')]),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), ANSWERS)
def test_answers_of_each_family(tool_format: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    said = both_ways(text, tool_format)
    assert (said.content, list(said.calls)) == (content, calls)


NO_CALLS = [
    ("hermes", "plain words, <b>bold</b> and a < b"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> on'),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": 7}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "not json"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f"'),
    ("hermes", "</tool_call> and <tool_call"),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", "  \n{1, 2} is a set"),
    ("llama3_json", '<|python_tag|>print("x")'),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS]f[ARGS]"),
    ("mistral", "[TOOL_CALLS]h[ARGS]{}"),
    ("pythonic", "[1, 2, 3] is a list"),
    ("pythonic", "[f(x)]"),
    ("pythonic", "[f(a=open('x'))]"),
    ("pythonic", "[f(a=1"),
    ("pythonic", "[f(**{'a': 1})]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a='\\ud800')]"),
    ("pythonic", f"[f(a={'[' * 300}{']' * 300})]"),
    ("qwen3_coder", "<tool_call>\n<function=h></function></tool_call>"),
    ("qwen3_coder", "<function=f"),
    ("deepseek", "<｜tool▁call▁begin｜>h<｜tool▁sep｜>{}"),
    ("deepseek", "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> x"),
    ("functionary", '<function=h>{"a": 1}</function>'),
    ("", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
    ("hermes", " \n "),
    ("hermes", ""),
]


@pytest.mark.parametrize(("tool_format", "text"), NO_CALLS)
def test_what_is_no_call_is_content_to_the_letter(tool_format: str, text: str) -> None:
    assert both_ways(text, tool_format) == Said(text, "", ())


def test_content_does_not_wait_and_calls_come_part_by_part() -> None:
    speech = Speech(OFFER, Dialect("hermes"))
    assert speech.feed("Hello") == [Content("Hello")]
    assert speech.feed(" <") == [Content(" ")]
    assert speech.feed("b> ") == [Content("<b> ")]
    assert speech.feed("<tool_call>\n{") == []
    assert speech.feed('"name": "f", "argum') == []
    assert speech.feed('ents": {"s": "a') == [CallBegun(0, "f"), CallArguments(0, '{"s": "a')]
    assert speech.feed("b") == [CallArguments(0, "b")]
    assert speech.feed('"}}\n</tool') == [CallArguments(0, '"}')]
    assert speech.feed("_call>") == []
    assert speech.end() == []


@pytest.mark.parametrize("tool_format", ["", *FORMATS])
def test_the_first_word_never_waits(tool_format: str) -> None:
    speech = Speech(OFFER, Dialect(tool_format, THINK))
    assert speech.feed("Hello") == [Content("Hello")]


def test_string_parameters_in_tags_come_part_by_part() -> None:
    speech = Speech(OFFER, Dialect("qwen3_coder"))
    speech.feed("<tool_call><function=f><parameter=s>\nline 1")
    assert speech.feed("\nline") == [CallArguments(0, "\\nline")]


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nhm, <b>\n</think>\n\nYes.", False, "hm, <b>", "Yes."),
        ("\n<think>hm</think>Yes.", False, "hm", "Yes."),
        ("hm\n</think>\nYes. <think>no</think>", True, "hm", "Yes. <think>no</think>"),
        ("hm, still at it </thin", True, "hm, still at it </thin", ""),
        ("<think>", False, "", ""),
        ("</think>Yes", True, "", "Yes"),
        ("No thought. <think>a tag</think>", False, "", "No thought. <think>a tag</think>"),
        ("<thin air", False, "", "<thin air"),
        (" \n ", False, "", " \n "),
    ],
)
def test_reasoning_stands_apart(text: str, is_open: bool, reasoning: str, content: str) -> None:
    for offer in (None, OFFER):
        said = both_ways(text, "hermes", offer, reasoning_tags=THINK, reasoning_open=is_open)
        assert said == Said(content, reasoning, ())


def test_reasoning_then_a_call() -> None:
    text = '<think>I <tool_call>{"name": "f"}</tool_call> will</think>\n<tool_call>{"name": "g"}</tool_call>'
    said = both_ways(text, "hermes", reasoning_tags=THINK)
    assert said == Said("", 'I <tool_call>{"name": "f"}</tool_call> will', (SpokenCall("g", "{}"),))


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<function=", "</function>"),
    *("<parameter=s>", "</parameter>", "<think>", "</think>", "<|python_start|>", "<｜tool▁calls▁begin｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "function", "```json"),
    *('{"name": "f", "arguments": ', '{"s": "x"}', '"name"', '"arguments"', "null", "a=1", "f", "g", "word", "é😀"),
    *('"', ":", ",", ";", " ", "\n", "(", ")", "[", "]", "{", "}", "<", ">", "\\"),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.data())
def test_any_text_is_heard_the_same_however_it_is_cut(fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    for tool_format in ("", *FORMATS):
        tags, is_open = data.draw(st.sampled_from([(None, False), (THINK, False), (THINK, True)]))
        dialect = Dialect(tool_format, tags, is_open)
        said = joined(Speech(OFFER, dialect).end(text))
        places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
        cut = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert joined(hear(Speech(OFFER, dialect), cut)) == said
        if not said.calls and tags is None:
            assert said.content == text


@pytest.mark.parametrize("tool_format", FORMATS)
def test_a_text_of_nothing_but_beginnings_costs_little(tool_format: str) -> None:
    marks = '<tool_call>{"arguments": {"a": [TOOL_CALLS][{"arguments": "[f(<|python_start|>[f('
    assert joined(hear(Speech(OFFER, Dialect(tool_format)), [marks] * 1500)).content == marks * 1500


def test_a_name_that_never_ends_is_looked_at_once() -> None:
    class Counting:
        looked_at = 0

        def match(self, text: str, place: int) -> re.Match[str] | None:
            self.looked_at += len(text) - place
            return re.compile(r"\w+").match(text, place)

    pattern: Any = Counting()
    reader = Reader()
    steps = reader._run(pattern)
    for _ in range(1000):
        reader.add("ab")
        next(steps)
    assert pattern.looked_at == 2000


# --- what a request offers ---------------------------------------------------------------------------------------


def tool(name: str, parameters: dict[str, Any] | None = None, *, strict: bool | None = None) -> Tool:
    return Tool("function", FunctionObject(name, None, parameters, strict))


def named(name: str) -> NamedTool:
    return NamedTool("function", FunctionChoice(name))


def test_a_required_call_is_a_list_of_calls_that_fit_their_schemas() -> None:
    node = {"$defs": {"T": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/T"}, "next": {"$ref": "#"}}}
    word = {"$defs": {"T": {"type": "string"}}, "properties": {"x": {"$ref": "#/$defs/T"}}, "required": ["x"]}
    offer = offer_of([tool("node", node), tool("word", word), tool("none")], "required", parallel=True)
    assert offer is not None and offer.grammar is not None
    schema = json.loads(offer.grammar.text)
    validator = jsonschema.Draft202012Validator(schema)

    def fits(*calls: Any) -> bool:
        return bool(validator.is_valid([{"name": name, "parameters": parameters} for name, parameters in calls]))

    assert fits(("node", {"x": 1, "next": {"x": 2}}), ("word", {"x": "a"}), ("none", {}))
    assert not fits()
    assert not fits(("node", {"x": "a"}))
    assert not fits(("node", {"x": 1, "next": {"x": "a"}}))
    assert not fits(("word", {}))
    assert not fits(("none", {"x": 1}))
    assert not fits(("other", {}))
    one = calls_schema(offer.schemas, parallel=False)
    assert not jsonschema.Draft202012Validator(one).is_valid([{"name": "none", "parameters": {}}] * 2)


def test_a_named_call_is_its_arguments() -> None:
    offer = offer_of([tool("f", SCHEMAS["f"]), tool("g")], NamedChoice(FunctionChoice("f")), parallel=True)
    assert offer is not None and offer.grammar is not None
    assert json.loads(offer.grammar.text) == SCHEMAS["f"]
    assert both_ways('{"s": "x"}', "", offer) == Said("", "", (SpokenCall("f", '{"s": "x"}'),))
    assert both_ways("", "", offer) == Said("", "", ())
    assert offer.finish_reason("stop", has_called=True) == "stop"  # as OpenAI


def test_a_required_call_is_read_from_the_list() -> None:
    offer = Offer((), SCHEMAS, is_required=True)
    text = '[{"name": "f", "parameters": {"s": "]"}}, {"name": "g", "parameters": {}}]'
    assert both_ways(text, "", offer).calls == (SpokenCall("f", '{"s": "]"}'), SpokenCall("g", "{}"))
    assert both_ways(text[:33], "", offer).calls == (SpokenCall("f", '{"s"'),)
    assert both_ways(text[:10], "", offer) == Said(text[:10], "", ())
    assert offer.finish_reason("stop", has_called=True) == "tool_calls"
    assert offer.finish_reason("length", has_called=True) == "length"
    assert offer.finish_reason("stop", has_called=False) == "stop"


def test_at_most_one_call_where_one_was_asked_for() -> None:
    offer = OFFER._replace(parallel=False)
    text = '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>'
    assert both_ways(text, "hermes", offer).calls == (SpokenCall("f", "{}"),)


def test_allowed_tools_narrow_what_may_be_called() -> None:
    choice = AllowedChoice(AllowedTools("auto", [named("f")]))
    offer = offer_of([tool("f"), tool("g", strict=True)], choice, parallel=True)
    assert offer is not None
    assert (len(offer.tools), list(offer.schemas), offer.grammar) == (2, ["f"], None)
    required = offer_of([tool("f"), tool("g")], AllowedChoice(AllowedTools("required", [named("g")])), parallel=True)
    assert required is not None and required.is_required
    assert list(required.schemas) == ["g"]


def test_the_prompt_has_what_the_client_wrote() -> None:
    offer = offer_of([tool("f", SCHEMAS["f"], strict=False), tool("g")], None, parallel=True)
    assert offer is not None
    assert list(offer.tools) == [
        {"type": "function", "function": {"name": "f", "parameters": SCHEMAS["f"]}},
        {"type": "function", "function": {"name": "g"}},
    ]
    assert offer_of([tool("f")], "none", parallel=True) is None
    assert offer_of([], "auto", parallel=True) is None


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        (None, "required", "tool_choice"),
        (None, "auto", "tool_choice"),
        ([tool("f")], NamedChoice(FunctionChoice("g")), "tool_choice"),
        ([tool("f")], AllowedChoice(AllowedTools("auto", [named("g")])), "tool_choice.allowed_tools"),
        ([tool("f")], AllowedChoice(AllowedTools("auto", [])), "tool_choice.allowed_tools"),
        ([tool("f"), tool("f")], None, "tools[1]"),
        ([tool("f", {"type": "array"})], None, "tools[0].function.parameters"),
    ],
)
def test_offers_that_are_refused(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        offer_of(tools, choice, parallel=True)
    assert caught.value.param == param


def test_a_strict_function_that_must_be_called_is_served() -> None:
    strict = [tool("f", SCHEMAS["f"], strict=True)]
    for choice in ("required", NamedChoice(FunctionChoice("f"))):
        assert offer_of(strict, choice, parallel=True) is not None


def test_functions_are_tools_by_their_older_name() -> None:
    functions = [FunctionObject("f"), FunctionObject("g")]
    offer = legacy_offer(functions, None)
    assert offer is not None
    assert (offer.is_legacy, offer.parallel) == (True, False)
    assert offer.finish_reason("stop", has_called=True) == "function_call"
    forced = legacy_offer(functions, FunctionChoice("g"))
    assert forced is not None and forced.forced == "g"
    assert legacy_offer(functions, "none") is None
    for given_, choice in ((None, FunctionChoice("f")), (functions, FunctionChoice("h"))):
        with pytest.raises(InvalidRequest) as caught:
            legacy_offer(given_, choice)
        assert caught.value.param == "function_call"


# --- what templates teach ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ("{% for t in tools %}{% endfor %}<tool_call>\n{\"name\": <function-name>}\n</tool_call>", "hermes"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]{{ call|tojson }}", "mistral"),
        ('{% if tools %}{"name": function name, "parameters": dictionary of argument name and its value}{% endif %}',
         "llama3_json"),
        ("{% if tools %}{{ '<|python_tag|>' }}{% endif %}", "llama3_json"),
        ("{% if tools %}[func_name1(params_name1=params_value1), func_name2(params)]{% endif %}", "pythonic"),
        ("{% if tools %}<tool_call>\n<function=example>\n<parameter=one>{% endif %}", "qwen3_coder"),
        ("{% if tools %}<function=example_function_name>{args}</function>{% endif %}", "functionary"),
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}", "deepseek"),
        ("{% if tools %}<tool_call>{name}<arg_key>k</arg_key>{% endif %}", ""),
        ("{% if tools %}something of its own{% endif %}", ""),
        ("{{ messages }}", "hermes"),  # it takes no tools: it is told about them in words
        (None, ""),
    ],
)  # fmt: skip
def test_the_format_is_read_from_the_template(template: str | None, tool_format: str) -> None:
    dialect = dialect_of(template)
    assert dialect.tool_format == tool_format
    assert dialect.reasoning_tags is None
    assert tool_format in ("", *FORMATS)
    assert (tool_format in ("", "functionary")) == (not dialect.tool_marks)


def test_the_tags_of_reasoning_are_read_from_the_template() -> None:
    assert dialect_of("{{ content.split('</think>')[-1] }}").reasoning_tags == THINK
    dialect = dialect_of({"default": "{{ messages }}", "tool_use": "{% if tools %}<think>{% endif %}"})
    assert dialect.reasoning_tags == THINK
    assert dialect.is_open("<|assistant|><think>\n")
    assert not dialect.is_open("<|assistant|><think>\n\n</think>\n\n")
    assert not any(isinstance(piece, Reasoning) for piece in Speech(None, Dialect()).end("<think>x</think>"))
