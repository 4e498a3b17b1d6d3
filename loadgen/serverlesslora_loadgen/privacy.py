"""Results are shown around; keys, passwords and the headers that carry them are not."""

from __future__ import annotations

import re
from collections.abc import Sequence

SECRET_OPTIONS = ("--api-key", "--header", "--admin-header")
HIDDEN = "…"


def without_userinfo(text: str) -> str:
    """`http://name:password@host` without what stands before the host, wherever it is in the text."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command as it may be written down. Options are spelled out: the parsers know no abbreviations."""
    shown: list[str] = []
    hide = False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide:
            shown.append(HIDDEN)
        elif name in SECRET_OPTIONS and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(without_userinfo(word))
        hide = word in SECRET_OPTIONS and not hide
    return shown
