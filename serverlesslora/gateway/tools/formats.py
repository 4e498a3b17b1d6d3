"""The formats of tool calls by the names that `engine.dialect` gives them, each as its models write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from serverlesslora.gateway.tools.json_calls import call, calls
from serverlesslora.gateway.tools.python_calls import pythonic
from serverlesslora.gateway.tools.reader import Reader, Step
from serverlesslora.gateway.tools.xml_calls import qwen3_coder

Format = Callable[[Reader], Step[None]]


def plain(reader: Reader) -> Step[None]:
    """No calls: everything is content."""
    yield from reader.prose(())


def hermes(reader: Reader) -> Step[None]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen, the generic instructions."""
    is_inside = False
    while mark := (yield from reader.prose(("<tool_call>", "</tool_call>"))):
        if mark == "</tool_call>":
            if not is_inside:
                reader.refuse()
            is_inside = False
            continue
        yield from reader.space()
        is_inside = yield from calls(reader)
        if not is_inside:
            reader.refuse()


def llama3_json(reader: Reader) -> Step[None]:
    """`{"name": ..., "parameters": {...}}` as the whole answer or behind `<|python_tag|>`, several parted by `;`."""
    reader.attempt()
    yield from reader.space()
    if not (yield from _llama_calls(reader)):
        reader.refuse()
    while (yield from reader.prose(("<|python_tag|>",))):
        yield from reader.space()
        if not (yield from _llama_calls(reader)):
            reader.refuse()


def _llama_calls(reader: Reader) -> Step[bool]:
    begun = yield from calls(reader)
    while begun:
        reader.attempt()
        yield from reader.space()
        if not (yield from reader.literal(";")):
            yield from reader.literal(",")
        yield from reader.space()
        if not (yield from call(reader)):
            reader.refuse()
            break
    return begun


def mistral(reader: Reader) -> Step[None]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and later `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    while (yield from reader.prose(("[TOOL_CALLS]",))):
        yield from reader.space()
        if (yield from reader.peek()) in ("[", "{"):
            if not (yield from calls(reader)):
                reader.refuse()
            continue
        name = yield from reader.word()
        if (yield from reader.literal("[CALL_ID]")):
            yield from reader.word()
        yield from reader.literal("[ARGS]")
        yield from reader.space()
        if name not in reader.schemas or (yield from reader.peek()) != "{":
            reader.refuse()
            continue
        reader.begin(name)
        yield from reader.value(reader.arguments)


_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def deepseek(reader: Reader) -> Step[None]:
    """DeepSeek V3 and R1 (`function`, separator, name, a fenced block of JSON) and V3.1 (name, separator, JSON)."""
    has_begun = False
    while mark := (yield from reader.prose((_BEGIN, _CALL, _CALL_END, _END))):
        if mark == _BEGIN:
            yield from reader.space()
            is_call = (yield from reader.literal(_CALL)) and (yield from _deepseek_call(reader))
        else:
            is_call = (yield from _deepseek_call(reader)) if mark == _CALL else has_begun
        has_begun = has_begun or is_call
        if not is_call:
            reader.refuse()


def _deepseek_call(reader: Reader) -> Step[bool]:
    name = yield from reader.word()
    if not (yield from reader.literal(_SEPARATOR)):
        return False
    is_fenced = name == "function"
    if is_fenced:
        name = yield from reader.word()
        yield from reader.space()
        if not (yield from reader.literal("```json")):
            return False
    yield from reader.space()
    if name not in reader.schemas or (yield from reader.peek()) != "{":
        return False
    reader.begin(name)
    if (yield from reader.value(reader.arguments)) and is_fenced:
        yield from reader.space()
        yield from reader.literal("```")
    return True


def functionary(reader: Reader) -> Step[None]:
    """`<function=name>{...}</function>`: Functionary, and Llama 3.1 where it was asked for."""
    is_inside = False
    while mark := (yield from reader.prose(("<function=", "</function>"))):
        if mark == "</function>":
            if not is_inside:
                reader.refuse()
            is_inside = False
            continue
        name = yield from reader.word()
        is_inside = name in reader.schemas and (yield from reader.literal(">"))
        if is_inside:
            yield from reader.space()
            is_inside = (yield from reader.peek()) == "{"
        if not is_inside:
            reader.refuse()
            continue
        reader.begin(name)
        yield from reader.value(reader.arguments)


FORMATS: Mapping[str, Format] = {
    "hermes": hermes,
    "llama3_json": llama3_json,
    "mistral": mistral,
    "pythonic": pythonic,
    "qwen3_coder": qwen3_coder,
    "deepseek": deepseek,
    "functionary": functionary,
}


# --- what a constrained output is --------------------------------------------------------------------------------


def required(reader: Reader) -> Step[None]:
    """The list of calls that the grammar of `tool_choice: "required"` makes."""
    reader.attempt()
    yield from reader.space()
    if not (yield from calls(reader)):
        reader.refuse()
    yield from reader.prose(())


def named(name: str) -> Format:
    """The arguments of the one function, and nothing else."""

    def read(reader: Reader) -> Step[None]:
        if not (yield from reader.peek()):
            return
        reader.begin(name)
        yield from reader.until((), reader.arguments)

    return read


# --- reasoning ---------------------------------------------------------------------------------------------------


def after_reasoning(tags: tuple[str, str], then: Format, *, is_open: bool) -> Format:
    """Reasoning at the beginning of the output; `is_open` where the prompt ended with the opening tag.

    Tags further on are text: a model that writes about them means them so.
    """

    def read(reader: Reader) -> Step[None]:
        reader.is_reasoning = is_open
        if not is_open:
            reader.attempt()
            yield from reader.space()
            if not (yield from reader.literal(tags[0])):
                reader.refuse()
                yield from then(reader)
                return
            reader.is_reasoning = True
        yield from reader.space()
        yield from reader.until((tags[1],), reader.reasoning, strips=True)
        reader.is_reasoning = False
        yield from reader.space()
        yield from then(reader)

    return read
