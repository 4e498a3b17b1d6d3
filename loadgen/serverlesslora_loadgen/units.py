"""Times, sizes and factors as people write them: `500ms`, `1.5 h`, `1/64`."""

from __future__ import annotations

import math
import re

from serverlesslora_loadgen.errors import LoadgenError

_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(text: str) -> float:
    """A bare number is seconds. Raises LoadgenError when it is no time, less than zero, or without end."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?\d+)?)\s*([a-zµ]*)\s*", text.lower())
    try:
        if match is None:
            raise ValueError
        seconds = float(match[1]) * _SECONDS[match[2] or "s"]
        if not math.isfinite(seconds):
            raise ValueError
        return seconds
    except (ValueError, KeyError):
        raise LoadgenError(f"{text!r} is not a time such as 500ms, 10s, 5m or 1h") from None


def parse_factor(text: str) -> float:
    """`1/64` or `0.5`. Raises LoadgenError unless it is finite and more than zero."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise LoadgenError(f"{text!r} is not a factor such as 1/64 or 0.5") from None
    if not 0 < value < math.inf:
        raise LoadgenError(f"{text!r} is not a factor: it must be more than 0, and finite")
    return value


def show_seconds(seconds: float | None) -> str:
    """Three digits that matter: `1.53 s`, `24.1 ms`, `2 h 05 min`."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 0:
        return f"-{show_seconds(-seconds)}"
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995e-3:
        return f"{1e6 * seconds:.3g} µs"
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
