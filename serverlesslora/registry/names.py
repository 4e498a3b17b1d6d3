"""What people write after a function's name, and which version a request for the bare name gets.

`name` goes by the weights, `name@v3` to that version, `name@latest` to the newest and `name@stable` to the one that
most get. By the weights means weighted rendezvous hashing (Schindelhauer and Schomaker, SPAA 2005): every version draws
a number from a hash of the function, the version and whoever asks, the weight makes it larger, and the largest wins. So
one user stays on one version, shares are those of the weights, and raising a weight moves users to that version only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from math import log
from typing import NamedTuple

SEPARATOR = "@"
_NUMBERED = re.compile(r"v([1-9][0-9]{0,8})")


class Asked(NamedTuple):
    function: str
    version: int | str | None  # a number, "latest" or "stable"; None: by the weights


def parse(name: str) -> Asked | None:
    """None: no version can be meant by what stands after the name."""
    function, separator, version = name.rpartition(SEPARATOR)
    if not separator:
        return Asked(name, None)
    if version in ("latest", "stable"):
        return Asked(function, version)
    number = parse_version(version)
    return None if number is None else Asked(function, number)


def parse_version(text: str) -> int | None:
    """Of "v3"."""
    found = _NUMBERED.fullmatch(text)
    return int(found[1]) if found else None


def bare(name: str) -> str:
    """The function that a name means, whichever version of it."""
    return name.partition(SEPARATOR)[0]


def choose(weights: Mapping[int, int], function: str, key: str) -> int:
    """The version that whoever is called `key` gets."""
    if len(weights) == 1:
        return next(iter(weights))
    return max(weights, key=lambda number: (weights[number] / -log(_drawn(function, number, key)), number))


def _drawn(function: str, number: int, key: str) -> float:
    """Even between 0 and 1, neither of them included."""
    digest = hashlib.blake2b(f"{function}\0{number}\0{key}".encode("utf-8", "replace"), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / (1 << 52)
