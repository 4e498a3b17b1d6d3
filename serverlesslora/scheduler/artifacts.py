"""What can be loaded ahead, the memories it can be loaded into, and what a plan says about each.

The words of pre-loading as a knapsack with precedence (ServerlessLoRA, arXiv 2505.14468, section 4.1): an artifact has
a value (seconds of waiting it saves per second), a weight (bytes) and parents that must lie in the same memory.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Tier = Literal["host", "device"]
ArtifactKind = Literal["process", "backbone", "worker", "adapter", "kernels"]
State = Literal["kept", "load", "evict", "left out"]


class Place(msgspec.Struct, frozen=True):
    """One memory: the RAM of a host, or a device's. On CPU the host's RAM is both."""

    place_id: str
    tier: Tier
    capacity_bytes: int


class Artifact(msgspec.Struct, frozen=True):
    artifact_id: str  # "backbone:llama", "worker:llama/tenant:acme", "adapter:llama/tenant:acme:<digest>"
    kind: ArtifactKind
    tier: Tier  # the kind of place it can lie in
    size_bytes: int
    delay_s: float  # what a request that needs it waits when it is missing; measured
    rate: float  # requests/s that need it: the sum over its functions
    needs: tuple[str, ...] = ()  # artifacts that must lie in the same place
    copies: int = 1  # places it is wanted in; each copy serves its share of the rate
    pinned: bool = False  # never evicted, always wanted
    last_used: float = float("-inf")

    @property
    def value(self) -> float:
        """Seconds of waiting one copy saves per second."""
        return self.delay_s * self.rate / self.copies

    @property
    def density(self) -> float:
        return self.value / max(1, self.size_bytes)


class Move(msgspec.Struct, frozen=True):
    """One thing to do. Moves of a plan are in an order in which each can be carried out after those before it."""

    action: Literal["load", "evict"]
    artifact_id: str
    place_id: str
    reason: str


class Verdict(msgspec.Struct, frozen=True):
    """What a plan says about one artifact (at one place, unless it was left out of all)."""

    artifact_id: str
    place_id: str | None
    state: State
    density: float  # of the artifact alone, value per byte
    value: float
    size_bytes: int
    reason: str  # one sentence for people


class Plan(msgspec.Struct, frozen=True):
    moves: tuple[Move, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


class Eviction(msgspec.Struct, frozen=True):
    artifact_id: str
    size_bytes: int
    to: Literal["host", "disk"]
    reason: str


class Offload(msgspec.Struct, frozen=True):
    """What leaves a place to free memory; dependants come before what they depend on."""

    evictions: tuple[Eviction, ...] = ()
    freed_bytes: int = 0  # may be less than asked: the rest is in use or pinned
    reason: str = ""


class Wait(msgspec.Struct, frozen=True):
    """For how long to do something, and why."""

    seconds: float
    reason: str
