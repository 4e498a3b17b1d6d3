"""What should be deployed against what is: the changes it takes, and how they look to people.

A file declares functions by name, with the adapter each should have. An adapter with another content than any version
has, or on another backbone, makes a new version. Where the file says nothing of who gets which version, that is left as
it is if the declared version is among those in force, else everybody gets it. Nothing here fetches or writes anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from serverlesslora.config import FunctionConfig
from serverlesslora.errors import InvalidRequest
from serverlesslora.registry.entries import (
    ALL,
    Entry,
    Facts,
    Version,
    Weights,
    begun,
    routed,
    shown,
    with_canary,
    with_facts,
    with_version,
)
from serverlesslora.registry.file import Change, Contents
from serverlesslora.registry.functions import Settings, settings_of
from serverlesslora.registry.names import parse_version

Action = Literal["create", "new version", "update", "route", "prune", "unchanged"]


class Declared(FunctionConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A function as a file declares it. Versions are `v4`, or `latest`: the one that its adapter is."""

    canary: dict[str, int] | None = None  # per cent of some versions; the rest stays where most is
    weights: dict[str, int] | None = None  # per cent of all versions that somebody gets

    def __post_init__(self) -> None:
        if self.canary is not None and self.weights is not None:
            raise ValueError(f"function {self.name!r} has both canary and weights; give one of them")


class Fetched(NamedTuple):
    """A declared function whose adapter is in the store and was found to be one that can be served."""

    declared: FunctionConfig
    backbone: str
    digest: str
    facts: Facts
    identity: str | None  # of the backbone


class Row(msgspec.Struct, frozen=True):
    """What happens to one function."""

    name: str
    actions: tuple[Action, ...]
    version: int | None = None  # that its adapter is or becomes
    details: tuple[str, ...] = ()


class Difference(msgspec.Struct, frozen=True):
    rows: tuple[Row, ...]
    revision: int  # of the registry that it was found in
    applied: bool = False

    @property
    def is_empty(self) -> bool:
        return all(row.actions == ("unchanged",) for row in self.rows)


def deployed(contents: Contents, fetched: Fetched, *, now: int, weight: int | None) -> Entry:
    """The function with this adapter among its versions. `weight`: per cent of requests that go to it; None: as a file
    that says nothing of it means. Raises InvalidRequest."""
    before = contents.entries.get(fetched.declared.name)
    entry, number = _with_adapter(before, contents.removed, fetched, now)
    entry = msgspec.structs.replace(entry, settings=settings_of(fetched.declared))
    if weight is None:
        return _as_declared(entry, number, fetched.declared)
    if before is None and weight != ALL:
        raise InvalidRequest(
            f"{weight} %: the first version of {entry.name!r} gets all requests, there is no other", param="weight"
        )
    return entry if weight == 0 else with_canary(entry, {number: weight})


def decide(
    contents: Contents, fetched: Sequence[Fetched], *, now: int, prune: bool = False, keep: Collection[str] = ()
) -> list[Change]:
    """What it takes to have what is declared; `prune`: and nothing else but `keep`. Raises InvalidRequest."""
    changes = []
    for each in fetched:
        name = each.declared.name
        before, after = contents.entries.get(name), deployed(contents, each, now=now, weight=None)
        if before != after:
            row = describe(before, after)
            changes.append(Change(name, before, after, ", ".join(row.actions), "; ".join(row.details)))
    if prune:
        declared = {each.declared.name for each in fetched} | set(keep)
        for name, entry in contents.entries.items():
            if name not in declared:
                changes.append(Change(name, entry, None, "prune", f"it had {shown(entry.weights)}"))
    return changes


def differences(contents: Contents, fetched: Sequence[Fetched], changes: Sequence[Change]) -> tuple[Row, ...]:
    """A row for every declared function and every pruned one."""
    by_name = {change.name: change for change in changes}
    rows = []
    for each in fetched:
        name = each.declared.name
        before = contents.entries.get(name)
        after = by_name[name].after if name in by_name else before
        version = after.find(each.digest, each.backbone) if after else None
        assert version is not None
        rows.append(msgspec.structs.replace(describe(before, after), version=version.number))
    rows += [describe(change.before, None) for change in changes if change.after is None]
    return tuple(rows)


def describe(before: Entry | None, after: Entry | None) -> Row:
    """From one state of a function to another."""
    if after is None:
        assert before is not None
        return Row(before.name, ("prune",), None, (f"removed with its {len(before.versions)} versions",))
    if before is None:
        latest = after.latest
        return Row(after.name, ("create",), latest.number, (_content(latest), *_settings_details(Settings(), after)))
    actions: list[Action] = []
    details: list[str] = []
    if after.last_number != before.last_number:
        actions.append("new version")
        details.append(f"{_content(before.latest)} -> {_content(after.latest)}")
    if changed := _settings_details(before.settings, after):
        actions.append("update")
        details += changed
    if after.weights != before.weights:
        actions.append("route")
        details.append(f"{shown(before.weights)} -> {shown(after.weights)}")
    return Row(after.name, tuple(actions) or ("unchanged",), after.latest.number, tuple(details))


def _with_adapter(before: Entry | None, removed: Mapping[str, int], fetched: Fetched, now: int) -> tuple[Entry, int]:
    """The entry with a version that is this adapter, and its number."""
    known = before.find(fetched.digest, fetched.backbone) if before else None
    if before is not None and known is not None:
        if fetched.identity in (None, known.identity):
            return before, known.number
        return with_facts(before, known.number, fetched.facts, fetched.identity), known.number
    last = before.last_number if before else removed.get(fetched.declared.name, 0)
    version = Version(
        number=last + 1,
        digest=fetched.digest,
        source=fetched.declared.adapter,
        backbone=fetched.backbone,
        created=now,
        facts=fetched.facts,
        identity=fetched.identity,
    )
    if before is None:
        return begun(fetched.declared.name, version, Settings()), version.number
    return with_version(before, version), version.number


def _as_declared(entry: Entry, number: int, declared: FunctionConfig) -> Entry:
    if isinstance(declared, Declared) and declared.weights is not None:
        return routed(entry, _numbered(declared.weights, number, "weights"))
    if isinstance(declared, Declared) and declared.canary is not None:
        return with_canary(entry, _numbered(declared.canary, number, "canary"), rest=number)
    return entry if number in entry.weights else routed(entry, {number: ALL})


def _numbered(weights: Mapping[str, int], number: int, param: str) -> Weights:
    """Versions as people write them. Raises InvalidRequest."""
    numbered: Weights = {}
    for text, weight in weights.items():
        version = number if text == "latest" else parse_version(text)
        if version is None or version in numbered:
            raise InvalidRequest(f"{text!r}: name each version once, as v4 or latest", param=param)
        numbered[version] = weight
    return numbered


def _content(version: Version) -> str:
    return f"v{version.number} {version.digest[:12]} on {version.backbone}"


def _settings_details(before: Settings, after: Entry) -> tuple[str, ...]:
    pairs = [(name, getattr(before, name), getattr(after.settings, name)) for name in Settings.__struct_fields__]
    return tuple(f"{name}: {_plain(old)} -> {_plain(new)}" for name, old, new in pairs if old != new)


def _plain(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
