"""Server-sent events out of bytes, in whatever pieces they come.

As the HTML standard describes them (section 9.2.6), with three exceptions. Lone carriage returns, which no server
sends, end no line. A line that does not even begin as a field does is not passed over: who writes it there writes no
event stream, and what else is wrong with the answer cannot be told. `error` is a field: llama.cpp sends it alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_LINE_BYTES = 4 << 20  # one event; more is no event stream

_BOM = b"\xef\xbb\xbf"
_FIELD = re.compile(rb"[\w-]+:")

COMMENT, BROKEN = ":", "?"  # in place of a name, which cannot be these


class Item(NamedTuple):
    name: str  # of the event, mostly empty; COMMENT; or BROKEN, for what is no field of an event stream
    data: bytes


class EventSource:
    __slots__ = ("_data", "_has_begun", "_name", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: bytes | None = None
        self._name = ""
        self._has_begun = False

    def feed(self, data: bytes) -> list[Item]:
        if self._rest:
            data = self._rest + data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        items: list[Item] = []
        for line in lines:
            self._line(line, items)
        if len(self._rest) > MAX_LINE_BYTES:
            items.append(Item(BROKEN, self._rest[:100]))
            self._rest = b""
        return items

    def end(self) -> list[Item]:
        """What came last without its empty line. Some servers end like that; others were cut off in the middle."""
        items: list[Item] = []
        self._line(self._rest, items)
        self._rest = b""
        self._line(b"", items)
        return items

    def _line(self, line: bytes, items: list[Item]) -> None:
        if line[-1:] == b"\r":
            line = line[:-1]
        if not self._has_begun:
            self._has_begun = True
            line = line.removeprefix(_BOM)
        if not line:
            if self._data is not None:
                items.append(Item(self._name, self._data))
                self._data = None
            self._name = ""
        elif line[:5] == b"data:":
            data = line[6:] if line[5:6] == b" " else line[5:]
            self._data = data if self._data is None else self._data + b"\n" + data
        elif line[:1] == b":":
            items.append(Item(COMMENT, line[1:].strip()))
        elif line[:6] == b"event:":
            self._name = line[6:].strip().decode(errors="replace")
        elif line[:6] == b"error:":
            items.append(Item("error", line[6:].strip()))
        elif _FIELD.match(line) is None and line not in (b"id", b"retry", b"event", b"data"):
            items.append(Item(BROKEN, line))
