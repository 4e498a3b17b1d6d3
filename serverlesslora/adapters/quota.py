"""Which stored adapters leave when the store is full: those of no function first, then the least recently used."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple


class Entry(NamedTuple):
    digest: str
    size_bytes: int  # on disk
    used_at: float  # unix seconds


class Needed(NamedTuple):
    """What the server says of its adapters."""

    in_use: frozenset[str] = frozenset()  # must stay
    deployed: frozenset[str] = frozenset()  # some function answers with it, and it can be fetched again


def to_evict(entries: Iterable[Entry], *, room_bytes: int, needed: Needed, held: Collection[str]) -> list[str] | None:
    """Digests to give up so that the entries take at most `room_bytes`; None: even all that may leave are too few."""
    kept = list(entries)
    over = sum(entry.size_bytes for entry in kept) - room_bytes
    leaving: list[str] = []
    candidates = (entry for entry in kept if entry.digest not in needed.in_use and entry.digest not in held)
    for entry in sorted(candidates, key=lambda entry: (entry.digest in needed.deployed, entry.used_at, entry.digest)):
        if over <= 0:
            break
        leaving.append(entry.digest)
        over -= entry.size_bytes
    return leaving if over <= 0 else None
