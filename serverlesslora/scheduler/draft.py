"""One pre-load plan in the making: a knapsack with precedence, filled greedily by value per byte.

The problem is section 4.1 of ServerlessLoRA (arXiv 2505.14468): maximise the sum of delay · rate over what is loaded,
subject to the bytes of every place and to "an adapter goes only where its backbone is". Ours beside it: an artifact is
weighed together with the ancestors it would bring; what is there is given up only for something much better; and
between a dense trifle and a valuable whole the whole wins, which bounds how far greedy falls behind in one memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from math import inf
from typing import Literal

from serverlesslora.scheduler.artifacts import Move
from serverlesslora.scheduler.explaining import Why, move_reason
from serverlesslora.scheduler.packing import Packing
from serverlesslora.scheduler.settings import PolicySettings

# Sums of the same numbers in another order differ in their last bits; a decision must not.
EXACT = 1e-9
# Places searched in vain for something to replace, in one round; the densest candidates search first.
MAX_SEARCHES = 2000
# A plan takes a handful of rounds; what a gateway calls every second must not depend on the proof that it ends.
MAX_ROUNDS = 200


class Draft:
    """Each step returns whether it changed something; the plan is done when none does.

    So planning again right after a plan was carried out changes nothing. It ends, because every change adds to the
    total value of the wanted copies that are there (or puts something pinned into its place).
    """

    def __init__(self, packing: Packing, settings: PolicySettings, swap_ratio: float) -> None:
        self._packing = packing
        self._offloads = settings.offload == "on"
        self._min_density = settings.min_gain_per_gb / 1e9 * (1 - EXACT)
        self._ratio = swap_ratio / (1 + EXACT)
        self.why: dict[tuple[int, int], Why] = {}  # (artifact, place) -> its last move in this plan
        density, artifacts = packing.density, packing.artifacts
        order = sorted(range(len(density)), key=density.__getitem__, reverse=True)
        self._pinned = [i for i in order if artifacts[i].pinned]
        # What is not worth its own bytes may still come: brought by children that are worth both.
        self._wanted = [i for i in order if 0 < density[i] >= self._min_density and not artifacts[i].pinned]
        self._worthwhile = frozenset(self._wanted)

    def finish(self) -> None:
        self._trim()
        for _ in range(MAX_ROUNDS):
            if not (self._pin() or self._fill() or self._swap() or self._prefer_wholes()):
                break

    def _trim(self) -> None:
        """Others may have filled a place beyond its limit."""
        packing = self._packing
        for p, free in enumerate(packing.free):
            if free < 0 and self._offloads:
                self._evict(packing.choose(p, -free, tired=True, at_most=True) or [], p, Why("over"))

    def _pin(self) -> bool:
        """What is pinned gets in first, whatever leaves for it, except what is pinned or in use itself."""
        packing = self._packing
        changed = False
        for i in self._lacking(self._pinned):
            for level in range(packing.level[i], len(packing.ancestors[i]) + 1):
                if (p := packing.room(i, level)) is not None:
                    self._load(i, p, Why("pinned", packing.density[i], i))
                elif not self._replace(i, level, inf, packing.candidates(i, level)):
                    continue
                changed = True
                break
        return changed

    def _fill(self) -> bool:
        """Free room goes to the densest, each with what it lacks; nothing leaves."""
        packing = self._packing
        began = seen = packing.changes
        room = packing.most_free()
        queue: list[tuple[float, int, int]] = []
        level_of: dict[int, int] = {}  # of the entry that counts; others are dropped when they come up

        def push(i: int, level: int) -> None:
            if packing.bytes_with(i, level) <= room[packing.tier[i]]:
                density = self._density(i, level)
                if density >= self._min_density:
                    level_of[i] = level
                    heappush(queue, (-density, i, level))

        need, tier = packing.need, packing.tier
        for i in self._lacking():
            if need[i] <= room[tier[i]]:
                push(i, packing.level[i])
        while queue:
            _, i, level = heappop(queue)
            if level_of[i] != level or self._complete(i):
                continue
            p = packing.room(i, level)
            if p is not None and self._pays(i, p):
                for a in self._load(i, p, Why("fill", self._density(i, level), i)):
                    if packing.children[a] and len(packing.where[a]) == 1:
                        self._spread(a)
                        for child in packing.children[a]:  # from now on they lack less
                            if child != i and child in self._worthwhile and not self._complete(child):
                                push(child, packing.level[child])
                if not self._complete(i):
                    push(i, packing.level[i])
            elif level < len(packing.ancestors[i]):
                if packing.changes != seen:
                    seen, room = packing.changes, packing.most_free()
                push(i, level + 1)
        return packing.changes != began

    def _spread(self, i: int) -> None:
        """The other copies of what others need, before its children crowd into the first."""
        while not self._complete(i) and self._packing.density[i] >= self._min_density:
            level = self._packing.level[i]
            p = self._packing.room(i, level)
            if p is None:
                break
            self._load(i, p, Why("fill", self._density(i, level), i))

    def _swap(self) -> bool:
        """What found no room takes it from what is worth `swap_ratio` less per byte and in all."""
        packing = self._packing
        began, seen, searches = packing.changes, -1, 0
        floors, least = packing.floors(), [0.0]
        least_at: dict[tuple[int, int], float] = {}  # of the places that hold the same
        failed: dict[tuple[tuple[int, int], int], tuple[float, int]] = {}
        for i in self._ranked():
            level = packing.level[i]
            while level <= len(packing.ancestors[i]) and not self._complete(i) and searches < MAX_SEARCHES:
                if packing.changes != seen:
                    seen, floors, least = packing.changes, packing.floors(), self._least_replaceable()
                    least_at.clear()
                if packing.density[i] < least[packing.tier[i]]:
                    break
                density, where = self._density(i, level), packing.anchor(i, level)
                if where not in least_at:
                    least_at[where] = self._ratio * min([floors[p] for p in packing.candidates(i, level)], default=inf)
                # Denser than itself by its ancestors: those were not let in alone, so they are not with it.
                if not max(self._min_density, least_at[where]) <= density <= packing.density[i] * (1 + EXACT):
                    level += 1
                    continue
                # Of two of one size the less dense does not succeed where the denser failed, unless it changed since.
                search = (where, packing.bytes_with(i, level))
                before, since = failed.get(search, (-inf, 0))
                among = packing.candidates(i, level)
                if before >= density:
                    among = [p for p in among if packing.changed_at[p] > since]
                if among:
                    searches += 1
                    if self._replace(i, level, density, among):
                        continue  # with its next copy
                    failed[search] = (density, seen)
                level += 1
        return packing.changes != began

    def _least_replaceable(self) -> list[float]:
        """[tier], the density from which on something can be replaced at all."""
        floors = self._packing.floors()
        return [self._ratio * min([floors[p] for p in places], default=inf) for places in self._packing.tiers]

    def _ranked(self) -> list[int]:
        """What is still lacking and may be dense enough to replace something, densest first."""
        packing, least = self._packing, self._least_replaceable()
        density, tier, level = packing.density, packing.tier, packing.level
        dense = [i for i in self._lacking() if density[i] >= least[tier[i]]]
        return [i for _, i in sorted((-self._density(i, level[i]), i) for i in dense)]

    def _replace(self, i: int, level: int, density: float, among: Iterable[int]) -> bool:
        """Loads `i` into the first place, weakest first, where enough leaves that is worth so much less."""
        packing = self._packing
        floors = packing.floors()
        barred = packing.barred(packing.members(i, level))
        among = [p for p in among if floors[p] * self._ratio <= density and p not in barred]
        for p in sorted(among, key=floors.__getitem__):
            members = packing.missing(i, p)  # may be fewer than at this level: then they add less
            size = packing.weight(members)
            value = inf if density == inf else packing.gain(members)
            if size > packing.limit[p] or value < self._min_density * size:
                continue
            leaving = packing.choose(
                p,
                size - packing.free[p],
                keep=packing.ancestors[i],
                max_density=value / max(1, size) / self._ratio,
                max_value=value / self._ratio,
                tired=density == inf,
            )
            # With a ratio of 2 or more the loss is always smaller; with less, a whole may be lost for a part.
            if leaving is None or packing.worth(leaving) >= value * (1 - EXACT):
                continue
            self._evict(leaving, p, Why("swap", density, i))
            self._load(i, p, Why("pinned" if density == inf else "swap", density, i, leaving))
            return True
        return False

    def _prefer_wholes(self) -> bool:
        """Where this plan has only loaded so far: if one that is left out is worth more than all of it, it goes first.

        Greedy alone can be arbitrarily bad: a dense trifle keeps a whole memory's worth of value out. Taking the best
        single item instead, when that is better, is the textbook remedy for knapsacks.
        """
        packing = self._packing
        fresh = {p: packing.loaded(p) for p in range(len(packing.places)) if not packing.gone[p]}
        worth = {
            p: packing.worth(loaded)
            for p, loaded in fresh.items()
            if loaded and not any(packing.artifacts[x].pinned for x in loaded)
        }
        if not worth:
            return False
        least = min(worth.values()) * (1 + EXACT)
        whole = {i: packing.value[i] + sum([packing.value[a] for a in packing.ancestors[i]]) for i in self._lacking()}
        changed = False
        for i in sorted((i for i in whole if whole[i] > least), key=lambda i: (-whole[i], i)):
            for p in sorted(worth, key=lambda p: (worth[p], p)):
                if worth[p] * (1 + EXACT) >= whole[i] or self._complete(i):
                    break
                if packing.places[p].tier == packing.artifacts[i].tier and self._prefer(i, p, fresh[p], worth[p]):
                    del worth[p]
                    changed = True
        return changed

    def _prefer(self, i: int, p: int, loaded: set[int], worth: float) -> bool:
        packing = self._packing
        here = packing.contents[p]
        members = [a for a in (*packing.ancestors[i], i) if a in loaded or a not in here]
        gain = sum(packing.value[a] for a in members if len(packing.where[a]) - (a in loaded) < packing.copies[a])
        size = packing.weight(members)
        if (
            size > packing.free[p] + packing.weight(loaded)
            or gain <= worth * (1 + EXACT)
            or gain < self._min_density * size
            or p in packing.barred(members)
        ):
            return False
        self._evict(loaded, p, Why("swap", gain / max(1, size), i))
        self._load(i, p, Why("fill", gain / max(1, size), i))
        return True

    # --- the small parts -----------------------------------------------------------------------------------------

    def _complete(self, i: int) -> bool:
        return len(self._packing.where[i]) >= self._packing.copies[i]

    def _lacking(self, among: Iterable[int] | None = None) -> list[int]:
        where, copies = self._packing.where, self._packing.copies
        return [i for i in (self._wanted if among is None else among) if len(where[i]) < copies[i]]

    def _density(self, i: int, level: int) -> float:
        """Value per byte of `i` with its last `level` ancestors, one more copy of each."""
        packing = self._packing
        return packing.value_with(i, level) / max(1, packing.bytes_with(i, level)) if level else packing.density[i]

    def _pays(self, i: int, p: int) -> bool:
        """Whether it is worth the bytes it takes in `p`, where less may be missing than was thought."""
        members = self._packing.missing(i, p)
        return len(members) == 1 or self._packing.gain(members) >= self._min_density * self._packing.weight(members)

    def _load(self, i: int, p: int, why: Why) -> list[int]:
        came = self._packing.load_at(i, p)
        self.why.update(((a, p), why) for a in came)
        return came

    def _evict(self, members: Iterable[int], p: int, why: Why) -> None:
        members = list(members)
        self._packing.evict_at(members, p)
        self.why.update(((a, p), why) for a in members)

    def moves(self) -> Iterator[Move]:
        """In the order in which things came, each place making room only when the next one needs it."""
        packing = self._packing
        leaving = [
            sorted(packing.gone[p], key=lambda i: (len(packing.ancestors[i]), -i)) for p in range(len(packing.places))
        ]  # [p], what is needed by others first: the next to leave is at the end
        free = [packing.limit[p] - packing.weight(there) for p, there in enumerate(packing.initial)]

        def evict(p: int) -> Move:
            i = leaving[p].pop()
            free[p] += packing.size[i]
            return self._move("evict", i, p)

        for p, left in enumerate(leaving):
            while left and free[p] < 0:
                yield evict(p)
        came = sorted(
            (came, i, p) for p in range(len(packing.places)) for i, came in packing.contents[p].items() if came
        )
        for _, i, p in came:
            while leaving[p] and free[p] < packing.size[i]:
                yield evict(p)
            free[p] -= packing.size[i]
            yield self._move("load", i, p)
        for p, left in enumerate(leaving):
            while left:
                yield evict(p)

    def _move(self, action: Literal["load", "evict"], i: int, p: int) -> Move:
        packing = self._packing
        reason = move_reason(packing, action, i, p, self.why[i, p])
        return Move(action, packing.artifacts[i].artifact_id, packing.places[p].place_id, reason)
