"""Why a plan does what it does, in sentences with the numbers in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Literal, NamedTuple

from serverlesslora.scheduler.artifacts import State, Verdict
from serverlesslora.scheduler.packing import TIERS, Packing
from serverlesslora.scheduler.settings import PolicySettings


class Why(NamedTuple):
    """What made one thing move. Put into words only when the plan is finished: most plans change their mind."""

    kind: Literal["fill", "swap", "pinned", "over"]
    density: float = 0.0  # of what was loaded, with the ancestors it brought
    cause: int = -1  # the artifact that was loaded
    replaced: Sequence[int] = ()


def per_gb(density: float) -> str:
    return f"{density * 1e9:.3g}"


def gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def worth(density: float) -> str:
    return f"{per_gb(density)} s saved per second and GB"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def move_reason(packing: Packing, action: Literal["load", "evict"], i: int, p: int, why: Why) -> str:
    def name(a: int) -> str:
        return packing.artifacts[a].artifact_id

    def valued(a: int) -> str:
        return f"{name(a)} ({per_gb(packing.density[a])})"

    if action == "load":
        if packing.artifacts[i].pinned:
            return f"pinned; {worth(packing.density[i])}"
        if i != why.cause:
            return f"needed by {valued(why.cause)}, with which it saves {per_gb(why.density)} s per second and GB"
        replaced = [valued(x) for x in why.replaced if x in packing.gone[p]]
        return worth(packing.density[i]) + (f"; replaces {some(replaced)}" if replaced else "; there is room")
    parents = [a for a in packing.ancestors[i] if a in packing.gone[p]]
    leaves = f"; leaves with {name(parents[-1])}, which it needs" if parents else ""
    if why.kind == "over":
        limit = gb(packing.limit[p])
        return f"{worth(packing.density[i])}; {packing.places[p].place_id} is over its limit of {limit}{leaves}"
    by = valued(why.cause) if why.cause in packing.contents[p] else "something denser"
    return f"{worth(packing.density[i])}; makes room for {by}{leaves}"


def verdicts(
    packing: Packing, why: Mapping[tuple[int, int], Why], settings: PolicySettings, swap_ratio: float
) -> Iterator[Verdict]:
    """Densest first. The first that was left out is the next to be loaded, the last that may leave the next to go."""
    left_out = _LeftOut(packing, settings, swap_ratio)
    staying = [_Staying(packing, p, swap_ratio) for p in range(len(packing.places))]
    for i in sorted(range(len(packing.density)), key=lambda i: (-packing.density[i], i)):
        for p in sorted((*packing.where[i], *left_out.gone_from.get(i, ()))):
            if i not in packing.contents[p]:
                yield _verdict(packing, i, p, "evict", move_reason(packing, "evict", i, p, why[i, p]))
            elif packing.contents[p][i]:
                yield _verdict(packing, i, p, "load", move_reason(packing, "load", i, p, why[i, p]))
            else:
                yield _verdict(packing, i, p, "kept", staying[p].reason(i))
        if len(packing.where[i]) < packing.copies[i] and i not in left_out.gone_from:
            yield _verdict(packing, i, None, "left out", left_out.reason(i))


def recency_verdicts(packing: Packing, now: float) -> Iterator[Verdict]:
    """What lies where; in each place what was used longest ago comes first and says so."""
    for p, here in enumerate(packing.contents):
        blocked = packing.blocked(p)
        first = True
        for i in sorted(here, key=lambda i: (packing.artifacts[i].last_used, -len(packing.ancestors[i]), i)):
            last_used = packing.artifacts[i].last_used
            used = "never used" if last_used == -inf else f"last used {max(0.0, now - last_used):.0f} s ago"
            if i in blocked:
                yield _verdict(packing, i, p, "kept", f"{used}; in use, pinned or needed by such")
            else:
                yield _verdict(packing, i, p, "kept", f"{used}; the first to leave" if first else used)
                first = False


def _verdict(packing: Packing, i: int, p: int | None, state: State, reason: str) -> Verdict:
    return Verdict(
        artifact_id=packing.artifacts[i].artifact_id,
        place_id=None if p is None else packing.places[p].place_id,
        state=state,
        density=packing.density[i],
        value=packing.value[i],
        size_bytes=packing.size[i],
        reason=reason,
    )


class _Staying:
    """Why things stay in one place."""

    def __init__(self, packing: Packing, p: int, swap_ratio: float) -> None:
        self._packing, self._p = packing, p
        closures = packing.closures(p)
        self._closures = {closure.top: closure for closure in closures}
        self._tired = packing.tired(p)
        self._weakest = packing.weakest(p)
        self._ratio = swap_ratio

    def reason(self, i: int) -> str:
        packing, p = self._packing, self._p
        text = worth(packing.density[i])
        if packing.artifacts[i].pinned:
            return f"{text}; pinned"
        if (i, p) in packing.in_use:
            return f"{text}; in use"
        if i not in self._closures:
            needing = next(x for x in packing.contents[p] if i in packing.ancestors[x] and packing.held(x, p))
            return f"{text}; needed by {packing.artifacts[needing].artifact_id}, which is in use or pinned"
        closure = self._closures[i]
        together = f" ({per_gb(closure.density)} with what needs it)" if closure.size > packing.size[i] else ""
        if i in self._tired:
            return f"{text}{together}; stays for now, moved a moment ago"
        first = f"; the first to leave {packing.places[p].place_id}" if closure is self._weakest else ""
        return f"{text}{together}{first}; leaves only for {per_gb(closure.density * self._ratio)} or more"


class _LeftOut:
    """Why things are in no place, or in fewer than they are wanted in."""

    def __init__(self, packing: Packing, settings: PolicySettings, swap_ratio: float) -> None:
        self._packing = packing
        self._ratio = swap_ratio
        self._threshold = settings.min_gain_per_gb
        self._room = packing.most_free()
        self._limits = [max((packing.limit[p] for p in places), default=0) for places in packing.tiers]
        self._weakest: dict[tuple[int, int], tuple[float, int, int]] = {}  # anchor -> density, place, artifact
        self._next = [True for _ in TIERS]  # nobody is next in line yet
        self.gone_from: dict[int, list[int]] = {}
        for p, gone in enumerate(packing.gone):
            for i in gone:
                self.gone_from.setdefault(i, []).append(p)

    def reason(self, i: int) -> str:
        packing = self._packing
        tier, size, density = packing.tier[i], packing.size[i], packing.density[i]
        text = worth(density)
        if packing.where[i]:
            text = f"{len(packing.where[i])} of {packing.copies[i]} copies; {text} for one more"
        if not packing.tiers[tier]:
            return f"{text}; there is no {TIERS[tier]} memory"
        if size > self._limits[tier]:
            return f"{text}; its {gb(size)} do not fit into any {TIERS[tier]} memory (at most {gb(self._limits[tier])})"
        if packing.artifacts[i].pinned:
            return f"pinned; but no {TIERS[tier]} memory can free {gb(size)}: the rest is pinned or in use"
        if density * 1e9 < self._threshold:
            return f"{text} is less than {self._threshold:.3g} (min_gain_per_gb)"
        level = packing.level[i]
        members = packing.members(i, level)
        total = packing.bytes_with(i, level)
        brought = f" with {some([packing.artifacts[a].artifact_id for a in members[:-1]])}" if level else ""
        text = f"{text}; {'next in line: ' if self._next[tier] else ''}needs {gb(total)}{brought}"
        self._next[tier] = False
        candidates, barred = packing.candidates(i, level), packing.barred(members)
        if barred and all(p in barred for p in candidates):
            return f"{text}; was moved a moment ago"
        text = f"{text}, {gb(max([0, *(packing.free[p] for p in candidates)]))} is free"
        weakest, p, top = self._replaceable(i, level)
        if p < 0:
            return f"{text} and the rest is in use, pinned or was moved a moment ago"
        return (
            f"{text}; would replace {packing.artifacts[top].artifact_id} ({per_gb(weakest)}) in "
            f"{packing.places[p].place_id} if it were worth {per_gb(weakest * self._ratio)} or more, and as much in all"
        )

    def _replaceable(self, i: int, level: int) -> tuple[float, int, int]:
        anchor = self._packing.anchor(i, level)
        if anchor not in self._weakest:
            self._weakest[anchor] = min(
                (
                    (closure.density, p, closure.top)
                    for p in self._packing.candidates(i, level)
                    if (closure := self._packing.weakest(p)) is not None
                ),
                default=(inf, -1, -1),
            )
        return self._weakest[anchor]
