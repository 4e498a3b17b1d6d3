"""A request's grammar as llguidance reads it, and refusals of what would take too long to compile.

llguidance bounds its own work with fuel, with one exception that was measured: `multipleOf` becomes an automaton with
as many states as the least common multiple of all of them, whatever the fuel (99,991: half a second; ten times that:
nine seconds). It is bounded here, also where a schema is part of another grammar.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from serverlesslora.errors import InvalidRequest
from serverlesslora_ipc.messages import Grammar

MAX_MULTIPLE = 10_000  # states; 50 ms
MAX_DECIMALS = 20
REASON_LIMIT = 300  # characters of llguidance's words

# Room for a pretty-printed answer, but not for a model that has nothing to say and does so in spaces for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"

_IN_LARK = re.compile(r"%json\s*(?=\{)")


def source_of(grammar: Grammar) -> str:
    """Raises InvalidRequest naming the parameter that carried the grammar."""
    try:
        return _SOURCES[grammar.kind](grammar.text)
    except (ValueError, RecursionError) as error:
        raise refusal(grammar, str(error) or "it is nested too deeply") from None


def refusal(grammar: Grammar, reason: str) -> InvalidRequest:
    if grammar.kind == "tools":  # a grammar that the client has never seen is not quoted to it
        reason = reason.partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
    words = " ".join(reason.replace("<non-verbose/>", "").split())
    clipped = words if len(words) <= REASON_LIMIT else f"{words[:REASON_LIMIT]}…"
    what = _NAMES.get(grammar.kind, "grammar")
    return InvalidRequest(
        f"The {what} cannot be used to constrain the output: {clipped}", param=grammar.param, code="invalid_grammar"
    )


def _json_schema(text: str) -> str:
    from llguidance import LLMatcher

    schema = json.loads(text, parse_float=Decimal)
    if schema is False:
        raise ValueError("nothing matches false")
    if schema is True:
        text = "{}"
    _bound_multiples(schema)
    return LLMatcher.grammar_from_json_schema(
        text, defaults={"whitespace_pattern": WHITESPACE}, overrides={"lenient": False}
    )


def _regex(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)


def _choice(text: str) -> str:
    return _regex("|".join(_literal(choice) for choice in json.loads(text)))


def _literal(text: str) -> str:
    return "".join(c if c.isalnum() or c in " _" else f"\\x{{{ord(c):X}}}" for c in text)


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    if text.lstrip().startswith("{"):
        raise ValueError("it must be a Lark grammar with a rule called 'start', or one in EBNF (root ::= …)")
    for place in _IN_LARK.finditer(text):
        try:
            schema, _ = json.JSONDecoder(parse_float=Decimal).raw_decode(text, place.end())
        except ValueError:
            continue  # llguidance will say what is wrong
        _bound_multiples(schema)
    return LLMatcher.grammar_from_lark(text)


def _gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return _lark(any_to_lark(text))
    except RecursionError:
        raise
    except Exception as error:  # a parser of somebody else's, over somebody's text
        raise ValueError(str(error) or type(error).__name__) from None


_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "lark": _lark,
    "gbnf": _gbnf,
    "tools": _lark,  # see `tool_grammar`
}
_NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "choices",
    "tools": "schemas of the tools",
}


def _bound_multiples(schema: Any) -> None:
    multiples = {Decimal(value) for value in _values_of(schema, "multipleOf") if isinstance(value, (int, Decimal))}
    if any(not value.is_finite() or abs(value.adjusted()) > MAX_DECIMALS for value in multiples if value):
        raise ValueError("'multipleOf' is out of range")
    decimals = max((max(0, -int(value.normalize().as_tuple().exponent)) for value in multiples), default=0)
    if decimals > MAX_DECIMALS:
        raise ValueError("'multipleOf' has too many digits")
    least = math.lcm(*(int(value.scaleb(decimals)) for value in multiples))
    if least > MAX_MULTIPLE:
        raise ValueError(
            f"'multipleOf': the least common multiple of all of them must be at most {MAX_MULTIPLE}, counted in the "
            "smallest decimal place used"
        )


def _values_of(schema: Any, key: str) -> Iterator[Any]:
    """Wherever it stands: what is no schema is looked at too."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if key in value:
                yield value[key]
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
