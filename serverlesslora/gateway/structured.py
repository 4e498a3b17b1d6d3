"""What a request says its output must look like, as the one grammar the worker compiles.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`: at most one of them. Shapes and sizes
are checked here; what the words of a schema or grammar mean is for the worker, which knows the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from serverlesslora.errors import InvalidRequest
from serverlesslora_ipc.messages import Grammar

MAX_CHARACTERS = 100_000
MAX_DEPTH = 64
MAX_CHOICES = 5_000
MAX_NAME = 64  # OpenAI's

ANY_OBJECT = '{"type":"object"}'

FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


class Asked(NamedTuple):
    """One part of the request that constrains the output."""

    param: str
    grammar: Grammar


def grammar_of(fields: Mapping[str, Any]) -> Grammar | None:
    """`fields` holds what the request says under the names in FIELDS. Raises InvalidRequest naming the parameter."""
    asked = [each for each in _asked(fields) if each is not None]
    if len(asked) > 1:
        names = " and ".join(f"'{each.param}'" for each in asked[:2])
        raise InvalidRequest(f"{names} cannot both constrain the output.", param=asked[1].param)
    return asked[0].grammar if asked else None


def _asked(fields: Mapping[str, Any]) -> Iterator[Asked | None]:
    if (value := fields.get("response_format")) is not None:
        yield _response_format(value)
    if (value := fields.get("structured_outputs")) is not None:
        yield _structured_outputs(value)
    for name, read in _GUIDED.items():
        if (value := fields.get(name)) is not None:
            yield Asked(name, read(value, name))


def _response_format(value: Any) -> Asked | None:
    param = "response_format"
    value = _object(value, param)
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Asked(param, Grammar("json_schema", ANY_OBJECT, param))
    if kind != "json_schema":
        words = "missing" if kind is None else "unknown"
        raise _wrong(f"{param}.type", f"the type is {words}; it is one of text, json_object and json_schema")
    param = f"{param}.json_schema"
    described = _object(_present(value, "json_schema", param), param)
    name = _present(described, "name", f"{param}.name")
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and _is_name(name)):
        raise _wrong(f"{param}.name", f"it must have 1 to {MAX_NAME} letters, digits, underscores or dashes")
    for optional, type_ in (("description", str), ("strict", bool)):
        if not isinstance(described.get(optional), type_ | None):
            raise _wrong(f"{param}.{optional}", f"it must be a {_TYPE_NAMES[type_]}")
    if described.get("schema") is None:  # OpenAI's is optional; strict or not, an object is what it promises
        return Asked("response_format", Grammar("json_schema", ANY_OBJECT, f"{param}.schema"))
    return Asked("response_format", schema_grammar(_object(described["schema"], f"{param}.schema"), f"{param}.schema"))


def _structured_outputs(value: Any) -> Asked | None:
    param = "structured_outputs"
    given = {
        name: each
        for name, each in _object(value, param).items()
        if each is not None and (each is not False or name == "json")  # flags that ask for nothing
    }
    if unknown := sorted(given.keys() - _STRUCTURED.keys()):
        raise InvalidRequest(
            f"'{param}.{unknown[0]}' is not supported by this server.",
            param=f"{param}.{unknown[0]}",
            code="unsupported_parameter",
        )
    if len(given) > 1:
        raise _wrong(param, f"at most one of {', '.join(_STRUCTURED)} may be set")
    for name, each in given.items():
        return Asked(param, _STRUCTURED[name](each, f"{param}.{name}"))
    return None


# --- one kind of grammar each ------------------------------------------------------------------------------------


def schema_grammar(value: Any, param: str) -> Grammar:
    """A JSON schema, as it is or as text."""
    if isinstance(value, str):
        try:
            value = json.loads(_bounded(value, param))
        except (ValueError, RecursionError) as error:
            raise _wrong(param, f"it is not JSON: {error}") from None
    if not isinstance(value, (dict, bool)):
        raise _wrong(param, "it must be a JSON schema: an object, or a string that holds one")
    _check_depth(value, param)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise _wrong(param, "it has a number that JSON does not know") from None
    return Grammar("json_schema", _bounded(text, param), param)


def _any_object(value: Any, param: str) -> Grammar:
    if value is not True:
        raise _wrong(param, "it must be true or false")
    return Grammar("json_schema", ANY_OBJECT, param)


def _regex(value: Any, param: str) -> Grammar:
    return Grammar("regex", _text(value, param), param)


def _choice(value: Any, param: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise _wrong(param, "it must be a list of strings, at least one")
    if len(value) > MAX_CHOICES:
        raise _wrong(param, f"{len(value)} choices are more than the {MAX_CHOICES} this server allows")
    return Grammar("choice", _bounded(json.dumps(value, ensure_ascii=False), param), param)


def _grammar(value: Any, param: str) -> Grammar:
    """EBNF as llama.cpp writes it (GBNF) is told from Lark by its sign for "is"."""
    text = _text(value, param)
    return Grammar("gbnf" if "::=" in text else "lark", text, param)


_GUIDED: dict[str, Callable[[Any, str], Grammar]] = {
    "guided_json": schema_grammar,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
}
_STRUCTURED: dict[str, Callable[[Any, str], Grammar]] = {
    "json": schema_grammar,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}
_TYPE_NAMES: dict[type, str] = {str: "string", bool: "boolean"}


# --- checks ------------------------------------------------------------------------------------------------------


def _wrong(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{param}': {reason}.", param=param, code="invalid_value")


def _present(value: dict[str, Any], name: str, param: str) -> Any:
    if value.get(name) is None:
        raise InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return value[name]


def _object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(param, "it must be an object")
    return value


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(param, "it must be a string that is not empty")
    return _bounded(value, param)


def _bounded(text: str, param: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise _wrong(param, f"{len(text)} characters are more than the {MAX_CHARACTERS} this server allows")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(param, f"it has the lone surrogate U+{ord(text[error.start]):04X}") from None
    return text


def _is_name(text: str) -> bool:
    return text.isascii() and text.replace("_", "").replace("-", "").isalnum()


def _check_depth(value: Any, param: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for each in level for inner in _inner(each)]
        if not level:
            return
    raise _wrong(param, f"it is nested more than {MAX_DEPTH} levels deep")


def _inner(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
