"""From deployed functions to artifacts: which there are, how large, how slow to load, how often needed.

The live server and the simulator make the same artifacts of the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from types import MappingProxyType

import msgspec

from serverlesslora.errors import ConfigError
from serverlesslora.scheduler.artifacts import Artifact, ArtifactKind, Tier
from serverlesslora.scheduler.profile import BackboneProfile, Profile
from serverlesslora.scheduler.settings import Switch

RANK: Mapping[ArtifactKind, int] = MappingProxyType({"backbone": 0, "worker": 1, "adapter": 2})
NOTHING_USED: Mapping[str, float] = MappingProxyType({})


class FunctionFacts(msgspec.Struct, frozen=True):
    name: str
    tenant: str | None
    domain: str  # names its backbone too: "llama/tenant:acme"
    backbone: str
    digest: str | None  # None: the bare backbone
    adapter_bytes: int
    pinned: bool = False
    slo_s: float | None = None
    share: float = 1.0  # of the function's requests: it may have several adapters at once


def backbone_id(name: str) -> str:
    return f"backbone:{name}"


def worker_id(domain: str) -> str:
    return f"worker:{domain}"


def adapter_id(domain: str, digest: str) -> str:
    return f"adapter:{domain}:{digest}"


def catalogue(
    functions: Sequence[FunctionFacts],
    *,
    rate: Callable[[str], float],  # function -> expected requests/s
    profile: Profile,
    tier: Tier,  # the memory that workers compute in
    last_used: Mapping[str, float] = NOTHING_USED,  # function -> when
    service_s: Callable[[str], float] | None = None,  # function -> device seconds of one request
    device_share: float = 0.7,  # device seconds per second one place gives before requests queue up
    max_copies: int = 1,  # places there are
    sharing: Switch = "on",
) -> list[Artifact]:
    """Backbones, then workers, then adapters; each with the summed rate of its functions.

    An artifact is wanted in as many places as its load needs: device seconds per second asked for over those a place
    gives. Without `sharing` a worker carries its own copy of the backbone, and there is none to share. Raises
    ConfigError for a backbone that was not measured.
    """
    assert device_share > 0 and max_copies >= 1
    gathered: dict[str, _Gathered] = {}

    def gather(artifact_id: str, kind: ArtifactKind, size_bytes: int, delay_s: float, *needs: str) -> _Gathered:
        if artifact_id not in gathered:
            gathered[artifact_id] = _Gathered(kind, size_bytes, delay_s, needs)
        return gathered[artifact_id]

    for function in functions:
        measured = _measured(function, profile)
        worker = worker_id(function.domain)
        if sharing == "on":
            backbone = backbone_id(function.backbone)
            parts = [
                gather(backbone, "backbone", measured.size_bytes, measured.load_s),
                gather(worker, "worker", profile.worker_bytes, profile.worker_s, backbone),
            ]
        else:
            whole = profile.worker_bytes + measured.size_bytes
            parts = [gather(worker, "worker", whole, profile.worker_s + measured.copy_s)]
        if function.digest is not None:
            delay_s = profile.adapter_s + function.adapter_bytes * profile.adapter_byte_s
            name = adapter_id(function.domain, function.digest)
            parts.append(gather(name, "adapter", function.adapter_bytes, delay_s, worker))
        arrivals = rate(function.name) * function.share
        load = arrivals * service_s(function.name) if service_s else 0.0
        used = last_used.get(function.name, -inf)
        for part in parts:
            part.add(arrivals, load, used, pinned=function.pinned)
    return [
        Artifact(
            artifact_id=artifact_id,
            kind=part.kind,
            tier=tier,
            size_bytes=part.size_bytes,
            delay_s=part.delay_s,
            rate=part.rate,
            needs=part.needs,
            copies=min(max_copies, max(1, ceil(part.load / device_share * (1 - 1e-9)))),  # 3 · 0.7 / 0.7 is 3
            pinned=part.pinned,
            last_used=part.last_used,
        )
        for artifact_id, part in sorted(gathered.items(), key=lambda item: RANK[item[1].kind])
    ]


@dataclass(slots=True)
class _Gathered:
    """An artifact while its functions are added up."""

    kind: ArtifactKind
    size_bytes: int
    delay_s: float
    needs: tuple[str, ...]
    rate: float = 0.0
    load: float = 0.0  # device seconds per second
    last_used: float = -inf
    pinned: bool = False

    def add(self, rate: float, load: float, last_used: float, *, pinned: bool) -> None:
        self.rate += rate
        self.load += load
        self.last_used = max(self.last_used, last_used)
        self.pinned |= pinned


def _measured(function: FunctionFacts, profile: Profile) -> BackboneProfile:
    measured = profile.backbones.get(function.backbone)
    if measured is None:
        raise ConfigError(
            f"function {function.name!r}: the profile ({profile.measured_on}) has no backbone {function.backbone!r}, "
            f"only {', '.join(sorted(profile.backbones)) or 'none'}; measure it, or name one of these"
        )
    return measured
