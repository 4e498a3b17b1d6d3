"""Deployed functions as the admin API tells of them, with their versions, also those that are not served now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from serverlesslora.gateway.deployments import Deployments
from serverlesslora.registry.entries import Entry, Version, Weights
from serverlesslora.registry.file import Event
from serverlesslora.registry.functions import Function

State = Literal["served", "unfit", "no backbone"]


class FunctionView(Function, frozen=True, kw_only=True):
    """As one of its versions, and what there is beside it."""

    weights: Weights  # per cent by version
    previous: Weights | None = None  # what a rollback goes back to
    versions: tuple[int, ...] = ()
    state: State = "served"
    problem: str | None = None  # why it does not fit its backbone any more


class VersionView(Version, frozen=True, kw_only=True):
    weight: int = 0  # per cent
    problem: str | None = None


class VersionsView(msgspec.Struct, frozen=True):
    name: str
    weights: Weights
    previous: Weights | None
    versions: tuple[VersionView, ...]
    history: tuple[Event, ...]  # the newest first


def function_view(entry: Entry, deployments: Deployments, number: int | None = None) -> FunctionView:
    """Without a number as the version that most get."""
    function = entry.at(entry.stable.number if number is None else number)
    problem = deployments.problem(function)
    state: State = "unfit" if problem else "served" if deployments.is_here(entry) else "no backbone"
    return FunctionView(
        **msgspec.structs.asdict(function),
        weights=entry.weights,
        previous=entry.previous,
        versions=tuple(version.number for version in entry.versions),
        state=state,
        problem=problem,
    )


def versions_view(entry: Entry, history: Sequence[Event], deployments: Deployments) -> VersionsView:
    versions = tuple(
        VersionView(
            **msgspec.structs.asdict(version),
            weight=entry.weights.get(version.number, 0),
            problem=deployments.problem(version),
        )
        for version in entry.versions
    )
    return VersionsView(entry.name, entry.weights, entry.previous, versions, tuple(history))
