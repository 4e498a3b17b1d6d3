"""Adapters on disk, by digest: what a source held at deploy time, kept where nobody else writes.

The identity of an adapter is its digest (weights, canonical config, tokenizer files), never its name or source. Files
become visible by one rename when they are complete and checked; so a file that is truncated, swapped or removed later
can hurt nobody. What a quota gave up is fetched again when it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from serverlesslora.adapters.entries import Entries, size_of
from serverlesslora.adapters.fetching import Fetcher, Fetching, OnBytes, check_digest, disk_told
from serverlesslora.adapters.files import identify
from serverlesslora.adapters.flights import Flights
from serverlesslora.adapters.hosts import HostRules
from serverlesslora.adapters.places import remote_of
from serverlesslora.adapters.quota import Needed
from serverlesslora.adapters.remote import Remote
from serverlesslora.adapters.room import Room
from serverlesslora.adapters.sources import KINDS, LocalSource, Source, SourceKind, parse_source, shown
from serverlesslora.adapters.transfer import BACKOFF_S, TransferLimits
from serverlesslora.adapters.web import Timeouts
from serverlesslora.errors import (
    AdapterChanged,
    AdapterInvalid,
    InvalidRequest,
    NotFound,
    Unavailable,
)

log = logging.getLogger("serverlesslora.adapters")

FETCHES_AT_ONCE = 4
COPIES_AT_ONCE = 4
TOUCH_EVERY_S = 10.0


class StoredAdapter(NamedTuple):
    digest: str
    path: Path
    size_bytes: int


class AdapterStore:
    """A directory of `<digest>/` entries. Entries are complete or absent, never half there."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        roots: Sequence[Path] = (),
        kinds: Collection[SourceKind] = KINDS,
        hosts: HostRules = HostRules(),  # noqa: B008 - immutable
        quota_bytes: int | None = None,
        fetch_timeout_s: float = 600.0,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
        backoff_s: float = BACKOFF_S,
        needed: Callable[[], Needed] = Needed,
        make_remote: Callable[[Source, HostRules, Timeouts], Remote] = remote_of,
    ) -> None:
        """`max_bytes`: of one adapter's weights. `needed` is asked from other threads when something must leave."""
        self.directory = directory
        self.roots = tuple(root.resolve() for root in roots)
        self._kinds = frozenset(kinds)
        self._max_bytes = max_bytes
        self._entries = Entries(directory)
        self._room = Room(self._entries, quota_bytes=quota_bytes, needed=needed)
        limits = TransferLimits(max_bytes=max_bytes, timeout_s=fetch_timeout_s, backoff_s=backoff_s)
        self._fetcher = Fetcher(self._entries, self._room, limits, lambda source: make_remote(source, hosts, timeouts))
        self._whole: set[str] = set()  # digests this process has looked at
        self._touched: dict[str, float] = {}
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="adapter-fetch")
        # Their own: a directory on a disk that hangs must not take the threads that everybody uses.
        self._copiers = ThreadPoolExecutor(COPIES_AT_ONCE, thread_name_prefix="adapter-copy")
        self._is_stopped = False
        self._flights: Flights[Hashable, StoredAdapter] = Flights()

    # --- what is there

    def path_of(self, digest: str) -> Path:
        return self._entries.path_of(digest)

    def has(self, digest: str) -> bool:
        return self._entries.has(digest)

    def fetching(self) -> list[Fetching]:
        return self._fetcher.fetching()

    def verify(self, digest: str) -> bool:
        """Read it all: is it still what its name says? One that is not, is given up. Blocks.

        Raises Unavailable when it cannot be read now, which says nothing against it.
        """
        with disk_told(self.directory):
            try:
                intact = identify(self.path_of(digest), max_bytes=1 << 62).digest == digest
            except AdapterInvalid as error:
                if isinstance(error.__cause__, PermissionError):
                    raise error.__cause__ from None
                intact = False
        if not intact:
            log.error("the stored adapter %s is damaged and is given up", digest[:16])
            self._entries.remove(digest)
        return intact

    # --- getting it

    async def obtain(self, source: str, on_bytes: OnBytes | None = None) -> StoredAdapter:
        """The adapter that `source` holds now, in the store.

        Raises NotFound, AdapterInvalid, InvalidRequest, Unavailable or StorageFull. Use `obtaining` where it must not
        be evicted before something else needs it.
        """
        async with self.obtaining(source, on_bytes) as stored:
            return stored

    @contextlib.asynccontextmanager
    async def obtaining(self, source: str, on_bytes: OnBytes | None = None) -> AsyncIterator[StoredAdapter]:
        """As `obtain`; it is not evicted before the block ends."""
        parsed = self._allowed(source)
        if parsed.digest is not None:
            with self.hold(parsed.digest):  # before the look, or it leaves between the two
                if await self.is_here(parsed.digest):
                    path = self.path_of(parsed.digest)
                    yield StoredAdapter(parsed.digest, path, size_of(path))
                    return
        # Who asks for a directory means what is in it now, not what a copy under way began with.
        is_local = isinstance(parsed, LocalSource)
        async with self._fetched(source, parsed, parsed.digest, on_bytes, key=object() if is_local else None) as it:
            yield it

    def is_ready(self, digest: str) -> bool:
        """It is here and was looked at; nothing has to be waited for."""
        if digest in self._whole and self._entries.has(digest):
            self._use(digest)
            return True
        return False

    async def ensure(self, digest: str, source: str) -> Path:
        """Where the adapter lies; fetched again from `source` if it was given up.

        Many that wait for one digest wait for one transfer, which goes on when they leave. Raises AdapterChanged when
        the source does not hold this adapter any more.
        """
        if await self.is_here(digest):
            self._use(digest)
            return self.path_of(digest)
        try:
            parsed = self._allowed(source)
            async with self._fetched(source, parsed, digest, None):
                return self.path_of(digest)
        except AdapterChanged:
            raise
        except (NotFound, AdapterInvalid, InvalidRequest) as error:
            raise AdapterChanged(
                f"the adapter {digest[:16]}… has left the store and cannot be fetched again; deploy the function "
                f"anew. {error.message}"
            ) from error

    @contextlib.contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """It is not evicted until the block ends, also if it comes only now."""
        self._room.hold(digest)
        try:
            yield
        finally:
            self._room.let_go(digest)

    def add(self, source: str) -> StoredAdapter:
        """As `obtain`, for those without an event loop."""
        parsed = self._allowed(source)
        if isinstance(parsed, LocalSource):
            stored = self._add_local(parsed)
        else:
            stored = self._add_remote(parsed, shown(source), parsed.digest, None)
        self._room.let_go(stored.digest)
        return stored

    def sweep(self) -> None:
        """Drop what a killed process left half copied."""
        self._entries.sweep()

    def stop(self) -> None:
        """Transfers end, and can be gone on with. To be called before the process ends."""
        self._is_stopped = True
        self._fetcher.stop()
        self._threads.shutdown(wait=False)
        self._copiers.shutdown(wait=False)

    # --- one source

    def _allowed(self, text: str) -> Source:
        source = parse_source(text)
        if source.kind not in self._kinds:
            raise InvalidRequest(
                f"adapters are not taken from {source.kind} sources here; start the server with "
                f"--adapter-source {source.kind}",
                param="lora_path",
            )
        return source

    @contextlib.asynccontextmanager
    async def _fetched(
        self,
        text: str,
        source: Source,
        expected: str | None,
        on_bytes: OnBytes | None,
        *,
        key: Hashable | None = None,
    ) -> AsyncIterator[StoredAdapter]:
        async def fetch() -> StoredAdapter:
            loop = asyncio.get_running_loop()
            if isinstance(source, LocalSource):
                return await loop.run_in_executor(self._copiers, self._add_local, source, expected)
            return await loop.run_in_executor(self._threads, self._add_remote, source, shown(text), expected, on_bytes)

        flight = self._flights.join(
            key or (text, expected), fetch, landed=lambda stored: functools.partial(self._room.let_go, stored.digest)
        )
        try:
            yield await flight.wait()
        finally:
            flight.leave()

    def _add_local(self, source: LocalSource, expected: str | None = None) -> StoredAdapter:
        """Copy a directory. It is held once when this returns."""
        if self._is_stopped:  # hundreds may wait for their turn, and the process for all of them
            raise Unavailable("the server is shutting down", retry_after_s=5)
        directory = self._confined(source.path)
        with disk_told(self.directory):
            # Read before it is copied: after a restart all of them are here, and nothing has to be written.
            found = identify(directory, max_bytes=self._max_bytes, confine=self._check_inside)
            check_digest(found.digest, expected or source.digest)
            if not self._room.hold_if_here(found.digest):
                with self._entries.incoming() as incoming:
                    found = identify(directory, max_bytes=self._max_bytes, copy_to=incoming, confine=self._check_inside)
                    check_digest(found.digest, expected or source.digest)
                    self._room.commit(incoming, found.digest)
        self._whole.add(found.digest)
        return StoredAdapter(found.digest, self.path_of(found.digest), found.size_bytes)

    def _add_remote(self, source: Source, name: str, expected: str | None, on_bytes: OnBytes | None) -> StoredAdapter:
        found = self._fetcher.fetch(source, name, expected, on_bytes)
        self._whole.add(found.digest)
        return StoredAdapter(found.digest, self.path_of(found.digest), found.size_bytes)

    def _confined(self, path_text: str) -> Path:
        try:
            path = Path(path_text).expanduser().resolve()
            found = path.is_dir()
        except (OSError, RuntimeError):  # too long, a loop of links, nobody's home
            found = False
        if not found or not self._is_inside(path):
            # One answer for "outside" and "absent": the difference would let a caller map the file system.
            raise NotFound(f"no adapter directory at {path_text!r}", param="lora_path")
        return path

    def _is_inside(self, path: Path) -> bool:
        return not self.roots or any(path.is_relative_to(root) for root in self.roots)

    def _check_inside(self, opened: Path) -> None:
        """Of the directory that is really read, whatever its path led to when it was looked at."""
        if not self._is_inside(opened):
            raise NotFound("the adapter directory was moved while it was opened", param="lora_path")

    # --- the store itself

    async def is_here(self, digest: str) -> bool:
        """As a whole: what this process has not seen yet is looked at. Raises Unavailable when it cannot be now."""
        if not self.has(digest):
            return False
        if digest not in self._whole:
            with disk_told(self.directory):
                agrees = self._entries.sizes_agree(digest)
            if agrees is None:
                loop = asyncio.get_running_loop()
                agrees = await loop.run_in_executor(self._copiers, self.verify, digest)
            if not agrees:
                self._entries.remove(digest)
                return False
            self._whole.add(digest)
        return True

    def _use(self, digest: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(digest, -TOUCH_EVERY_S) >= TOUCH_EVERY_S:
            self._touched[digest] = now
            self._entries.used(digest)
