"""Calls that must fit their schemas from a model that is free to make them: a grammar of free text with calls in it.

A call begins with a mark of the format that the chat template teaches. From there on the output is held to the schemas
until the call is complete; then it is free again. llguidance's lazy lexemes, which end as soon as they match, see to it
that no mark is passed over as text; the idea is its `StructTag`. Marks that are special tokens are followed as tokens
and, because who reads the answer sees only text, also where they are spelled with other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from serverlesslora.engine.grammar_sources import WHITESPACE
from serverlesslora.errors import InvalidRequest
from serverlesslora_ipc.messages import Grammar

if TYPE_CHECKING:
    from serverlesslora.engine.vocabulary import Vocabulary

_ANYTHING = r"(.|\n)*"
_BLANK = r"[ \t\r\n]{0,32}"
# A text that is not read as a call in the format whose calls need no mark where the answer begins with them.
_NO_BARE_CALL = r"[ \t\r\n]*([^ \t\r\n\[{](.|\n)*|\[[ \t\r\n]*([^ \t\r\n{](.|\n)*)?)?"


def in_lark(grammar: Grammar, tool_format: str, vocabulary: Vocabulary) -> Grammar:
    """A grammar of kind "tools" with its text in Lark. Raises InvalidRequest for a format that cannot be held to it.

    Its text is `{"functions": {name: schema}, "$defs": {...}}`, and `"answer"`: the schema of an answer without a call.
    """
    kind = _FORMATS.get(tool_format)
    if kind is None:
        raise InvalidRequest(
            "The way in which this model writes calls cannot be constrained while it is free to make them or not. "
            "Leave this out, or set 'tool_choice' to \"required\" or to one function.",
            param=grammar.param,
            code="unsupported_parameter",
        )
    asked = json.loads(grammar.text)
    rules = _Rules(vocabulary, asked["functions"], asked["$defs"])
    answer = asked.get("answer")
    plain = _NO_BARE_CALL if kind.is_bare else _ANYTHING
    rules.lines.append(f"TEXT: /{plain if answer is None else _BLANK}/")
    calls = kind.body(rules)
    rules.lines.append(f"tag: {' | '.join(f'{rules.up_to(mark)} {body}' for mark, body in calls)}")
    others = "TEXT" if answer is None else rules.json(answer)
    if kind.is_bare:
        start = f"BLANK {calls[0].body} | tag | {others}"
    else:
        start = "tag* TEXT" if answer is None else f"tag+ TEXT | {others}"
    return Grammar("tools", "\n".join(("%llguidance {}", f"start: {start}", *rules.lines)), grammar.param)


class _Tag(NamedTuple):
    mark: str
    body: str  # what must follow the mark


class _Rules:
    def __init__(self, vocabulary: Vocabulary, functions: Mapping[str, Any], definitions: Mapping[str, Any]) -> None:
        self.lines = [f"BLANK: /{_BLANK}/"]
        self.functions = functions
        self._definitions = definitions
        self._vocabulary = vocabulary

    def mark(self, mark: str) -> str:
        """The mark itself."""
        token = self._token(mark)
        return _quoted(mark) if token is None else f"({_quoted(mark)} | {token})"

    def up_to(self, mark: str) -> str:
        """Text that ends with the mark, the first in it."""
        spelled = self.rule(f"TEXT {_quoted(mark)}", "[lazy]")
        token = self._token(mark)
        return spelled if token is None else f"({spelled} | TEXT {token})"

    def call(self, arguments: str) -> str:
        """A JSON object with the name of a function and, under `arguments`, what it is called with."""
        return self.json(
            {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"name": {"const": name}, arguments: schema},
                        "required": ["name", arguments],
                        "additionalProperties": False,
                    }
                    for name, schema in self.functions.items()
                ],
                "$defs": self._definitions,
            }
        )

    def arguments(self, schema: Mapping[str, Any]) -> str:
        return self.json({**schema, "$defs": self._definitions})

    def json(self, schema: Any) -> str:
        if schema is False:
            schema = {"anyOf": []}
        options = {"whitespace_pattern": WHITESPACE, "lenient": False}
        return self.rule(f"%json {json.dumps({} if schema is True else schema | {'x-guidance': options})}")

    def any_of(self, each: Callable[[str, Mapping[str, Any]], str]) -> str:
        return self.rule(" | ".join(each(name, schema) for name, schema in self.functions.items()))

    def _token(self, mark: str) -> str | None:
        """The mark as one special token, which no text has in it."""
        if not self._vocabulary.has(mark):
            return None
        token_id = self._vocabulary.tokenizer.convert_tokens_to_ids(mark)
        return f"<[{token_id}]>" if self._vocabulary.is_special(token_id) else None

    def rule(self, body: str, attribute: str = "") -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{attribute}: {body}")
        return name


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- formats, as `gateway.tools.formats` reads them --------------------------------------------------------------


def _hermes(rules: _Rules) -> list[_Tag]:
    return [_Tag("<tool_call>", f"BLANK {rules.call('arguments')} BLANK {rules.mark('</tool_call>')}")]


def _llama3_json(rules: _Rules) -> list[_Tag]:
    call = rules.call("parameters")
    return [_Tag("<|python_tag|>", f'BLANK {call} (BLANK ";" BLANK {call})* BLANK')]


def _mistral(rules: _Rules) -> list[_Tag]:
    call, begin, call_id = rules.call("arguments"), rules.mark("[ARGS]"), rules.mark("[CALL_ID]")
    rules.lines.append("ID: /[a-zA-Z0-9]{1,40}/")
    by_name = rules.any_of(
        lambda name, schema: f"{_quoted(name)} ({call_id} ID)? {begin} BLANK {rules.arguments(schema)}"
    )
    return [_Tag("[TOOL_CALLS]", f'BLANK ("[" BLANK {call} BLANK ("," BLANK {call} BLANK)* "]" | {by_name})')]


def _functionary(rules: _Rules) -> list[_Tag]:
    by_name = rules.any_of(lambda name, schema: f"{_quoted(f'{name}>')} BLANK {rules.arguments(schema)}")
    return [_Tag("<function=", f"{by_name} BLANK {rules.mark('</function>')}")]


def _deepseek(rules: _Rules) -> list[_Tag]:
    begin, end = "<｜tool▁call▁begin｜>", rules.mark("<｜tool▁call▁end｜>")
    separator = rules.mark("<｜tool▁sep｜>")
    fence, fence_end = "\n```json\n", _quoted("\n```")
    fenced = rules.any_of(lambda name, schema: f"{_quoted(name + fence)} {rules.arguments(schema)} {fence_end}")
    plain = rules.any_of(lambda name, schema: f"{_quoted(name)} {separator} BLANK {rules.arguments(schema)}")
    call = rules.rule(f'("function" {separator} {fenced} | {plain}) BLANK {end}')
    return [_Tag("<｜tool▁calls▁begin｜>", f"BLANK {rules.mark(begin)} {call}"), _Tag(begin, call)]


class _Format(NamedTuple):
    body: Callable[[_Rules], list[_Tag]]
    is_bare: bool = False  # an answer may begin with a call that has no mark


_FORMATS: Mapping[str, _Format] = {
    "hermes": _Format(_hermes),
    "llama3_json": _Format(_llama3_json, is_bare=True),
    "mistral": _Format(_mistral),
    "functionary": _Format(_functionary),
    "deepseek": _Format(_deepseek),
}
