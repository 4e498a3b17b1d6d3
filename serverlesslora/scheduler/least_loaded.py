"""The least loaded place with enough room, among many, without looking through them all."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable


class Group:
    """Places among which the least loaded with enough room is sought, O(log n) amortised.

    `ready` is ordered by load. A place found too full moves to `full`, ordered by free room, and comes back when it
    changes; so every place is looked at once per change, not once per artifact. Entries that no longer say the truth
    are dropped when they come to the top.
    """

    def __init__(self, free: list[int], load: list[float], members: Iterable[int]) -> None:
        self._free, self._load = free, load
        self._members = set(members)
        self._ready = [(load[p], p) for p in self._members]
        self._full: list[tuple[int, int]] = []
        heapq.heapify(self._ready)

    def add(self, p: int) -> None:
        self._members.add(p)

    def discard(self, p: int) -> None:
        self._members.discard(p)

    def changed(self, p: int) -> None:
        heapq.heappush(self._ready, (self._load[p], p))

    def least_loaded(self, size: int, barred: Collection[int]) -> int | None:
        """The least loaded place with `size` bytes free; among those found too full before, the one with most room."""
        found = self._first_ready(size, barred)
        return self._roomiest(size, barred) if found is None else found

    def _first_ready(self, size: int, barred: Collection[int]) -> int | None:
        aside = []
        found = None
        while self._ready and found is None:
            load, p = self._ready[0]
            if load == self._load[p] and p in self._members:
                if self._free[p] < size:
                    heapq.heappush(self._full, (-self._free[p], p))
                elif p in barred:
                    aside.append((load, p))
                else:
                    found = p
                    break
            heapq.heappop(self._ready)
        for entry in aside:
            heapq.heappush(self._ready, entry)
        return found

    def _roomiest(self, size: int, barred: Collection[int]) -> int | None:
        aside = []
        found = None
        while self._full and -self._full[0][0] >= size:
            room, p = self._full[0]
            if -room == self._free[p] and p in self._members:
                if p not in barred:
                    found = p
                    break
                aside.append((room, p))
            heapq.heappop(self._full)
        for entry in aside:
            heapq.heappush(self._full, entry)
        return found
