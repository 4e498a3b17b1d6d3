"""The registry's file: its tables, how it is opened, and what SQLite's errors mean for people.

WAL, so that looking at it never waits for a change. synchronous=FULL: who was told that a version is deployed, or that
a bad one was rolled back, must find it so after a power cut too, and changes are so rare that nobody feels the sync.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from serverlesslora.errors import ConfigError, ServerlessLoraError, StorageFull, Unavailable

REGISTRY_FILE = "registry.sqlite"
BUSY_TIMEOUT_S = 5.0  # another server's change takes milliseconds
CHECKED_BYTES = 64 << 20  # files up to this size are checked whole when they are opened, at about 3 s/GB

# Entry n brings a file from version n to n + 1. Published entries are never edited; changes are new entries.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE functions (
            name TEXT NOT NULL PRIMARY KEY, settings TEXT NOT NULL, weights TEXT NOT NULL, previous TEXT,
            last_number INTEGER NOT NULL)""",
        """CREATE TABLE versions (
            name TEXT NOT NULL REFERENCES functions (name), number INTEGER NOT NULL, digest TEXT NOT NULL,
            source TEXT NOT NULL, backbone TEXT NOT NULL, created INTEGER NOT NULL, facts TEXT NOT NULL, identity TEXT,
            PRIMARY KEY (name, number))""",
        # Numbers are not used again when a function is removed and deployed anew.
        "CREATE TABLE removed (name TEXT NOT NULL PRIMARY KEY, last_number INTEGER NOT NULL)",
        """CREATE TABLE history (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, name TEXT NOT NULL, action TEXT NOT NULL,
            who TEXT NOT NULL, detail TEXT NOT NULL)""",
        "CREATE INDEX history_by_name ON history (name, id)",
    ),
)
VERSION = len(MIGRATIONS)


def open_registry(path: Path) -> sqlite3.Connection:
    """Makes the file if there is none, and brings it up to date. Raises ConfigError naming the file and the remedy."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"cannot make the registry of functions {path}: {error.strerror}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # two servers may start at once, and SQLite does not wait to begin a WAL
        return _open(path)
    finally:
        os.close(directory)


def _open(path: Path) -> sqlite3.Connection:
    try:
        if not path.exists():  # who deployed what is nobody else's business
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot make the registry of functions {path}: {error.strerror}") from error
    with readable(path):
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            _refuse_others(db, path)  # before a byte of it is changed
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            _migrate(db, path)
            if path.stat().st_size <= CHECKED_BYTES:
                (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
        except BaseException:
            db.close()
            raise
    return db


def _refuse_others(db: sqlite3.Connection, path: Path) -> int:
    """The file's version. Raises ConfigError for one we cannot know."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConfigError(
            f"the registry of functions {path} was written by a newer version ({version}; this one knows {VERSION}): "
            "update the server, or give it another --state-dir"
        )
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and (version == 0 or not {"functions", "versions"} <= tables):
        raise ConfigError(f"{path} is a database of another program (tables {sorted(tables)[:5]}); move it away")
    return int(version)


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    if _refuse_others(db, path) == VERSION:
        return  # nothing to write: a full disk keeps nobody from serving what is there
    with transaction(db):
        for number, statements in enumerate(MIGRATIONS[_refuse_others(db, path) :], start=1):
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, *, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
    """DEFERRED: one state of the file for reading, whatever others write meanwhile."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk may have ended it already
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What keeps the file from being opened or read, as ConfigError with the remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"cannot open the registry of functions {path}: {error}; may this user read and write it and its "
            "directory, and is there room on its disk?"
        ) from error
    except (sqlite3.Error, msgspec.MsgspecError, AssertionError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the registry of functions {path} is damaged or not ours ({error}); put a copy back, save what is "
            f"readable with `sqlite3 {path} .recover`, or move it and its -wal and -shm files away and deploy again"
        ) from error


def refusal(path: Path, error: sqlite3.Error) -> ServerlessLoraError:
    """What keeps a change from being written. The change did not happen."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest says more than people need
    if code == sqlite3.SQLITE_FULL:
        return StorageFull(f"nothing was changed: the disk of the registry {path} is full; make room and try again")
    if code == sqlite3.SQLITE_READONLY:
        remedy = "it is read-only; let the server write it"
    elif code == sqlite3.SQLITE_BUSY:
        remedy = "another process keeps it locked"
    else:
        remedy = f"{error}; see that its disk works and has room"
    return Unavailable(f"nothing was changed: the registry {path} cannot be written: {remedy}", retry_after_s=10)
