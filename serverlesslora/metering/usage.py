"""What is counted: one row for every request, one for every stretch of memory held, and their sums.

Times on the wall clock are unix seconds; everything else is seconds, bytes and tokens. A GB is 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from serverlesslora.scheduler.artifacts import Tier

Status = Literal["finished", "failed", "aborted", "refused", "interrupted"]
STATUSES: tuple[Status, ...] = ("finished", "failed", "aborted", "refused", "interrupted")
By = Literal["function", "tenant", "domain"]
BYS: tuple[By, ...] = ("function", "tenant", "domain")


class RequestUsage(msgspec.Struct, frozen=True):
    """One request, once it has ended. `interrupted`: its server died, and only what was known at its start is here."""

    request_id: str
    function: str
    tenant: str | None
    domain: str
    backbone: str
    digest: str | None  # of the adapter
    started_at: float
    prompt_tokens: int
    cached_tokens: int  # of the prompt tokens, those met in a prefix cache
    completion_tokens: int
    device_s: float  # its share of every step it was part of
    queue_s: float
    ttft_s: float | None  # None: there was no first token
    duration_s: float  # arrival to last token
    rung: str  # of the cold-start ladder
    status: Status
    slo_missed: bool
    device: str | None = None  # its name in the price file; None is priced as "default"


class Residency(msgspec.Struct, frozen=True):
    """One artifact in memory for a while.

    With a function it is that function's; with a domain alone it belongs to the functions of the domain (a tenant's
    worker); with neither it belongs to nobody alone (a backbone), and sums split it.
    """

    artifact_id: str
    kind: str  # an ArtifactKind
    function: str | None
    tenant: str | None
    domain: str | None
    size_bytes: int
    seconds: float
    from_at: float
    tier: Tier = "host"
    backbone: str | None = None  # what it is part of: a shared artifact is split over the workers of the same one

    @property
    def byte_s(self) -> float:
        return self.size_bytes * self.seconds


class UsageRow(msgspec.Struct, frozen=True):
    """The sum of a window for one function, tenant or domain.

    A request belongs to the window it started in; memory counts for the part of its time inside the window. `byte_s`
    holds the row's own artifacts and its share of those that belong to nobody alone.
    """

    key: str | None  # None: what has no tenant, or no function
    idle: bool = False  # shared memory at times when no worker used it: nobody's
    requests: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    refused: int = 0
    interrupted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    device_s: float = 0.0
    queue_s: float = 0.0
    duration_s: float = 0.0
    slo_missed: int = 0
    rungs: dict[str, int] = {}  # requests by rung of the cold-start ladder
    device_s_of: dict[str, float] = {}  # device seconds by the device's name; "default": it has none
    byte_s: dict[str, float] = {}  # byte-seconds by tier


# Everything of a row that is added up: plain numbers, and tables of numbers.
NUMBERS = tuple(
    name for name in UsageRow.__struct_fields__ if name not in ("key", "idle", "rungs", "device_s_of", "byte_s")
)
TABLES = ("rungs", "device_s_of", "byte_s")

_NOTHING = UsageRow(None)


def add_up(rows: Iterable[UsageRow], *, key: str | None = None, idle: bool = False) -> UsageRow:
    """The sum of rows of different keys."""
    numbers = {name: getattr(_NOTHING, name) for name in NUMBERS}
    tables: dict[str, dict[str, float]] = {name: {} for name in TABLES}
    for row in rows:
        for name in NUMBERS:
            numbers[name] += getattr(row, name)
        for name, table in tables.items():
            for entry, value in getattr(row, name).items():
                table[entry] = table.get(entry, 0) + value
    return UsageRow(key, idle, **numbers, **tables)  # type: ignore[arg-type]


class RequestPage(msgspec.Struct, frozen=True):
    """Requests, the newest first. `next` asks for those after these; None: there are no more."""

    requests: tuple[RequestUsage, ...]
    next: str | None = None
