"""One source into the store, start to end: a place to work, the transfer, its check, and its entry. In a thread."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from serverlesslora.adapters.entries import Entries
from serverlesslora.adapters.files import Identity, identify
from serverlesslora.adapters.remote import Remote
from serverlesslora.adapters.room import Room
from serverlesslora.adapters.sources import Source
from serverlesslora.adapters.transfer import Stopped, Transfer, TransferLimits
from serverlesslora.errors import AdapterChanged, AdapterInvalid, ServerlessLoraError, StorageFull, Unavailable

log = logging.getLogger("serverlesslora.adapters")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

OnBytes = Callable[[int], None]  # bytes that arrived; called from other threads


class Fetching(NamedTuple):
    """A transfer under way, for people."""

    source: str
    seconds: float
    done_bytes: int
    total_bytes: int | None  # None: not known


class _Job:
    def __init__(self, source: str) -> None:
        self.source = source
        self.began_at = time.monotonic()
        self.done_bytes = 0
        self.total_bytes: int | None = None
        self.remote: Remote | None = None
        self._lock = threading.Lock()

    def arrived(self, count: int) -> None:
        with self._lock:
            self.done_bytes += count


class Fetcher:
    def __init__(
        self, entries: Entries, room: Room, limits: TransferLimits, make_remote: Callable[[Source], Remote]
    ) -> None:
        self._entries = entries
        self._room = room
        self._limits = limits
        self._make_remote = make_remote
        self._jobs: set[_Job] = set()
        self._stop = threading.Event()

    def fetch(self, source: Source, name: str, expected: str | None, on_bytes: OnBytes | None = None) -> Identity:
        """It is in the store, and held once, when this returns. `name`: the source as it may be shown; `expected`: the
        digest that it must have.
        """
        job = _Job(name)
        self._jobs.add(job)
        try:
            with disk_told(self._entries.directory), self._entries.partial(_key_of(source)) as partial:
                try:
                    job.remote = self._make_remote(source)
                    self._transfer(job, partial, on_bytes)
                    found = identify(partial, max_bytes=self._limits.max_bytes)
                    check_digest(found.digest, expected)
                    self._room.commit(partial, found.digest, job)
                except (AdapterInvalid, StorageFull, OSError):
                    _empty(partial)  # it is no good to go on with, or its room is needed
                    raise
        except ServerlessLoraError as error:
            log.warning("%s could not be fetched: %s", name, error.message)
            raise
        finally:
            self._room.withdraw(job)
            self._jobs.discard(job)
            if job.remote is not None:
                job.remote.close()
        seconds = time.monotonic() - job.began_at
        log.info("fetched %s: %.1f MB in %.1f s from %s", found.digest[:16], job.done_bytes / 1e6, seconds, name)
        return found

    def fetching(self) -> list[Fetching]:
        now = time.monotonic()
        return [
            Fetching(job.source, now - job.began_at, job.done_bytes, job.total_bytes)
            for job in sorted(self._jobs, key=lambda job: job.began_at)
        ]

    def stop(self) -> None:
        """Transfers end, and can be gone on with."""
        self._stop.set()
        for job in list(self._jobs):
            if job.remote is not None:
                job.remote.close()

    def _transfer(self, job: _Job, partial: Path, on_bytes: OnBytes | None) -> None:
        assert job.remote is not None

        def reserve(size: int) -> None:
            job.total_bytes = size
            self._room.promise(job, size)

        def arrived(count: int) -> None:
            job.arrived(count)
            if on_bytes is not None:
                on_bytes(count)

        log.info("fetching %s", job.source)
        try:
            Transfer(job.remote, partial, self._limits, reserve=reserve, on_bytes=arrived, stop=self._stop).run()
        except Stopped:
            raise Unavailable("the server is shutting down", retry_after_s=5) from None


def check_digest(found: str, expected: str | None) -> None:
    """Raises AdapterChanged."""
    if expected is not None and found != expected:
        raise AdapterChanged(
            f"the source holds another adapter now: its digest is {found}, not {expected}; deploy the function anew",
            param="lora_path",
        )


@contextlib.contextmanager
def disk_told(directory: Path) -> Iterator[None]:
    """A disk that is full, or fails, in words for people."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"the adapter store {directory} is full: {error.strerror}") from error
        raise Unavailable(f"the adapter store cannot be used now: {error.strerror}", retry_after_s=30) from error


def _key_of(source: Source) -> str:
    """Of the same place whatever digest is expected there."""
    return hashlib.sha256(repr(msgspec.structs.replace(source, digest=None)).encode()).hexdigest()[:24]


def _empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            path.unlink()
