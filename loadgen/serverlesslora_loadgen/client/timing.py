"""`Server-Timing`: names with how long each took, as servers tell how cold a request was.

The grammar is that of the W3C's Server Timing, section 3: `name;dur=16.4;desc="…", other;dur=4`.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from serverlesslora_loadgen.record import UNKNOWN, WARM

_ENTRY = re.compile(r'((?:[^,"]|"(?:[^"\\]|\\.)*")+)')
_PARAMETER = re.compile(r';\s*([^;=\s]+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^;]*))?')
_NOTHING_MISSING = ("warm", "hot", "none", "")


class Coldness(NamedTuple):
    kind: str  # the first name: what was missing most
    parts_ms: dict[str, float]


def parse_cold(header: str | None) -> Coldness:
    """A server that sends no such header says nothing: `unknown`. Names without a duration are worth 0."""
    if header is None:
        return Coldness(UNKNOWN, {})
    parts: dict[str, float] = {}
    kind: str | None = None
    for entry in _ENTRY.findall(header):
        name = entry.partition(";")[0].strip()
        if not name:
            continue
        parts[name] = parts.get(name, 0.0) + _duration_ms(entry)
        kind = name if kind is None else kind
    if kind is None or kind.lower() in _NOTHING_MISSING:
        return Coldness(WARM, {})
    return Coldness(kind, parts)


def _duration_ms(entry: str) -> float:
    for name, value in _PARAMETER.findall(entry):
        if name.lower() == "dur":
            try:
                duration = float(value.strip('" '))
            except ValueError:
                return 0.0
            return duration if 0 <= duration < math.inf else 0.0
    return 0.0
