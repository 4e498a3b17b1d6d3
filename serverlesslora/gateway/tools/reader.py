"""A model's text as it arrives, for parsers that are written as if it were all there.

The steps of a parser are generators that are suspended while the next decision needs text that has not come; only the
text seen decides, never how it was cut. What may become a mark is held back, everything else is said at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")
Step = Generator[None, None, T]


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class CallBegun(NamedTuple):
    call: int  # its number in the answer
    name: str


class CallArguments(NamedTuple):
    """The next part of the arguments, which are JSON as far as the model wrote it."""

    call: int  # its number in the answer
    text: str


Piece = Content | Reasoning | CallBegun | CallArguments

_SPACE = " \t\r\n"
_IN_STRING = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)
_WORD = re.compile(r"[\w.\-]+")
_SCALAR = re.compile(r"[\w.+\-]+")


class Notation(NamedTuple):
    """What is needed to find the end of a value in brackets."""

    quotes: str
    closing: Mapping[str, str]
    between: frozenset[str] | None  # the characters outside of strings and brackets; None: any


JSON = Notation('"', {"{": "}", "[": "]"}, frozenset("0123456789+-.:,eE truefalsn\n\r\t"))
PYTHON = Notation("\"'", {"(": ")", "{": "}", "[": "]"}, None)


class Reader:
    def __init__(self, schemas: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`schemas` are those of the parameters of the functions that may be called, by name."""
        self.schemas = schemas or {}
        self.num_calls = 0
        self.is_reasoning = False
        self._said: list[Piece] = []
        self._text = ""
        self._at = 0
        self._ended = False
        self._attempt = (0, 0)  # where what may be a call began, and behind its mark
        self._blank: str | None = ""  # white space that is dropped if it only parts calls; None: it is content

    # --- from outside ---

    def add(self, text: str, *, is_last: bool = False) -> None:
        self._text += text
        self._ended = is_last

    def take(self) -> list[Piece]:
        """What was said since the last time, in as few pieces as can be."""
        said, self._said = self._said, []
        merged = said[:1]
        for piece in said[1:]:
            match merged[-1], piece:
                case Content(before), Content(text):
                    merged[-1] = Content(before + text)
                case Reasoning(before), Reasoning(text):
                    merged[-1] = Reasoning(before + text)
                case CallArguments(call, before), CallArguments(_, text):
                    merged[-1] = CallArguments(call, before + text)
                case _:
                    merged.append(piece)
        return merged

    # --- saying ---

    def content(self, text: str) -> None:
        if self._blank is not None:
            self._blank += text
            if not text or text.isspace():
                return
            text, self._blank = self._blank, None
        if text:
            self._said.append(Content(text))

    def reasoning(self, text: str) -> None:
        if text:
            self._said.append(Reasoning(text))

    def begin(self, name: str) -> None:
        self._blank = ""
        self._said.append(CallBegun(self.num_calls, name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Of the call begun last."""
        if text:
            self._said.append(CallArguments(self.num_calls - 1, text))

    def close(self) -> None:
        """At the end: an answer of white space only is an answer, white space around calls is not."""
        if self._blank and not self.num_calls:
            self._said.append(Content(self._blank))
        self._blank = None

    # --- attempts: text that may turn out to be no call ---

    def attempt(self) -> None:
        """What follows may be a call without a mark."""
        self._attempt = (self._at, self._at)

    def refuse(self) -> None:
        """It was no call: its mark is content, and what follows it is read again."""
        begin, end = self._attempt
        self.content(self._text[begin:end])
        self._at = end

    # --- steps ---

    def prose(self, marks: Sequence[str]) -> Step[str | None]:
        """Content up to the first of `marks`, which is passed and begins an attempt; None at the end of the text."""
        return (yield from self.until(marks, self.content))

    def until(self, marks: Sequence[str], say: Callable[[str], None], *, strips: bool = False) -> Step[str | None]:
        """`strips`: without the white space at its end."""
        while True:
            self._text, self._at = self._text[self._at :], 0
            found = _first(self._text, marks)
            end = len(self._text) if found is None else found[0]
            is_final = found is not None or self._ended
            shown = self._text[: end if is_final else end - _held(self._text, marks)]
            if strips:
                shown = shown.rstrip()
            say(shown)
            if found is not None:
                place, mark = found
                self._at = place + len(mark)
                self._attempt = (place, self._at)
                return mark
            self._at = end if is_final else len(shown)
            if is_final:
                return None
            yield

    def space(self) -> Step[None]:
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return
            yield

    def peek(self) -> Step[str]:
        """The next character; nothing at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def literal(self, text: str) -> Step[bool]:
        """Whether `text` comes next; it is passed then."""
        while True:
            have = self._text[self._at : self._at + len(text)]
            if have == text:
                self._at += len(text)
                return True
            if self._ended or not text.startswith(have):
                return False
            yield

    def word(self) -> Step[str]:
        return (yield from self._run(_WORD))

    def string(self) -> Step[str | None]:
        """A JSON string; None if something else comes."""
        if (yield from self.peek()) != '"':
            return None
        begin = place = self._at
        place += 1
        while True:
            found = _IN_STRING.match(self._text, place)
            place = place if found is None else found.end()
            if self._text[place : place + 1] == '"':
                break
            if self._ended:
                return None
            yield
        self._at = place + 1
        try:
            return msgspec.json.decode(self._text[begin : self._at], type=str)
        except (msgspec.MsgspecError, ValueError):
            return None

    def value(self, say: Callable[[str], None], *, most: int | None = None) -> Step[bool]:
        """A JSON value, said as it was written while it comes. False: it broke off, or goes on as no JSON does.

        `most`: of this many characters it is given up, where it may have to be read again.
        """
        first = yield from self.peek()
        if first in JSON.closing:
            return (yield from self.brackets(JSON, say, most=most))
        if first == '"':
            before = self._at
            if (yield from self.string()) is None:
                return False
            say(self._text[before : self._at])
            return True
        scalar = yield from self._run(_SCALAR)
        try:
            json.loads(scalar)
        except ValueError:
            return False
        say(scalar)
        return True

    def brackets(self, notation: Notation, say: Callable[[str], None], *, most: int | None = None) -> Step[bool]:
        """From the bracket that comes next to the one that closes it, otherwise as `value`."""
        last = None if most is None else self._at + most
        quotes, closing, between = notation
        closers = frozenset(closing.values())
        open_: list[str] = []
        quote = ""
        is_escaped = False
        while True:
            begin = self._at
            for place in range(begin, len(self._text)):
                character = self._text[place]
                if place == last:
                    return self._broken(begin, place, say)
                if quote:
                    if is_escaped:
                        is_escaped = False
                    elif character == "\\":
                        is_escaped = True
                    elif character == quote:
                        quote = ""
                elif character in quotes:
                    quote = character
                elif character in closing:
                    open_.append(closing[character])
                elif character in closers:
                    if open_.pop() != character:
                        return self._broken(begin, place, say)
                    if not open_:
                        self._at = place + 1
                        say(self._text[begin : self._at])
                        return True
                elif between is not None and character not in between:
                    return self._broken(begin, place, say)
            self._at = len(self._text)
            say(self._text[begin:])
            if self._ended:
                return False
            yield

    def _broken(self, begin: int, place: int, say: Callable[[str], None]) -> bool:
        say(self._text[begin:place])
        self._at = place
        return False

    def _run(self, pattern: re.Pattern[str]) -> Step[str]:
        """As long as it goes on; what was looked at is not looked at again, however long it gets."""
        end = self._at
        while True:
            found = pattern.match(self._text, end)
            end = end if found is None else found.end()
            if end < len(self._text) or self._ended:
                run, self._at = self._text[self._at : end], end
                return run
            yield


def _first(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    return min(((place, mark) for mark in marks if (place := text.find(mark)) >= 0), default=None)


def _held(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = 0
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    return longest
