"""Calls written as tags with untyped values, as Qwen3-Coder and its kin are taught:

    <tool_call><function=name><parameter=key>value</parameter></function></tool_call>

What type a value has is said by the schema of the parameters; values of type string are passed on as they come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from serverlesslora.gateway.tools.reader import Reader, Step

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_OUTER, _OUTER_END = "<tool_call>", "</tool_call>"
_PARAMETER, _VALUE_END = "<parameter=", "</parameter>"


def qwen3_coder(reader: Reader) -> Step[None]:
    """The outer tags may be missing; models forget them."""
    while mark := (yield from reader.prose((_OUTER, _FUNCTION))):
        if mark == _OUTER:
            yield from reader.space()
            if not (yield from reader.literal(_FUNCTION)):
                reader.refuse()
                continue
        name = yield from reader.word()
        if name not in reader.schemas or not (yield from reader.literal(">")):
            reader.refuse()
            continue
        reader.begin(name)
        yield from _parameters(reader, reader.schemas[name])
        reader.attempt()
        yield from reader.space()
        if not (yield from reader.literal(_OUTER_END)):
            reader.refuse()


def _parameters(reader: Reader, schema: Mapping[str, Any]) -> Step[None]:
    """Until the end of the function, or of what looks like one; unfinished only where the text is."""
    separator = "{"
    while True:
        yield from reader.space()
        if (yield from reader.literal(_PARAMETER)):
            key = yield from reader.word()
            if (yield from reader.literal(">")):
                reader.arguments(f"{separator}{json.dumps(key)}: ")
                separator = ", "
                if not (yield from _value(reader, _type_of(schema, key))):
                    return
                continue
        if not (yield from reader.literal(_FUNCTION_END)) and not (yield from reader.peek()):
            return
        reader.arguments("{}" if separator == "{" else "}")
        return


def _value(reader: Reader, kind: Any) -> Step[bool]:
    """The tags stand on lines of their own: one line break on either side is not the value's."""
    yield from reader.literal("\n")
    marks = ("\n" + _VALUE_END, _VALUE_END)
    if kind == "string":
        reader.arguments('"')
        if (yield from reader.until(marks, lambda text: reader.arguments(_quoted(text)[1:-1]))) is None:
            return False
        reader.arguments('"')
        return True
    parts: list[str] = []
    if (yield from reader.until(marks, parts.append)) is None:
        return False
    reader.arguments(_typed("".join(parts)))
    return True


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _typed(text: str) -> str:
    """Values that are JSON stay so, Python's words for constants are understood, everything else is a string."""
    word = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        msgspec.json.decode(word)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _quoted(text)
    return word


def _type_of(schema: Mapping[str, Any], key: str) -> Any:
    properties = schema.get("properties")
    entry = properties.get(key) if isinstance(properties, dict) else None
    return entry.get("type") if isinstance(entry, dict) else None
