"""Times at which something is to be looked at again, most of which are called off before."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """A heap with lazy deletion: an entry is dropped when it comes first and `holds(at, item)` is false, or when such
    entries may be more than half of all."""

    def __init__(self, holds: Callable[[float, T], bool]) -> None:
        self._holds = holds
        self._entries: list[tuple[float, int, T]] = []
        self._numbers = count()
        self._sweep_at = 1000

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, at: float, item: T) -> None:
        heapq.heappush(self._entries, (at, next(self._numbers), item))
        if len(self._entries) > self._sweep_at:
            self._entries = [entry for entry in self._entries if self._holds(entry[0], entry[2])]
            heapq.heapify(self._entries)
            self._sweep_at = 2 * len(self._entries) + 1000

    def first_at(self) -> float | None:
        while self._entries and not self._holds(self._entries[0][0], self._entries[0][2]):
            heapq.heappop(self._entries)
        return self._entries[0][0] if self._entries else None

    def take_due(self, now: float) -> T | None:
        at = self.first_at()
        return heapq.heappop(self._entries)[2] if at is not None and at <= now else None

    def __iter__(self) -> Iterator[tuple[float, T]]:
        """In no order, with those that were called off."""
        return ((at, item) for at, _, item in self._entries)
