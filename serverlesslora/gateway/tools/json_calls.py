"""Calls written as JSON objects: `{"name": ..., "arguments": {...}}`, alone or in a list.

A call begins as soon as its name is known and its arguments have begun, and stands from then on: the arguments are
passed on as the model writes them, and what breaks them off is read as text. Before that anything unexpected, such as
the name of a function that was not offered, makes it no call.
"""

from __future__ import annotations

import msgspec

from serverlesslora.gateway.tools.reader import Reader, Step

_ARGUMENTS = ("arguments", "parameters")

# Characters of a value that is read while it is open whether this is a call: a text of many beginnings that all come to
# nothing is read again from each of them, and must not cost the square of its length.
MOST_UNDECIDED = 8192


def call(reader: Reader) -> Step[bool]:
    """Whether a call was begun. The keys may come in any order and others are passed over."""
    before = reader.num_calls
    is_complete = yield from _object(reader, before)
    has_begun = reader.num_calls > before
    if has_begun and not is_complete:
        reader.refuse()
    return has_begun


def calls(reader: Reader) -> Step[bool]:
    """A list of calls, or one. True if at least one was begun."""
    if not (yield from reader.literal("[")):
        return (yield from call(reader))
    before = reader.num_calls
    while True:
        yield from reader.space()
        if not (yield from call(reader)):
            if reader.num_calls > before:
                reader.refuse()
            break
        reader.attempt()
        yield from reader.space()
        if (yield from reader.literal(",")):
            continue
        if not (yield from reader.literal("]")):
            reader.refuse()
        break
    return reader.num_calls > before


def _object(reader: Reader, before: int) -> Step[bool]:
    """True if it was read to its end. Once the call stands, an attempt is where the rest of the object began."""
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    if not (yield from reader.literal("{")):
        return False
    while True:
        yield from reader.space()
        key = yield from reader.string()
        if key is None:
            return False
        yield from reader.space()
        if not (yield from reader.literal(":")):
            return False
        yield from reader.space()
        if key == "name" and name is None:
            name = yield from reader.string()
            if name is None or name not in reader.schemas:
                return False
            if early is not None:
                begin(reader, name, early)
                reader.attempt()
        elif key in _ARGUMENTS and early is None and reader.num_calls == before:
            if name is not None and (yield from reader.peek()) == "{":
                reader.begin(name)
                is_whole = yield from reader.value(reader.arguments)
                reader.attempt()
                if not is_whole:
                    return False
            else:
                early = yield from _whole_arguments(reader)
                if early is None:
                    return False
                if name is not None:
                    begin(reader, name, early)
                    reader.attempt()
        elif not (yield from reader.value(_ignore, most=MOST_UNDECIDED)):
            return False
        yield from reader.space()
        if (yield from reader.literal(",")):
            continue
        if not (yield from reader.literal("}")):
            return False
        if name is not None and reader.num_calls == before:
            begin(reader, name, "{}")
        return True


def begin(reader: Reader, name: str, arguments: str) -> None:
    reader.begin(name)
    reader.arguments(arguments)


def _whole_arguments(reader: Reader) -> Step[str | None]:
    """Arguments that cannot be passed on as they come. Some models write them as a string of JSON."""
    if (yield from reader.peek()) == '"':
        text = yield from reader.string()
        return text if text is not None and _is_object(text) else None
    parts: list[str] = []
    if not (yield from reader.value(parts.append, most=MOST_UNDECIDED)):
        return None
    text = "".join(parts)
    if text == "null":
        return "{}"
    return text if text.startswith("{") else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


def _ignore(text: str) -> None:
    pass
