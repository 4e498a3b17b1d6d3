"""The ledger's file: its tables, how older ones are brought up to date, and which servers are writing to it.

A SQLite database in WAL mode with synchronous=NORMAL: a commit is a write(2) to the log, so it survives the death of
the process at any moment (kill -9 included). Only a power cut may take the newest commits; the file stays consistent.
Every server that writes holds a lock file beside it. The kernel drops the lock when the server dies, so the next one
that starts knows whose open requests were cut off and leaves those of living servers alone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from pathlib import Path

from serverlesslora.errors import ConfigError

BUSY_TIMEOUT_S = 5.0  # another server's commit takes milliseconds
CHECKED_BYTES = 16 << 20  # files up to this size are checked whole when they are opened, at about 3 s/GB

# Entry n brings a file from version n to n + 1. Published entries are never edited; changes are new entries.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE requests (
            request_id TEXT NOT NULL PRIMARY KEY, function TEXT NOT NULL, tenant TEXT, domain TEXT NOT NULL,
            backbone TEXT NOT NULL, digest TEXT, started_at REAL NOT NULL, prompt_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, device_s REAL NOT NULL,
            queue_s REAL NOT NULL, ttft_s REAL, duration_s REAL NOT NULL, rung TEXT NOT NULL, status TEXT NOT NULL,
            slo_missed INTEGER NOT NULL, device TEXT, server TEXT NOT NULL)""",
        "CREATE INDEX requests_by_start ON requests (started_at, request_id)",
        "CREATE INDEX requests_open ON requests (server) WHERE status = 'open'",
        """CREATE TABLE residency (
            artifact_id TEXT NOT NULL, kind TEXT NOT NULL, function TEXT, tenant TEXT, domain TEXT,
            size_bytes INTEGER NOT NULL, seconds REAL NOT NULL, from_at REAL NOT NULL, tier TEXT NOT NULL,
            backbone TEXT, until_at REAL NOT NULL)""",
        "CREATE INDEX residency_by_end ON residency (until_at)",
    ),
)
VERSION = len(MIGRATIONS)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Makes the file if there is none, and brings it up to date. Raises ConfigError naming the file and the remedy."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # prompts are not in it, but who asked how much is nobody else's business
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot make the usage ledger {path}: {error.strerror}") from error
    try:
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            _migrate(db, path)
            if path.stat().st_size <= CHECKED_BYTES:
                (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    return db


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Works beside a server that writes, and without one. Raises ConfigError as above."""
    if not path.exists():
        raise ConfigError(f"there is no usage ledger {path}; a server makes it when it starts")
    try:
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
        )
        try:
            if _version(db, path) != VERSION:
                raise ConfigError(
                    f"the usage ledger {path} is of version {_version(db, path)}, this program reads {VERSION}; "
                    "start a server of this version on it once"
                )
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise unusable(path, error) from error
    return db


def unusable(path: Path, error: sqlite3.Error) -> ConfigError:
    if isinstance(error, sqlite3.OperationalError):
        return ConfigError(f"cannot open the usage ledger {path}: {error}; is its disk full or read-only?")
    return ConfigError(
        f"the usage ledger {path} is damaged or no ledger ({error}); move it and its -wal and -shm files away and a "
        f"new one is begun, or save what is readable with `sqlite3 {path} .recover`"
    )


def _version(db: sqlite3.Connection, path: Path) -> int:
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return 0
    if "schema_version" not in tables:
        raise ConfigError(
            f"{path} is a database of another program (tables {sorted(tables)[:5]}); give the usage ledger another path"
        )
    row = db.execute("SELECT max(version) FROM schema_version").fetchone()
    return int(row[0] or 0)


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")  # two servers may start at once
    try:
        version = _version(db, path)
        if version > VERSION:
            raise ConfigError(
                f"the usage ledger {path} is of version {version}, written by a newer server; this one knows up to "
                f"{VERSION}. Update the server, or give it another path"
            )
        if version == 0:
            db.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in statements:
                db.execute(statement)
            db.execute("DELETE FROM schema_version")
            db.execute("INSERT INTO schema_version VALUES (?)", (number,))
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


class Claim:
    """This server's name in the ledger, and the lock that says it lives. Taken inside a write transaction, so that
    nobody can find the lock file before it is locked."""

    def __init__(self, path: Path) -> None:
        self.server = secrets.token_hex(8)
        self._lock = _lock_path(path, self.server)
        # flock, not a lock by process: two ledgers of one process must see each other. Never inherited across exec.
        self._fd = os.open(self._lock, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        self._lock.unlink(missing_ok=True)
        os.close(self._fd)


def _lock_path(path: Path, server: str) -> Path:
    return path.with_name(f"{path.name}-{server}.lock")


def _is_dead(path: Path, server: str) -> bool:
    lock = _lock_path(path, server)
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def close_interrupted(db: sqlite3.Connection, path: Path) -> int:
    """Open requests of dead servers become `interrupted`; returns how many."""
    servers = [server for (server,) in db.execute("SELECT DISTINCT server FROM requests WHERE status = 'open'")]
    closed = 0
    for server in servers:
        if _is_dead(path, server):
            closed += db.execute(
                "UPDATE requests SET status = 'interrupted' WHERE status = 'open' AND server = ?", (server,)
            ).rowcount
    # A server that was killed between two requests leaves a lock file and no row.
    for lock in path.parent.iterdir():
        server = lock.name.removeprefix(f"{path.name}-").removesuffix(".lock")
        if lock == _lock_path(path, server) and _is_dead(path, server):
            lock.unlink(missing_ok=True)
    return closed
