"""What waits to be written, and writing all of it as one transaction.

A statement carries up to 64 rows: between two statements this thread must get Python's lock back, and beside a busy
event loop that may take milliseconds each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from serverlesslora.metering.usage import RequestUsage, Residency

log = logging.getLogger("serverlesslora.ledger")

Row = tuple[Any, ...]
Outcome = Literal["stored", "duplicate", "waiting", "lost"]

# What is wrong with one row (a NaN, a number beyond 64 bits, half a surrogate pair), not with the file.
ROW_ERRORS = (
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.DataError,
    sqlite3.ProgrammingError,
    OverflowError,
    UnicodeEncodeError,
)
SIZES = (64, 32, 16, 8, 4, 2, 1)  # rows of a statement; few different ones, so that all stay prepared

_REQUEST_COLUMNS = (*RequestUsage.__struct_fields__, "server")
_RESIDENCY_COLUMNS = (*Residency.__struct_fields__, "until_at")


def _statements(table: str, columns: Sequence[str], tail: str) -> dict[int, str]:
    row = f"({','.join('?' * len(columns))})"
    start = f"INSERT INTO {table} ({','.join(columns)}) VALUES "
    return {size: start + ",".join([row] * size) + tail for size in SIZES}


OPEN = _statements("requests", _REQUEST_COLUMNS, " ON CONFLICT (request_id) DO NOTHING")
# Only an open row is replaced: whoever comes second for the same id changes nothing, and the count of changes tells.
RECORD = _statements(
    "requests",
    _REQUEST_COLUMNS,
    " ON CONFLICT (request_id) DO UPDATE SET "
    + ",".join(f"{name}=excluded.{name}" for name in _REQUEST_COLUMNS[1:])
    + " WHERE requests.status = 'open'",
)
RESIDENT = _statements("residency", _RESIDENCY_COLUMNS, "")


def request_row(usage: RequestUsage, server: str) -> Row:
    return (*msgspec.structs.astuple(usage), server)


def residency_row(residency: Residency) -> Row:
    return (*msgspec.structs.astuple(residency), residency.from_at + residency.seconds)


class Record:
    """A finished request on its way to the file, and who waits for it."""

    __slots__ = ("outcome", "row", "waiter")

    def __init__(self, row: Row, waiter: asyncio.Future[Outcome] | None = None) -> None:
        self.row = row
        self.waiter = waiter
        self.outcome: Outcome = "stored"


class Batch:
    def __init__(self) -> None:
        self.opens: dict[str, Row] = {}
        self.records: list[Record] = []
        self.residencies: list[Row] = []

    def __len__(self) -> int:
        return len(self.opens) + len(self.records) + len(self.residencies)

    def add(self, record: Record) -> None:
        self.opens.pop(record.row[0], None)  # begun and ended between two commits
        self.records.append(record)

    def absorb(self, later: Batch) -> None:
        self.opens |= later.opens
        for record in later.records:
            self.add(record)
        self.residencies += later.residencies

    def write(self, db: sqlite3.Connection) -> None:
        """All or nothing; sets the outcome of every record. Raises what sqlite3 raises when the file cannot be written.

        The common case is one statement for many rows. Only when it finds a duplicate or a row that cannot be stored
        the batch is rolled back and written row by row, which says which one it was.
        """
        with contextlib.suppress(_Odd, *ROW_ERRORS), _transaction(db):
            _insert(db, OPEN, list(self.opens.values()))
            if _insert(db, RECORD, [record.row for record in self.records]) != len(self.records):
                raise _Odd
            _insert(db, RESIDENT, self.residencies)
            return
        with _transaction(db):
            for row in self.opens.values():
                _insert_one(db, OPEN, row)
            for record in self.records:
                changed = _insert_one(db, RECORD, record.row)
                record.outcome = "lost" if changed is None else "stored" if changed else "duplicate"
            for row in self.residencies:
                _insert_one(db, RESIDENT, row)


class _Odd(Exception):
    """Not every record of a batch was new."""


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk rolls back by itself
            db.execute("ROLLBACK")
        raise


def _insert(db: sqlite3.Connection, statements: dict[int, str], rows: Sequence[Row]) -> int:
    """Returns how many rows were changed."""
    changed = start = 0
    for size in SIZES:
        while len(rows) - start >= size:
            values = [value for row in rows[start : start + size] for value in row]
            changed += db.execute(statements[size], values).rowcount
            start += size
    return changed


def _insert_one(db: sqlite3.Connection, statements: dict[int, str], row: Row) -> int | None:
    """None: this row cannot be stored, and the log says why."""
    try:
        try:
            return db.execute(statements[1], row).rowcount
        except UnicodeEncodeError:
            return db.execute(statements[1], [_encodable(value) for value in row]).rowcount
    except ROW_ERRORS as error:
        log.error("the usage row %.500r cannot be stored: %s", row, error)
        return None


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
