"""The keys a running server knows: checked from memory, read again when the file changes.

A check is one SHA-256 and two comparisons, a few microseconds; it touches no file. A thread asks SQLite twice a second
whether somebody changed the file (`PRAGMA data_version`, microseconds), so a key made or revoked at the command line
counts within a second. The same thread writes down when keys were used.

Without a key nobody needs one. From the first on everybody does, even when all are revoked and even when the file is
deleted while the server runs: a server never opens itself. When the file cannot be read, what was read last holds; when
it could never be read, nobody is let in.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from serverlesslora.errors import ConfigError, Unauthorized, Unavailable
from serverlesslora.tenancy.key import Key
from serverlesslora.tenancy.secret import NOBODY, id_of, is_the_one
from serverlesslora.tenancy.store import Entry, connect, explained, note_used, read_entries

log = logging.getLogger("serverlesslora.keys")

LOOK_EVERY_S = 0.5
NOTE_EVERY_S = 60.0


class Known(msgspec.Struct, frozen=True):
    """One reading of the file."""

    entries: Mapping[str, Entry] = {}
    is_required: bool = False  # there is a key, or was one
    is_admin_required: bool = False  # the same for admin keys
    is_unreadable: bool = False  # there is a file, and nobody knows what is in it

    def after(self, entries: list[Entry]) -> Known:
        return Known(
            {entry.key.id: entry for entry in entries},
            self.is_required or bool(entries),
            self.is_admin_required or any(entry.key.grant.admin for entry in entries),
        )


class Keyring:
    def __init__(
        self, path: Path, *, look_every_s: float = LOOK_EVERY_S, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.problem: str | None = None  # why the file is not being read, for people; None: all is well
        self._look_every_s = look_every_s
        self._clock = clock
        self._known = Known()
        self._noted: dict[str, float] = {}  # when each key's use was last put into `_used`
        self._used: dict[str, float] = {}  # to be written; guarded by _lock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # The thread's own:
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode: a file put in its place is another file
        self._version: int | None = None

    def startup(self) -> None:
        """Raises ConfigError when there is a file and it cannot be used: a server does not guess who may come in."""
        assert self._thread is None, "started twice"
        self._look()
        self._thread = threading.Thread(target=self._main_loop, name="keys", daemon=True)
        self._thread.start()

    def shutdown(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self._write_used()
        self._close()

    # -- the server's side: from memory, never waits --

    @property
    def is_required(self) -> bool:
        return self._known.is_required

    def check(self, text: str | None) -> Key | None:
        """The key that was presented; None while nobody needs one. Raises Unauthorized."""
        known = self._readable()
        return self._valid(known, text) if known.is_required else None

    def check_admin(self, text: str | None) -> Key | None:
        """The same for the admin API, which is open until there is an admin key."""
        known = self._readable()
        if not known.is_admin_required:
            return None
        key = self._valid(known, text) if text else None
        if key is None or not key.grant.admin:
            raise Unauthorized(
                "The admin API needs an admin key, which `serverlesslora keys create --admin` makes; commands send it "
                "from --admin-key or SERVERLESSLORA_ADMIN_KEY."
            )
        return key

    def _readable(self) -> Known:
        known = self._known
        if known.is_unreadable:
            raise Unavailable("The API keys cannot be read; the server's log says why.", retry_after_s=5)
        return known

    def _valid(self, known: Known, text: str | None) -> Key:
        if not text:
            raise Unauthorized("An API key is needed: send the header 'Authorization: Bearer sk-slora-…'.")
        now = self._clock()
        key_id = id_of(text)
        entry = known.entries.get(key_id) if key_id is not None else None
        is_right = is_the_one(text, NOBODY if entry is None else entry.stored)
        if entry is None or not is_right or entry.key.state(now) != "valid":
            # One answer for all: whether a key once was good is nobody's business who does not have it.
            raise Unauthorized("The API key is unknown, expired or revoked.")
        if now - self._noted.get(entry.key.id, 0.0) >= NOTE_EVERY_S:
            self._noted[entry.key.id] = now
            with self._lock:
                self._used[entry.key.id] = now
        return entry.key

    # -- the thread's side --

    def _main_loop(self) -> None:
        while not self._stop.wait(self._look_every_s):
            try:
                self._look()
                problem = None
            except Exception as error:  # a bug here must not leave the keys unwatched for ever either
                self._close()
                problem = error.message if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
                if not self._known.is_required:
                    self._known = Known(is_unreadable=True)
            if problem != self.problem:
                log.log(logging.ERROR if problem else logging.WARNING, "%s", problem or "the API keys are read again")
            self.problem = problem
            self._write_used()

    def _look(self) -> None:
        """Raises ConfigError."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._close()
            if self._known.is_required:
                raise ConfigError(f"{self.path} is gone; the keys it had stay in force until the server ends") from None
            self._known = Known()
            return
        except OSError as error:
            raise ConfigError(f"cannot read the file of API keys {self.path}: {error.strerror}") from error
        if self._file != (status.st_dev, status.st_ino):
            self._close()
            self._db = connect(self.path)
            self._file = (status.st_dev, status.st_ino)
        assert self._db is not None
        # Asked before reading: what is committed in between is seen the next time.
        with explained(self.path):
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if version != self._version or self._known.is_unreadable:
            self._known = self._known.after(read_entries(self._db, self.path))
            self._version = version

    def _write_used(self) -> None:
        with self._lock:
            used, self._used = self._used, {}
        if used and self._db is not None:
            with contextlib.suppress(sqlite3.Error):  # only a remark; the next minute has another
                note_used(self._db, used)

    def _close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = self._file = self._version = None
