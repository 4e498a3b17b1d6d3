"""The registry on the disk: read whole, changed entry by entry, one transaction per change.

Every transaction leaves at least one row of history, whose number is the file's revision. So a change that was decided
on an older state than the file's, because a second server shares it, is found out and decided again.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from serverlesslora.registry.entries import Entry, Facts, Version, Weights
from serverlesslora.registry.functions import Settings
from serverlesslora.registry.schema import open_registry, readable, refusal, transaction

KEPT_HISTORY = 10_000  # rows, of all functions together

_encode = msgspec.json.Encoder().encode
_settings = msgspec.json.Decoder(Settings).decode
_weights = msgspec.json.Decoder(Weights).decode
_facts = msgspec.json.Decoder(Facts).decode

_PUT_FUNCTION = """INSERT INTO functions VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET
    settings = excluded.settings, weights = excluded.weights, previous = excluded.previous,
    last_number = excluded.last_number"""
_PUT_REMOVED = """INSERT INTO removed VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET
    last_number = max(last_number, excluded.last_number)"""


class Change(NamedTuple):
    """Of one entry. None: there was none, or there is none any more."""

    name: str
    before: Entry | None
    after: Entry | None
    action: str  # for the history: "deploy", "route", ...
    detail: str


class Event(msgspec.Struct, frozen=True):
    """A row of history."""

    id: int
    at: float  # unix seconds
    name: str
    action: str
    who: str
    detail: str


class Contents(NamedTuple):
    entries: dict[str, Entry]
    removed: dict[str, int]  # name -> the last number of the function that was removed
    revision: int


class Stale(Exception):
    """The file has changed since it was read: another server shares it."""


class RegistryFile:
    """May be used from any thread."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError when the file cannot be used."""
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._db = open_registry(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def load(self) -> Contents:
        """Raises ConfigError for what is damaged."""
        with self._lock, readable(self.path), transaction(self._db, kind="DEFERRED"):
            versions: dict[str, list[Version]] = {}
            columns = "name, number, digest, source, backbone, created, facts, identity"
            for name, number, digest, source, backbone, created, facts, identity in self._db.execute(
                f"SELECT {columns} FROM versions ORDER BY name, number"
            ):
                versions.setdefault(name, []).append(
                    Version(
                        number=number,
                        digest=digest,
                        source=source,
                        backbone=backbone,
                        created=created,
                        facts=_facts(facts),
                        identity=identity,
                    )
                )
            entries = {}
            for name, settings, weights, previous, last_number in self._db.execute(
                "SELECT name, settings, weights, previous, last_number FROM functions ORDER BY name"
            ):
                entry = entries[name] = Entry(
                    name=name,
                    versions=tuple(versions.get(name, ())),
                    weights=_weights(weights),
                    settings=_settings(settings),
                    previous=None if previous is None else _weights(previous),
                    last_number=last_number,
                )
                entry.check()
            removed = dict(self._db.execute("SELECT name, last_number FROM removed"))
            return Contents(entries, removed, self._revision())

    def write(self, changes: Sequence[Change], *, who: str, revision: int) -> int:
        """All of them or none; returns the new revision when they are on the disk.

        Raises Stale when the file is not at `revision`, StorageFull or Unavailable when it cannot be written.
        """
        assert changes
        with self._lock:
            try:
                with transaction(self._db):
                    if self._revision() != revision:
                        raise Stale
                    for change in changes:
                        self._write(change)
                        row = (self._clock(), change.name, change.action, who, change.detail)
                        self._db.execute(
                            "INSERT INTO history (at, name, action, who, detail) VALUES (?, ?, ?, ?, ?)", row
                        )
                    revision = self._revision()
                    self._db.execute("DELETE FROM history WHERE id <= ?", (revision - KEPT_HISTORY,))
            except sqlite3.Error as error:
                raise refusal(self.path, error) from error
            return revision

    def revision(self) -> int:
        with self._lock, readable(self.path):
            return self._revision()

    def history(self, name: str, *, limit: int = 50) -> list[Event]:
        """The newest first, also of a function that was removed."""
        with self._lock, readable(self.path):
            rows = self._db.execute(
                "SELECT id, at, name, action, who, detail FROM history WHERE name = ? ORDER BY id DESC LIMIT ?",
                (name, limit),
            )
            return [Event(*row) for row in rows]

    def _revision(self) -> int:
        row = self._db.execute("SELECT max(id) FROM history").fetchone()
        return row[0] or 0

    def _write(self, change: Change) -> None:
        name, before, after = change.name, change.before, change.after
        if after is None:
            assert before is not None
            self._db.execute("DELETE FROM versions WHERE name = ?", (name,))
            self._db.execute("DELETE FROM functions WHERE name = ?", (name,))
            self._db.execute(_PUT_REMOVED, (name, before.last_number))
            return
        after.check()
        previous = None if after.previous is None else _encode(after.previous).decode()
        texts = (_encode(after.settings).decode(), _encode(after.weights).decode(), previous)
        self._db.execute(_PUT_FUNCTION, (name, *texts, after.last_number))
        known = {version.number: version for version in before.versions} if before else {}
        for number in known.keys() - {version.number for version in after.versions}:
            self._db.execute("DELETE FROM versions WHERE name = ? AND number = ?", (name, number))
        for version in after.versions:
            if known.get(version.number) != version:
                row = (version.digest, version.source, version.backbone, version.created)
                facts = _encode(version.facts).decode()
                self._db.execute(
                    "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (name, version.number, *row, facts, version.identity),
                )
