"""Calls written in Python, as Llama 4 and some small models are taught: `[f(a=1), g(b="x")]`.

A call is read once it is complete, because only then is it known to be one. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

from serverlesslora.gateway.tools.json_calls import begin
from serverlesslora.gateway.tools.reader import PYTHON, Reader, Step

_NAMES = {"true": True, "false": False, "null": None}
_MOST = 16_384  # characters of one call: a bracket that is never closed must not hold back a whole answer
_START, _END = "<|python_start|>", "<|python_end|>"


def pythonic(reader: Reader) -> Step[None]:
    reader.attempt()
    yield from reader.space()
    if not (yield from _list(reader)):
        reader.refuse()
    is_inside = False
    while mark := (yield from reader.prose((_START, _END))):
        if mark == _START:
            yield from reader.space()
            is_inside = yield from _list(reader)
        if not is_inside:
            reader.refuse()


def _list(reader: Reader) -> Step[bool]:
    before = reader.num_calls
    if not (yield from reader.literal("[")):
        return False
    while True:
        yield from reader.space()
        if (found := (yield from _call(reader))) is not None:
            begin(reader, *found)
            reader.attempt()
            yield from reader.space()
            if (yield from reader.literal("]")):
                break
            if (yield from reader.literal(",")):
                continue
        if reader.num_calls > before:
            reader.refuse()  # what follows the calls that stand is text
        break
    return reader.num_calls > before


def _call(reader: Reader) -> Step[tuple[str, str] | None]:
    """Name and arguments of the next call."""
    name = yield from reader.word()
    if name not in reader.schemas or (yield from reader.peek()) != "(":
        return None
    parts: list[str] = []
    if not (yield from reader.brackets(PYTHON, parts.append, most=_MOST)):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that mean nothing
            node = ast.parse(f"f{''.join(parts)}", mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            return None
        arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        if len(arguments) != len(node.keywords):
            return None
        encoded = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        encoded.encode()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return name, encoded


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("not a string")
