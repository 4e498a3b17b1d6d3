"""How long every artifact lay in memory: byte-seconds, counted from one change to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from serverlesslora.metering.usage import Residency
from serverlesslora.scheduler.artifacts import ArtifactKind, Tier


class Resident(msgspec.Struct, frozen=True):
    """One artifact in memory, and for whom it is there; nobody: for all."""

    kind: ArtifactKind
    size_bytes: int
    function: str | None = None
    tenant: str | None = None
    domain: str | None = None
    backbone: str | None = None
    tier: Tier = "host"


class ResidencyMeter:
    """Told the whole truth at every change; what was true in between is exact, nothing is sampled."""

    def __init__(self, *, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._now: dict[str, tuple[Resident, float, float]] = {}  # artifact -> (what, since, since on the wall)
        self._ended: list[Residency] = []

    def update(self, present: Mapping[str, Resident]) -> None:
        """`present`: everything that is in memory from now on, by artifact id."""
        now, wall = self._clock(), self._wall_clock()
        for artifact_id, (resident, _, _) in list(self._now.items()):
            if present.get(artifact_id) != resident:
                self._end(artifact_id, now)
        for artifact_id, resident in present.items():
            if artifact_id not in self._now:
                self._now[artifact_id] = (resident, now, wall)

    def take(self) -> list[Residency]:
        """What was held since the last call; what still is goes on from here."""
        now, wall = self._clock(), self._wall_clock()
        for artifact_id, (resident, _, _) in list(self._now.items()):
            self._end(artifact_id, now)
            self._now[artifact_id] = (resident, now, wall)
        taken, self._ended = self._ended, []
        return taken

    def _end(self, artifact_id: str, now: float) -> None:
        resident, since, wall_since = self._now.pop(artifact_id)
        if now > since:
            self._ended.append(
                Residency(
                    artifact_id=artifact_id,
                    kind=resident.kind,
                    function=resident.function,
                    tenant=resident.tenant,
                    domain=resident.domain,
                    size_bytes=resident.size_bytes,
                    seconds=now - since,
                    from_at=wall_since,
                    tier=resident.tier,
                    backbone=resident.backbone,
                )
            )
