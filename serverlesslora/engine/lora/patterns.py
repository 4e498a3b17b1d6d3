"""Matches PEFT's rank_pattern and alpha_pattern keys to module names without trusting the tenant's expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Generic, TypeVar

from serverlesslora.errors import AdapterInvalid

T = TypeVar("T")

MAX_PATTERNS = 4096
MAX_EXPRESSIONS = 16  # keys that are more than a plain module name
MAX_EXPRESSION_CHARS = 300
MAX_REPEATS = 2  # with PEFT's own prefix the work per name stays cubic in some fifty characters

_PLAIN = re.compile(r"\^?[\w.\\]+\$?", re.ASCII)
_SINGLE = {ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN}
_SIMPLE = _SINGLE | {ops.AT}


class PatternTable(Generic[T]):
    """First key in the file's order that matches a module name at its end, at a dot; as PEFT's get_pattern_key."""

    def __init__(self, field: str, patterns: Mapping[str, T]) -> None:
        check_number(field, patterns)
        self._suffixes: dict[str, tuple[int, T]] = {}
        self._full: dict[str, tuple[int, T]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], T]] = []
        for order, (key, value) in enumerate(patterns.items()):
            plain = key.replace("\\.", ".").removesuffix("$")
            if _PLAIN.fullmatch(key) and "\\" not in plain and "$" not in plain:
                if plain.startswith("^"):  # PEFT puts "(.*\.)?" in front: such a key matches whole names only
                    self._full.setdefault(plain[1:], (order, value))
                else:
                    self._suffixes.setdefault(plain, (order, value))
            else:
                self._expressions.append((order, compile_bounded(field, key), value))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise AdapterInvalid(
                f"{field} has {len(self._expressions)} regular expressions; at most {MAX_EXPRESSIONS} are accepted:"
                " write module names instead"
            )

    def get(self, name: str, default: T) -> T:
        found = [entry for entry in (self._full.get(name), self._suffixes.get(name)) if entry]
        if self._suffixes:
            position = name.find(".")
            while position >= 0:
                entry = self._suffixes.get(name[position + 1 :])
                if entry:
                    found.append(entry)
                position = name.find(".", position + 1)
        found.extend((order, value) for order, expression, value in self._expressions if expression.match(name))
        return min(found, key=lambda entry: entry[0])[1] if found else default


def check_number(field: str, patterns: Mapping[str, Any]) -> None:
    """Raises AdapterInvalid for more keys than are looked at."""
    if len(patterns) > MAX_PATTERNS:
        raise AdapterInvalid(f"{field} has {len(patterns)} keys; at most {MAX_PATTERNS} are accepted")


def compile_bounded(field: str, key: str) -> re.Pattern[str]:
    """The expression PEFT would run, refused unless it can be matched in bounded time."""
    problem = None
    try:
        if len(key) > MAX_EXPRESSION_CHARS:
            problem = f"is longer than {MAX_EXPRESSION_CHARS} characters"
        elif _count_repeats(parser.parse(key)) > MAX_REPEATS:
            problem = f"repeats more than {MAX_REPEATS} times"
        else:
            return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError):
        problem = "is not a regular expression"
    except _TooComplex:
        problem = "uses nested repeats, look-around or back-references"
    raise AdapterInvalid(f"{field} key {key[:80]!r} {problem}; write the names of the modules instead")


class _TooComplex(Exception):
    pass


def _count_repeats(tokens: Any) -> int:
    """Repeats in the expression; only single characters may be repeated, so no match can explode exponentially."""
    count = 0
    for op, argument in tokens:
        if op in _SIMPLE:
            continue
        if op is ops.SUBPATTERN:
            count += _count_repeats(argument[3])
        elif op is ops.BRANCH:
            count += sum(_count_repeats(branch) for branch in argument[1])
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            low, high, body = argument
            if len(body) == 1 and body[0][0] in _SINGLE:
                count += high > 1
            elif (low, high) == (0, 1):
                count += 1 + _count_repeats(body)
            else:
                raise _TooComplex
        else:
            raise _TooComplex
    return count
