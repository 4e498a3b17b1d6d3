"""The file of API keys: made, listed and revoked by whoever has the state directory, whether a server runs or not.

SQLite in WAL mode, so that a server reads while a key is made. What a person was told is on the disk
(synchronous=FULL): neither kill -9 nor a power cut brings a revoked key back. Rows are never deleted; a file that once
had a key keeps its server closed to everybody without one.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from serverlesslora.errors import ConfigError, NotFound
from serverlesslora.tenancy.key import Grant, Key
from serverlesslora.tenancy.secret import Stored, new_secret

KEYS_FILE = "keys.sqlite"
BUSY_TIMEOUT_S = 5.0  # another process's commit takes milliseconds
VERSION = 1

_TABLE = """CREATE TABLE keys (
    id TEXT NOT NULL PRIMARY KEY, salt BLOB NOT NULL, digest BLOB NOT NULL, details TEXT NOT NULL, name TEXT,
    created_at REAL NOT NULL, expires_at REAL, last_used_at REAL, revoked_at REAL)"""

_encode = msgspec.json.Encoder().encode
_decode_grant = msgspec.json.Decoder(Grant).decode


class Entry(NamedTuple):
    key: Key
    stored: Stored


class NewKey(NamedTuple):
    key: Key
    text: str  # the whole key, never to be seen again


class KeyStore:
    """Opens the file for each call and keeps nothing."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def create(self, grant: Grant, *, name: str | None = None, expires_at: float | None = None) -> NewKey:
        """Returns when the key is on the disk. Raises ConfigError when the file cannot be used."""
        secret = new_secret()
        key = Key(id=secret.id, grant=grant, name=name, created_at=self._clock(), expires_at=expires_at)
        row = (key.id, *secret.stored, _encode(grant).decode(), name, key.created_at, expires_at)
        with self._open(create=True) as db:
            columns = "id, salt, digest, details, name, created_at, expires_at"
            db.execute(f"INSERT INTO keys ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return NewKey(key, secret.text)

    def list_keys(self) -> list[Key]:
        """The oldest first. Raises ConfigError when the file cannot be used; without a file there are none."""
        if not self.path.exists():
            return []
        with self._open() as db:
            return sorted((entry.key for entry in read_entries(db, self.path)), key=lambda key: key.created_at)

    def revoke(self, key_id: str) -> Key:
        """For ever. Revoking again changes nothing. Raises NotFound."""
        missing = NotFound(f"there is no key {key_id[:40]!r} in {self.path}; `serverlesslora keys list` names them")
        if not self.path.exists():
            raise missing
        with self._open() as db:
            db.execute("UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (self._clock(), key_id))
            for entry in read_entries(db, self.path):
                if entry.key.id == key_id:
                    return entry.key
        raise missing

    @contextlib.contextmanager
    def _open(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction; it is on the disk when the block ends well."""
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # It holds digests only; but who has a key is nobody else's business.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            db = connect(self.path)
        except OSError as error:
            raise ConfigError(f"cannot make the file of API keys {self.path}: {error.strerror}") from error
        with contextlib.closing(db), explained(self.path):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            if not has_table(db, self.path):
                db.execute(_TABLE)
                db.execute(f"PRAGMA user_version = {VERSION}")
            yield db
            db.execute("COMMIT")


def connect(path: Path) -> sqlite3.Connection:
    """An existing file. Raises ConfigError."""
    with explained(path):
        uri = f"{path.absolute().as_uri()}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def has_table(db: sqlite3.Connection, path: Path) -> bool:
    """False: the file is empty, its first key is being made. Raises ConfigError for a file that is not ours."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConfigError(
            f"the API keys in {path} were written by a newer version ({version}; this one knows {VERSION}): update it"
        )
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and (version == 0 or "keys" not in tables):
        raise ConfigError(f"{path} is a database of another program (tables {sorted(tables)[:5]}); move it away")
    return bool(tables)


def read_entries(db: sqlite3.Connection, path: Path) -> list[Entry]:
    """Raises ConfigError."""
    with explained(path):
        if not has_table(db, path):
            return []
        rows = db.execute(
            "SELECT id, salt, digest, details, name, created_at, expires_at, last_used_at, revoked_at FROM keys"
        )
        return [
            Entry(
                Key(
                    id=key_id,
                    grant=_decode_grant(details),
                    name=name,
                    created_at=created_at,
                    expires_at=expires_at,
                    last_used_at=last_used_at,
                    revoked_at=revoked_at,
                ),
                Stored(salt, digest),
            )
            for key_id, salt, digest, details, name, created_at, expires_at, last_used_at, revoked_at in rows
        ]


def note_used(db: sqlite3.Connection, used: Mapping[str, float]) -> None:
    """When keys were last used. Raises sqlite3.Error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany(
            "UPDATE keys SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
            [(at, key_id) for key_id, at in used.items()],
        )
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ConfigError with the remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"cannot use the file of API keys {path}: {error}; may this user read and write it, is its disk full?"
        ) from error
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"the file of API keys {path} is damaged or not ours ({error}); put a copy back, or move it and its -wal "
            "and -shm files away, which opens the server to everybody until a new key is made"
        ) from error
