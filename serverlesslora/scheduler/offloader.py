"""What leaves a memory that runs full: the least worth per byte, never what is in use.

The dynamic offloader of ServerlessLoRA (arXiv 2505.14468, section 4.3): minimise the value lost for the bytes freed;
what needs an artifact leaves with it. `LruOffloader` asks only when things were used last, `NoOffloader` frees nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import inf

import msgspec

from serverlesslora.scheduler.artifacts import Artifact, Eviction, Offload, Place
from serverlesslora.scheduler.explaining import gb, worth
from serverlesslora.scheduler.packing import Closure, Packing
from serverlesslora.scheduler.settings import PolicySettings


class Offloader:
    def __init__(self, settings: PolicySettings) -> None:
        pass

    def free(
        self,
        place: Place,
        artifacts: Sequence[Artifact],  # those that lie there
        wanted_bytes: int,
        *,
        in_use: Collection[str] = (),
        reason: str = "",  # what the room is for, said in every eviction
    ) -> Offload:
        packing = _one_place(place, artifacts, in_use)
        return _offload(packing, None, wanted_bytes, reason, lambda i: worth(packing.density[i]))


class LruOffloader:
    """What was used longest ago leaves first, an ancestor no earlier than the last used that needs it."""

    def __init__(self, settings: PolicySettings) -> None:
        pass

    def free(
        self,
        place: Place,
        artifacts: Sequence[Artifact],
        wanted_bytes: int,
        *,
        in_use: Collection[str] = (),
        reason: str = "",
    ) -> Offload:
        packing = _one_place(place, artifacts, in_use)
        last_used = [artifact.last_used for artifact in artifacts]
        for i, chain in enumerate(packing.ancestors):
            for a in chain:
                last_used[a] = max(last_used[a], artifacts[i].last_used)
        by_age = sorted(packing.closures(0), key=lambda closure: (last_used[closure.top], closure.size, closure.top))
        order = [closure._replace(density=float(rank)) for rank, closure in enumerate(by_age)]
        newest = max(last_used, default=-inf)

        def age(i: int) -> str:
            at = artifacts[i].last_used
            return "never used" if at == -inf else f"last used {newest - at:.0f} s before the newest here"

        return _offload(packing, order, wanted_bytes, reason, age)


class NoOffloader:
    def __init__(self, settings: PolicySettings) -> None:
        pass

    def free(
        self,
        place: Place,
        artifacts: Sequence[Artifact],
        wanted_bytes: int,
        *,
        in_use: Collection[str] = (),
        reason: str = "",
    ) -> Offload:
        return Offload(reason=f"offloading is off: {gb(wanted_bytes)} more have to wait until something ends")


def _one_place(place: Place, artifacts: Sequence[Artifact], in_use: Collection[str]) -> Packing:
    here = {artifact.artifact_id for artifact in artifacts}
    # What somebody needed may have died before it; that must not keep the others from leaving.
    known = [
        artifact
        if here.issuperset(artifact.needs)
        else msgspec.structs.replace(artifact, needs=tuple(name for name in artifact.needs if name in here))
        for artifact in artifacts
    ]
    return Packing(
        [place], known, {place.place_id: here}, watermark=1.0, in_use={(place.place_id, name) for name in in_use}
    )


def _offload(
    packing: Packing, order: Sequence[Closure] | None, wanted_bytes: int, reason: str, said_of: Callable[[int], str]
) -> Offload:
    if wanted_bytes <= 0:
        return Offload(reason="nothing was asked for")
    place = packing.places[0]
    leaving = packing.choose(0, wanted_bytes, tired=True, at_most=True, order=order) or []
    evictions = tuple(
        Eviction(
            artifact_id=packing.artifacts[i].artifact_id,
            size_bytes=packing.size[i],
            to="host" if packing.artifacts[i].kind == "adapter" and place.tier == "device" else "disk",
            reason=said_of(i) + (f"; {reason}" if reason else ""),
        )
        for i in leaving
    )
    freed = packing.weight(leaving)
    said = f"{gb(freed)} of {gb(wanted_bytes)} leave {place.place_id}"
    if freed < wanted_bytes:
        said += ", the rest is in use, pinned or needed by such"
    return Offload(evictions, freed, f"{reason}: {said}" if reason else said)
