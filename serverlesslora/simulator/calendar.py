"""What happens when: one heap of entries, ties in the order in which they were made."""

from __future__ import annotations

import heapq
from typing import Any


class Calendar:
    __slots__ = ("entries", "order")

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, int, Any, int]] = []  # (at, order, kind, subject, number)
        self.order = 0

    def add(self, at: float, kind: int, subject: Any, number: int = 0) -> None:
        self.order += 1
        heapq.heappush(self.entries, (at, self.order, kind, subject, number))

    def next_order(self) -> int:
        """Breaks ties elsewhere too, so that nothing depends on how objects compare."""
        self.order += 1
        return self.order


# Kinds of entries.
DEVICE, READY, ADAPTER, IDLE, WAKE, DISPATCH, PLAN = range(7)
