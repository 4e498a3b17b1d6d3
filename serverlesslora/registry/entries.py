"""A function with all its versions, and the changes one may make to it; values in, values out.

Versions are numbered from 1 and never change; a number is not used again, not even when its version is removed. Who
gets which is a weight per version, in per cent; what was in force before the last change of it is kept for a rollback.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from serverlesslora.errors import InvalidRequest, NotFound
from serverlesslora.registry.functions import Function, Settings

ALL = 100  # per cent
Weights = dict[int, int]  # version -> per cent, none of them 0, ALL together


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What loading an adapter found out; true for one backbone only."""

    size_bytes: int = 0
    rank: int = 0
    modules: int = 0
    kinds: tuple[str, ...] = ()


class Version(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    digest: str
    source: str
    backbone: str
    created: int  # unix seconds
    facts: Facts = Facts()
    identity: str | None = None  # of the backbone that the facts are true for; None: it was not known


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    versions: tuple[Version, ...]  # by number
    weights: Weights
    settings: Settings = Settings()
    previous: Weights | None = None  # what a rollback goes back to
    last_number: int  # also of versions that were removed

    def version(self, number: int) -> Version:
        """Raises NotFound."""
        for version in self.versions:
            if version.number == number:
                return version
        known = ", ".join(f"v{version.number}" for version in self.versions)
        raise NotFound(f"the function {self.name!r} has no version v{number}, it has {known}", param="version")

    @property
    def latest(self) -> Version:
        return self.versions[-1]

    @property
    def stable(self) -> Version:
        return self.version(stable_of(self.weights))

    def find(self, digest: str, backbone: str) -> Version | None:
        """The newest version with this content on this backbone."""
        found = [each for each in self.versions if (each.digest, each.backbone) == (digest, backbone)]
        return found[-1] if found else None

    def at(self, number: int) -> Function:
        """Raises NotFound."""
        version = self.version(number)
        return Function(
            name=self.name,
            digest=version.digest,
            backbone=version.backbone,
            source=version.source,
            created=version.created,
            version=number,
            share=self.weights.get(number, 0) / ALL,
            **msgspec.structs.asdict(version.facts),
            **msgspec.structs.asdict(self.settings),
        )

    def check(self) -> None:
        """What must hold of every entry, in memory as on the disk."""
        numbers = [version.number for version in self.versions]
        assert numbers == sorted(set(numbers)), f"{self.name}: versions {numbers}"
        assert numbers and 1 <= numbers[0] <= numbers[-1] <= self.last_number, f"{self.name}: {self.last_number}"
        for weights in (self.weights, self.previous):
            if weights is not None:
                assert weights.keys() <= set(numbers), f"{self.name}: {weights} of {numbers}"
                assert sum(weights.values()) == ALL and min(weights.values()) > 0, f"{self.name}: {weights}"


def stable_of(weights: Mapping[int, int]) -> int:
    """The version that most get; of two the newer."""
    return max(weights, key=lambda number: (weights[number], number))


def begun(name: str, version: Version, settings: Settings) -> Entry:
    return Entry(
        name=name, versions=(version,), weights={version.number: ALL}, settings=settings, last_number=version.number
    )


def with_version(entry: Entry, version: Version) -> Entry:
    """Nobody gets it yet."""
    assert version.number > entry.last_number
    return msgspec.structs.replace(entry, versions=(*entry.versions, version), last_number=version.number)


def with_facts(entry: Entry, number: int, facts: Facts, identity: str | None) -> Entry:
    versions = tuple(
        msgspec.structs.replace(each, facts=facts, identity=identity) if each.number == number else each
        for each in entry.versions
    )
    return msgspec.structs.replace(entry, versions=versions)


def routed(entry: Entry, weights: Mapping[int, int]) -> Entry:
    """Raises InvalidRequest for what does not add up, NotFound for a version there is not."""
    kept = {number: weights[number] for number in sorted(weights) if weights[number]}
    for number in weights:
        entry.version(number)
    if any(weight < 0 for weight in weights.values()) or sum(kept.values()) != ALL:
        raise InvalidRequest(
            f"the weights of {entry.name!r} are {shown(weights)}; they must be per cent and add up to {ALL}",
            param="weights",
        )
    if kept == entry.weights:
        return entry
    return msgspec.structs.replace(entry, weights=kept, previous=entry.weights)


def with_canary(entry: Entry, canary: Mapping[int, int], *, rest: int | None = None) -> Entry:
    """The canaries get so many per cent each, and one other version gets the rest: `rest`, or what most get now.

    Raises as `routed` does, and InvalidRequest when nobody is left to get the rest.
    """
    for number, weight in canary.items():
        entry.version(number)
        if not 0 <= weight <= ALL:
            raise InvalidRequest(f"v{number}={weight}: give per cent, 0 to {ALL}", param="canary")
    left = ALL - sum(canary.values())
    if left < 0:
        raise InvalidRequest(f"the canaries of {entry.name!r} get more than {ALL} per cent together", param="canary")
    if left and (rest is None or rest in canary):
        others = {number: weight for number, weight in entry.weights.items() if number not in canary}
        if not others:  # only canaries are in force: what was before them, or the newest of the other versions
            others = {each.number: 1 for each in entry.versions if each.number not in canary}
        if not others:
            raise InvalidRequest(
                f"no version of {entry.name!r} is left for the other {left} per cent: it has no other", param="canary"
            )
        rest = stable_of(others)
    return routed(entry, {**canary, rest: left} if left and rest is not None else canary)


def rolled_back(entry: Entry, to: int | None = None) -> Entry:
    """All to one version, or what was in force before. Raises InvalidRequest when there is nothing to go back to."""
    if to is not None:
        return routed(entry, {to: ALL})
    if entry.previous is None:
        raise InvalidRequest(
            f"nothing is known of {entry.name!r} before {shown(entry.weights)}; name a version to go back to",
            param="to",
        )
    return routed(entry, entry.previous)


def without_version(entry: Entry, number: int) -> Entry:
    """Raises InvalidRequest for a version that somebody gets, NotFound for one there is not."""
    entry.version(number)
    if number in entry.weights:
        raise InvalidRequest(
            f"{entry.weights[number]} % of the requests for {entry.name!r} go to v{number}; route them to another "
            "version first, or remove the function",
            param="version",
        )
    previous = None if entry.previous is None or number in entry.previous else entry.previous
    versions = tuple(each for each in entry.versions if each.number != number)
    return msgspec.structs.replace(entry, versions=versions, previous=previous)


def shown(weights: Mapping[int, int]) -> str:
    """For people: "v3 90 %, v4 10 %"."""
    return ", ".join(f"v{number} {weights[number]} %" for number in sorted(weights))
