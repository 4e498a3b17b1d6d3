"""Room in the store: a quota, what has been promised of it, and who holds which adapter against being evicted."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from serverlesslora.adapters.entries import Entries, size_of
from serverlesslora.adapters.quota import Needed, to_evict
from serverlesslora.errors import StorageFull

log = logging.getLogger("serverlesslora.adapters")


class Room:
    """Thread-safe. Holding and letting go never wait for a disk; everything else may."""

    def __init__(self, entries: Entries, *, quota_bytes: int | None, needed: Callable[[], Needed]) -> None:
        self._entries = entries
        self._quota_bytes = quota_bytes
        self._needed = needed
        self._holds: Counter[str] = Counter()
        self._holding = threading.Lock()
        self._making = threading.RLock()
        self._promised: dict[object, int] = {}  # bytes, to whom

    def hold(self, digest: str) -> None:
        """It is not evicted, also if it comes only later, until it was let go of as often."""
        with self._holding:
            self._holds[digest] += 1

    def let_go(self, digest: str) -> None:
        with self._holding:
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]

    def hold_if_here(self, digest: str) -> bool:
        """Held, if it is here as a whole. Raises OSError when that cannot be told now."""
        self.hold(digest)
        is_here = False
        try:
            is_here = bool(self._entries.sizes_agree(digest))
        finally:
            if not is_here:
                self.let_go(digest)
        return is_here

    def promise(self, owner: object, size: int) -> None:
        """Keep so many bytes for `owner`, evicting what must leave. Raises StorageFull."""
        with self._making:
            self._make(size, owner)
            self._promised[owner] = size

    def withdraw(self, owner: object) -> None:
        with self._making:
            self._promised.pop(owner, None)

    def commit(self, path: Path, digest: str, owner: object = None) -> None:
        """The directory becomes an entry, held once. Raises StorageFull or OSError; it is no entry then."""
        self.hold(digest)
        try:
            with self._making:
                if self._entries.sizes_agree(digest) is False:
                    self._entries.remove(digest)
                if not self._entries.has(digest):
                    self._make(size_of(path), owner)
                self._entries.commit(path, digest)
                self._promised.pop(owner, None)
        except BaseException:
            self.let_go(digest)
            raise

    def _make(self, size: int, owner: object) -> None:
        if self._quota_bytes is None:
            return
        room = self._quota_bytes - size - sum(self._promised.values()) + self._promised.get(owner, 0)
        while True:
            entries = self._entries.entries()
            if sum(entry.size_bytes for entry in entries) <= room:
                return
            with self._holding:
                held = frozenset(self._holds)
            leaving = to_evict(entries, room_bytes=room, needed=self._needed(), held=held)
            if leaving is None:
                raise StorageFull(
                    f"the adapter store may take {self._quota_bytes >> 20} MiB, and what is in use leaves no room for "
                    f"{size} bytes more; remove functions or raise --adapter-store-mb"
                )
            for digest in leaving:
                self._evict(digest)

    def _evict(self, digest: str) -> None:
        with self._holding:
            if digest in self._holds:  # since the look
                return
            hidden = self._entries.hide(digest)
        log.info("the adapter %s leaves the store to make room", digest[:16])
        self._entries.delete(hidden)
