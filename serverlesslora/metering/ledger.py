"""The usage ledger: what every request took and what lay in memory, in one file that survives the server.

`begin` journals an open request and does not wait. `record` replaces it, once: the request id is the key, and a second
record of the same id is ignored and reported. `record` returns when the row survives kill -9 of this process (it is in
the kernel's hands, see `schema.py`; only a power cut may take the newest rows), and the server awaits it before it
sends the last bytes of an answer. So every answer a client received complete is in the ledger exactly once. A request
whose server died has an open row, which the next start makes `interrupted`; an answer that was recorded and never sent
complete is possible, the reverse is not.

One thread writes. What arrives while a commit runs shares the next one, so a thousand records of one moment cost one
transaction. When the file cannot be written the server goes on serving: rows wait in memory up to a bound, `problem`
says so for the health page, and writing is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from serverlesslora.errors import Overloaded, Unavailable
from serverlesslora.metering import summary
from serverlesslora.metering.batch import Batch, Outcome, Record, request_row, residency_row
from serverlesslora.metering.schema import Claim, close_interrupted, open_for_writing
from serverlesslora.metering.usage import By, RequestPage, RequestUsage, Residency, UsageRow

log = logging.getLogger("serverlesslora.ledger")


class Ledger:
    """`max_waiting`: rows in memory at once. When they are not written fast enough, `begin` refuses new requests at
    half of it, so that what was begun can still be recorded."""

    def __init__(self, path: str | Path, *, max_waiting: int = 20_000, retry_s: float = 2.0) -> None:
        self.path = Path(path)
        self.problem: str | None = None  # why rows are not being written, for people; None: all is well
        self.num_interrupted = 0  # requests of dead servers, found open at the start
        self.num_duplicates = 0
        self.num_lost = 0  # rows that found no room while the file could not be written
        self._max_waiting = max_waiting
        self._retry_s = retry_s
        self._server = ""
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._arrived = Batch()  # guarded by _wake, like the next three
        self._flushes: list[asyncio.Future[bool]] = []
        self._num_held = 0  # rows the writer thread has taken and not yet written
        self._is_closing = True

    async def startup(self) -> None:
        """Raises ConfigError when the file cannot be used."""
        assert self._thread is None, "started twice"
        db, claim = await asyncio.to_thread(self._open)
        self._server = claim.server
        self._is_closing = False
        self._thread = threading.Thread(target=self._main_loop, args=(db, claim), name="ledger", daemon=True)
        self._thread.start()

    async def shutdown(self) -> None:
        """Writes what waits and closes the file. What comes later is refused."""
        if self._thread is None:
            return
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._thread = None

    # -- the event loop's side: nothing here blocks or touches the file --

    @property
    def num_waiting(self) -> int:
        return len(self._arrived) + self._num_held

    def begin(
        self,
        request_id: str,
        function: str,
        tenant: str | None,
        domain: str,
        *,
        backbone: str = "",
        digest: str | None = None,
        started_at: float | None = None,
        device: str | None = None,
    ) -> None:
        """Raises Overloaded when rows are not written fast enough."""
        at = time.time() if started_at is None else started_at
        # The table's order; an open row has no numbers yet, and `open` is a status only the file knows.
        known = (request_id, function, tenant, domain, backbone, digest, at)
        row = (*known, 0, 0, 0, 0.0, 0.0, None, 0.0, "unknown", "open", False, device, self._server)
        with self._wake:
            if self._has_room(self._max_waiting // 2, waits=True):
                self._arrived.opens[request_id] = row
                self._wake.notify()

    async def record(self, usage: RequestUsage) -> Outcome:
        """`stored`: it survives this process. `duplicate`: this id was recorded before, nothing changed. `waiting`: the
        file cannot be written now (see `problem`), the row is tried again later. `lost`: not even memory had room.
        Cancelling the wait does not cancel the record. Raises Overloaded as `begin`, at twice the rows."""
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        with self._wake:
            if not self._has_room(self._max_waiting, waits=True):
                return "lost"
            self._arrived.add(Record(request_row(usage, self._server), waiter))
            self._wake.notify()
        return await waiter

    def note(self, usage: RequestUsage) -> None:
        """The same without waiting, for ends that are nobody's answer. Never raises: without room it counts as lost."""
        with self._wake:
            if self._has_room(self._max_waiting, waits=False):
                self._arrived.add(Record(request_row(usage, self._server)))
                self._wake.notify()

    def resident(self, rows: Sequence[Residency]) -> None:
        """What lay in memory. As `note`."""
        with self._wake:
            for row in rows:
                if self._has_room(self._max_waiting, waits=False):
                    self._arrived.residencies.append(residency_row(row))
            self._wake.notify()

    async def flush(self) -> bool:
        """Whether everything given so far is in the file now."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._is_closing:
                return self.num_waiting == 0
            self._flushes.append(waiter)
            self._wake.notify()
        return await waiter

    async def usage(
        self, *, by: By = "function", since: float | None = None, until: float | None = None
    ) -> list[UsageRow]:
        """Sums of a window [since, until), see `summary.usage`."""
        return await asyncio.to_thread(summary.usage, self.path, by=by, since=since, until=until)

    async def requests(
        self, *, since: float | None = None, until: float | None = None, limit: int = 100, after: str | None = None
    ) -> RequestPage:
        """One page of requests, see `summary.requests`."""
        return await asyncio.to_thread(summary.requests, self.path, since=since, until=until, limit=limit, after=after)

    def _has_room(self, limit: int, *, waits: bool) -> bool:
        if self._is_closing:
            if waits:
                raise Unavailable("the usage ledger is closed: the server is stopping")
        elif self.num_waiting < limit:
            return True
        elif waits and self.problem is None:
            raise Overloaded(
                f"the usage ledger cannot keep up: {self.num_waiting} rows wait for {self.path}; is its disk slow?",
                retry_after_s=1,
            )
        self.num_lost += 1
        return False

    # -- the thread's side --

    def _open(self) -> tuple[sqlite3.Connection, Claim]:
        db = open_for_writing(self.path)
        db.execute("BEGIN IMMEDIATE")
        claim = Claim(self.path)
        self.num_interrupted = close_interrupted(db, self.path)
        db.execute("COMMIT")
        if self.num_interrupted:
            log.warning("%d requests were cut off when their server died: interrupted", self.num_interrupted)
        return db, claim

    def _main_loop(self, db: sqlite3.Connection, claim: Claim) -> None:
        kept = Batch()  # could not be written; nobody waits for it any more
        retry_at = 0.0
        is_closing = False
        while not is_closing:
            with self._wake:
                timeout_s = max(0.0, retry_at - time.monotonic()) if len(kept) else None
                self._wake.wait_for(lambda: len(self._arrived) or self._flushes or self._is_closing, timeout_s)
                arrived, self._arrived = self._arrived, Batch()
                flushes, self._flushes = self._flushes, []
                is_closing = self._is_closing
                self._num_held += len(arrived)
            kept.absorb(arrived)
            if len(kept) and (self.problem is None or flushes or is_closing or time.monotonic() >= retry_at):
                if self._write(db, kept):
                    kept = Batch()
                retry_at = time.monotonic() + self._retry_s
            with self._wake:
                self._num_held = len(kept)
            if len(kept):
                for record in arrived.records:
                    record.outcome = "waiting"
            _answer(arrived.records, flushes, is_written=not len(kept))
        if len(kept):
            log.error("%d usage rows are lost with this server: %s", len(kept), self.problem)
        with contextlib.suppress(sqlite3.Error):
            db.close()  # the last one to close also empties the write-ahead log
        claim.release()

    def _write(self, db: sqlite3.Connection, batch: Batch) -> bool:
        try:
            batch.write(db)
        except Exception as error:  # a bug here must not stop the server either
            if self.problem is None:
                log.error("the usage ledger cannot be written", exc_info=error)
            self.problem = (
                f"usage cannot be written to {self.path} ({error}): rows wait in memory, at most {self._max_waiting}, "
                "and more are lost; make room on its disk, or see that it is writable"
            )
            return False
        if self.problem is not None:
            log.warning("the usage ledger is written again; %d rows were lost", self.num_lost)
            self.problem = None
        for record in batch.records:
            if record.outcome == "duplicate":
                self.num_duplicates += 1
                log.error("request %.200r was recorded twice; the second record is ignored", record.row[0])
            elif record.outcome == "lost":
                self.num_lost += 1
        return True


def _answer(records: Iterable[Record], flushes: Iterable[asyncio.Future[bool]], *, is_written: bool) -> None:
    """Wakes everybody who waits, each event loop once."""
    answers: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[object], object]]] = {}
    for record in records:
        if record.waiter is not None:
            answers.setdefault(record.waiter.get_loop(), []).append((record.waiter, record.outcome))  # type: ignore[arg-type]
    for flush in flushes:
        answers.setdefault(flush.get_loop(), []).append((flush, is_written))  # type: ignore[arg-type]
    for loop, outcomes in answers.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_set_results, outcomes)


def _set_results(outcomes: Iterable[tuple[asyncio.Future[object], object]]) -> None:
    for waiter, outcome in outcomes:
        if not waiter.done():  # it may have been cancelled
            waiter.set_result(outcome)
