"""What lies where while a plan is made: free room, missing ancestors, and what could leave a place together.

Artifacts and places are numbers here (`i` and `p`, their positions in what was passed in): a plan looks at tens of
thousands of them. Nothing here decides; `preloader` does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from serverlesslora.scheduler.artifacts import Artifact, Place, Tier
from serverlesslora.scheduler.least_loaded import Group

TIERS: tuple[Tier, ...] = ("host", "device")
FEW = 4  # places that are simply looked through; more are kept in heaps


class Closure(NamedTuple):
    """An artifact and everything in the same place that needs it: they can only leave together."""

    density: float
    value: float
    size: int
    top: int


class Packing:
    """The places with what lies in them, changed step by step; `check()` asserts its invariants."""

    def __init__(
        self,
        places: Sequence[Place],
        artifacts: Sequence[Artifact],
        placed: Mapping[str, Collection[str]],
        *,
        watermark: float,
        in_use: Collection[tuple[str, str]] = (),
        resting: Mapping[str, Collection[str]] | None = None,  # artifact -> places it was moved in or out of lately
    ) -> None:
        self.places, self.artifacts = places, artifacts
        self.place_index = {place.place_id: p for p, place in enumerate(places)}
        self.index = {artifact.artifact_id: i for i, artifact in enumerate(artifacts)}
        assert len(self.place_index) == len(places), "a place is named twice"
        assert len(self.index) == len(artifacts), "an artifact is named twice"
        self.size = [artifact.size_bytes for artifact in artifacts]
        self.value = [artifact.value for artifact in artifacts]
        self.density = [value / max(1, size) for value, size in zip(self.value, self.size, strict=True)]
        self.copies = [artifact.copies for artifact in artifacts]
        self.load_share = [artifact.rate / artifact.copies for artifact in artifacts]
        self._ancestors_of_needs: dict[tuple[str, ...], tuple[int, ...]] = {}
        self.ancestors = [self._resolve(artifact.needs, ()) for artifact in artifacts]  # [i], what is needed first
        self.limit = [int(watermark * place.capacity_bytes) for place in places]
        self.free = list(self.limit)  # below zero: others filled it beyond the limit
        self.load = [0.0] * len(places)  # requests/s of what lies there
        self.where: list[list[int]] = [[] for _ in artifacts]
        self.contents: list[dict[int, int]] = [{} for _ in places]  # [p], artifact -> when it came; 0: was there
        self.gone: list[set[int]] = [set() for _ in places]  # what was there and has left in this plan
        self._came = 0
        self.changes = 0
        self.changed_at = [0] * len(places)  # [p], which change was its last
        self._closures: list[list[Closure]] = [[] for _ in places]
        self._floors = [inf] * len(places)
        self._stale = set(range(len(places)))  # whose closures are no longer true
        self._blocked: list[set[int]] = [set() for _ in places]
        self._tired: list[set[int]] = [set() for _ in places]
        self._groups: dict[int, Group] = {}  # ancestor -> the places that hold it, where these are many
        self._groups_at: list[list[Group]] = [[] for _ in places]
        self.level = [0] * len(artifacts)  # how many ancestors are missing where most of them are ...
        self.need = list(self.size)  # ... and what comes with those
        self.children: list[list[int]] = [[] for _ in artifacts]  # of all generations
        for place_id, names in placed.items():
            p = self.place_index[place_id]
            for name in names:
                assert name in self.index, f"{name} lies in {place_id} but is not among the artifacts"
                self._put(self.index[name], p, came=0)
        self.initial = [frozenset(contents) for contents in self.contents]
        self.in_use = {
            (self.index[name], self.place_index[place_id]) for place_id, name in in_use if name in self.index
        }
        self.resting = {
            self.index[name]: {self.place_index[at] for at in at_places if at in self.place_index}
            for name, at_places in (resting or {}).items()
            if name in self.index
        }
        for i, chain in enumerate(self.ancestors):
            for a in chain:
                self.children[a].append(i)
            if chain:
                self._set_level(i)
        self.tiers = [[p for p, place in enumerate(places) if place.tier == tier] for tier in TIERS]
        self.tier = [TIERS.index(artifact.tier) for artifact in artifacts]
        self._tier_groups = [self._group(members) for members in self.tiers]

    def _resolve(self, needs: tuple[str, ...], path: tuple[str, ...]) -> tuple[int, ...]:
        """All ancestors, each after its own; shared by everything with the same needs."""
        known = self._ancestors_of_needs.get(needs)
        if known is None:
            found: dict[int, None] = {}
            for name in needs:
                assert name in self.index, f"{name} is needed but is not among the artifacts"
                assert name not in path, f"{name} needs itself, through {' and '.join(path)}"
                found |= dict.fromkeys(self._resolve(self.artifacts[self.index[name]].needs, (*path, name)))
                found[self.index[name]] = None
            known = self._ancestors_of_needs[needs] = tuple(found)
        return known

    def _group(self, members: Iterable[int]) -> Group:
        group = Group(self.free, self.load, members)
        for p in members:
            self._groups_at[p].append(group)
        return group

    # --- questions -----------------------------------------------------------------------------------------------

    def members(self, i: int, level: int) -> tuple[int, ...]:
        """What has to come with `i` if its last `level` ancestors are missing, itself last."""
        chain = self.ancestors[i]
        return (*chain[len(chain) - level :], i)

    def missing(self, i: int, p: int) -> list[int]:
        """What has to come to `p` for `i` to lie there, what is needed first, `i` last."""
        here = self.contents[p]
        return [a for a in self.ancestors[i] if a not in here] + [i]

    def weight(self, members: Iterable[int]) -> int:
        return sum([self.size[a] for a in members])

    def worth(self, members: Iterable[int]) -> float:
        return sum([self.value[a] for a in members])

    def gain(self, members: Iterable[int]) -> float:
        """Value that one more copy of each adds: of those that are wanted in more places than they are in."""
        return sum([self.value[a] for a in members if len(self.where[a]) < self.copies[a]])

    def value_with(self, i: int, level: int) -> float:
        """The gain of `members` (`i` is lacking)."""
        value = self.value[i]
        for a in self.ancestors[i][len(self.ancestors[i]) - level :]:
            if len(self.where[a]) < self.copies[a]:
                value += self.value[a]
        return value

    def bytes_with(self, i: int, level: int) -> int:
        """The weight of `members`."""
        if level == self.level[i]:
            return self.need[i]
        chain = self.ancestors[i]
        return self.size[i] + self.weight(chain[len(chain) - level :])

    def _set_level(self, i: int) -> None:
        level, need = 0, self.size[i]
        for a in reversed(self.ancestors[i]):
            if self.where[a]:
                break
            level += 1
            need += self.size[a]
        self.level[i], self.need[i] = level, need

    def candidates(self, i: int, level: int) -> Sequence[int]:
        """Places of the right tier that hold all but the last `level` ancestors."""
        chain = self.ancestors[i]
        return self.tiers[self.tier[i]] if level == len(chain) else self.where[chain[-1 - level]]

    def anchor(self, i: int, level: int) -> tuple[int, int]:
        """Names the set of `candidates`: equal for artifacts that have the same."""
        chain = self.ancestors[i]
        return (1, self.tier[i]) if level == len(chain) else (0, chain[-1 - level])

    def barred(self, members: Sequence[int]) -> Collection[int]:
        """Where the last of `members` lies already, or one of them was evicted too lately."""
        i = members[-1]
        if not self.resting or self.artifacts[i].pinned:
            return self.where[i]
        return {p for a in members for p in self.resting.get(a, ())}.union(self.where[i])

    def room(self, i: int, level: int) -> int | None:
        """The least loaded place with room for `i` and its last `level` ancestors, where the others are."""
        size = self.bytes_with(i, level)
        barred = self.barred(self.members(i, level)) if self.resting else self.where[i]
        candidates = self.candidates(i, level)
        if level == len(self.ancestors[i]):
            p = self._tier_groups[self.tier[i]].least_loaded(size, barred)
        elif len(candidates) > FEW:
            anchor = self.ancestors[i][-1 - level]
            if anchor not in self._groups:
                self._groups[anchor] = self._group(candidates)
            p = self._groups[anchor].least_loaded(size, barred)
        else:
            fitting = [(self.load[p], p) for p in candidates if self.free[p] >= size and p not in barred]
            p = min(fitting)[1] if fitting else None
        if p is not None and level < len(self.ancestors[i]) and self.weight(self.missing(i, p)) > self.free[p]:
            return None  # with more than one parent a place may lack others than the last ones
        return p

    def most_free(self) -> list[int]:
        """[tier], the largest free room."""
        return [max([self.free[p] for p in places], default=-1) for places in self.tiers]

    def loaded(self, p: int) -> set[int]:
        """What this plan put there."""
        return {i for i, came in self.contents[p].items() if came}

    def blocked(self, p: int) -> set[int]:
        """What must stay in `p`: in use, pinned, or needed by such."""
        self.closures(p)
        return self._blocked[p]

    def closures(self, p: int) -> list[Closure]:
        """Everything that may leave `p` with its dependants, lowest density first."""
        if p in self._stale:
            self._refresh(p)
        return self._closures[p]

    def _refresh(self, p: int) -> None:
        self._stale.discard(p)
        here = self.contents[p]
        value = dict.fromkeys(here, 0.0)
        size = dict.fromkeys(here, 0)
        blocked: set[int] = set()
        tired: set[int] = set()
        for i in here:
            chain = (*self.ancestors[i], i)
            for a in chain:
                if a in here:
                    value[a] += self.value[i]
                    size[a] += self.size[i]
            if self.held(i, p):
                blocked.update(chain)
            if p in self.resting.get(i, ()) and i in self.initial[p]:
                tired.update(chain)
        self._blocked[p], self._tired[p] = blocked, tired
        self._closures[p] = sorted(
            [Closure(value[i] / max(1, size[i]), value[i], size[i], i) for i in here if i not in blocked]
        )
        weakest = self.weakest(p)
        self._floors[p] = inf if weakest is None else weakest.density

    def tired(self, p: int) -> set[int]:
        """What was moved lately, and what that needs."""
        self.closures(p)
        return self._tired[p]

    def held(self, i: int, p: int) -> bool:
        return self.artifacts[i].pinned or (i, p) in self.in_use

    def weakest(self, p: int) -> Closure | None:
        """The least dense of what something denser may replace in `p`."""
        return next((closure for closure in self.closures(p) if closure.top not in self._tired[p]), None)

    def floors(self) -> list[float]:
        """[p], the density of the weakest."""
        for p in list(self._stale):
            self._refresh(p)
        return self._floors

    def dependants(self, i: int, p: int) -> set[int]:
        """`i` and what needs it in `p`."""
        return {x for x in self.contents[p] if x == i or i in self.ancestors[x]}

    def choose(
        self,
        p: int,
        wanted: int,
        *,
        keep: Collection[int] = (),
        max_density: float = inf,
        max_value: float = inf,
        tired: bool = False,
        at_most: bool = False,
        order: Sequence[Closure] | None = None,
    ) -> list[int] | None:
        """What to evict from `p` for `wanted` bytes, dependants first; None if that much cannot leave.

        The closure of the lowest density first, counting only what is not chosen yet; then those are spared that the
        others made needless; and if one closure alone would do and costs less, it is that one. `order`: closures with
        something else than their density to go by. `tired`: also what was moved lately. `at_most`: what can leave,
        though it is less than wanted.
        """

        def may_leave(closure: Closure) -> bool:
            return (
                closure.density <= max_density
                and closure.value <= max_value
                and closure.top not in keep
                and (tired or closure.top not in self._tired[p])
            )

        by_value = order is None
        queue = list(self.closures(p) if order is None else order)  # sorted, so it is a heap
        chosen: dict[int, set[int]] = {}
        cover: Counter[int] = Counter()
        freed = 0
        while queue and freed < wanted:
            candidate = heapq.heappop(queue)
            density, top = candidate.density, candidate.top
            if density > max_density:
                break
            if cover[top] or not may_leave(candidate):
                continue
            closure = self.dependants(top, p)
            left = [x for x in closure if not cover[x]]
            if by_value and len(left) < len(closure):
                # The lighter-weighing part is chosen already, so what is left is denser.
                now = self.worth(left) / max(1, self.weight(left))
                if now > density * (1 + 1e-9):
                    heapq.heappush(queue, candidate._replace(density=now))
                    continue
            freed += self.weight(left)
            for inner in closure & chosen.keys():
                cover.subtract(chosen.pop(inner))
            chosen[top] = closure
            cover.update(closure)
        if freed < wanted and not at_most:
            return None
        for top in reversed(list(chosen)):
            alone = [x for x in chosen[top] if cover[x] == 1]
            if freed - self.weight(alone) >= wanted:
                freed -= self.weight(alone)
                cover.subtract(chosen.pop(top))
        if by_value and freed >= wanted > 0:
            loss = self.worth(x for x, times in cover.items() if times)
            singles = [c for c in self.closures(p) if c.size >= wanted and c.value < loss and may_leave(c)]
            if singles:
                top = min((c.value, c.top) for c in singles)[1]
                chosen = {top: self.dependants(top, p)}
        leaving: dict[int, None] = {}
        for closure in chosen.values():
            leaving |= dict.fromkeys(sorted(closure, key=lambda x: (-len(self.ancestors[x]), x)))
        return list(leaving)

    # --- changes -------------------------------------------------------------------------------------------------

    def _put(self, i: int, p: int, *, came: int) -> None:
        self.contents[p][i] = came
        self.where[i].append(p)
        self.free[p] -= self.size[i]
        self.load[p] += self.load_share[i]
        if len(self.where[i]) == 1:
            self._first_or_last(i)
        if i in self._groups:
            self._groups[i].add(p)
            self._groups_at[p].append(self._groups[i])

    def _first_or_last(self, i: int) -> None:
        for child in self.children[i]:
            self._set_level(child)

    def _changed(self, p: int) -> None:
        self._stale.add(p)
        self.changes += 1
        self.changed_at[p] = self.changes
        for group in self._groups_at[p]:
            group.changed(p)

    def load_at(self, i: int, p: int) -> list[int]:
        """Puts `i` with all it lacks into `p`; returns what came."""
        members = self.missing(i, p)
        for a in members:
            self._came += 1
            self._put(a, p, came=0 if a in self.initial[p] else self._came)
            self.gone[p].discard(a)
        self._changed(p)
        return members

    def evict_at(self, members: Iterable[int], p: int) -> None:
        """`members`: closed under dependants."""
        for i in members:
            if self.contents[p].pop(i) == 0:
                self.gone[p].add(i)
            self.where[i].remove(p)
            self.free[p] += self.size[i]
            self.load[p] -= self.load_share[i]
            if not self.where[i]:
                self._first_or_last(i)
            if i in self._groups:
                self._groups[i].discard(p)
                self._groups_at[p].remove(self._groups[i])
        self._changed(p)

    def check(self) -> None:
        for p, here in enumerate(self.contents):
            assert self.free[p] == self.limit[p] - self.weight(here)
            assert all(p in self.where[i] for i in here)
            assert all(a in here for i, came in here.items() if came for a in self.ancestors[i])
        for i, level in enumerate(self.level):
            assert self.need[i] == self.weight(self.members(i, level))
            assert self.candidates(i, level) or level == len(self.ancestors[i])
            assert all(not self.candidates(i, lower) for lower in range(level))
        assert sum(map(len, self.where)) == sum(map(len, self.contents))
