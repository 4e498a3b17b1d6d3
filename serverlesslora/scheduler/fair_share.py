"""Who of several tenants is next, so that one who asks for much slows nobody but themselves.

The virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: every tenant
has a counter of the service it got, in weighted tokens; the smallest is next. Who comes back after a pause is lifted to
the smallest counter of those who stayed, so that a pause earns no credit, and keeps a larger one of their own, so that
it forgives no debt.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class FairShare:
    """Counters of one queue. Costs O(log tenants) per call; forgets tenants whose counter no longer tells anything."""

    def __init__(self, *, prompt_weight: float = 1.0, output_weight: float = 2.0) -> None:
        self._prompt_weight, self._output_weight = prompt_weight, output_weight
        self._counters: dict[str, float] = {}
        self._active: dict[str, float] = {}  # to the counter that its one valid entry in the heap has
        self._smallest: list[tuple[float, str]] = []  # lazily: a counter may have grown since, an entry be invalid
        self._floor = 0.0  # never falls

    def arrived(self, tenant: str) -> None:
        """It has work; repeated calls change nothing."""
        if tenant in self._active:
            return
        counter = max(self._counters.get(tenant, 0.0), self._lift())
        self._counters[tenant] = counter
        self._enter(tenant, counter)

    def charge(self, tenant: str, prompt_tokens: float = 0, output_tokens: float = 0) -> None:
        """Tokens served, or a correction of tokens that were charged ahead (negative)."""
        cost = self._prompt_weight * prompt_tokens + self._output_weight * output_tokens
        self._counters[tenant] = self._counters.get(tenant, self._floor) + cost
        if cost < 0 and tenant in self._active:
            self._enter(tenant, self._counters[tenant])

    def left(self, tenant: str) -> None:
        """Nothing of it waits or runs."""
        if tenant not in self._active:
            return
        if len(self._active) == 1:
            # Nobody stays to compare with: whoever comes next starts level with the last one.
            self._floor = max(self._floor, self._counters[tenant])
        del self._active[tenant]
        self._lift()
        if self._counters[tenant] <= self._floor:
            del self._counters[tenant]
        elif len(self._counters) > 2 * len(self._active) + 64:
            self._counters = {name: c for name, c in self._counters.items() if c > self._floor or name in self._active}

    def key(self, tenant: str) -> float:
        return self._counters.get(tenant, self._floor)

    def order(self, tenants: Iterable[str]) -> list[str]:
        """Smallest counter first."""
        return sorted(tenants, key=self.key)

    def _lift(self) -> float:
        """The smallest counter among the active; the last one there was if nobody is."""
        heap = self._smallest
        while heap:
            counter, tenant = heap[0]
            if self._active.get(tenant) != counter:
                heapq.heappop(heap)
            elif counter != (grown := self._counters[tenant]):
                self._active[tenant] = grown
                heapq.heapreplace(heap, (grown, tenant))
            else:
                self._floor = max(self._floor, counter)
                break
        return self._floor

    def _enter(self, tenant: str, counter: float) -> None:
        self._active[tenant] = counter
        heapq.heappush(self._smallest, (counter, tenant))
        if len(self._smallest) > 4 * len(self._active) + 64:
            self._smallest = [(counter, tenant) for tenant, counter in self._active.items()]
            heapq.heapify(self._smallest)

    def check(self) -> None:
        assert self._active.keys() <= self._counters.keys()
        assert {(counter, tenant) for tenant, counter in self._active.items()} <= set(self._smallest)
        assert all(counter <= self._counters[tenant] for tenant, counter in self._active.items())
