"""Reading the ledger: sums of a window by function, tenant or domain, and single requests page by page.

Any process may read while a server writes. What belongs to one function is that function's. What belongs to a domain
(a tenant's worker) is split over the functions of the domain, in proportion to the seconds their adapters lay in it.
What belongs to nobody alone (a backbone) is split over all functions in proportion to the seconds their workers were
there, for the share of its time in which there was any worker at all; the rest is `idle`. All of it in the same window.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from serverlesslora.errors import InvalidRequest
from serverlesslora.metering.schema import open_for_reading, unusable
from serverlesslora.metering.usage import By, RequestPage, RequestUsage, UsageRow, add_up


class Owner(NamedTuple):
    function: str | None
    tenant: str | None
    domain: str | None


class Held(NamedTuple):
    """One artifact's time in memory, of one owner and size, summed over the window."""

    owner: Owner
    artifact_id: str
    kind: str
    tier: str
    backbone: str | None
    seconds: float
    byte_s: float


_WINDOW = "started_at >= :since AND started_at < :until AND status <> 'open'"

# The part of a stretch inside the window. Subtracting what lies outside keeps whole stretches exact.
_CLIPPED = """SELECT *, max(0.0, seconds - max(0.0, :since - from_at) - max(0.0, until_at - :until)) AS inside
    FROM residency WHERE until_at > :since AND from_at < :until"""

# How long any worker of a backbone was there: the length of a union of intervals, in order of their starts.
_WITH_WORKERS = """
    WITH stretch AS (
        SELECT backbone, max(from_at, :since) AS a, min(until_at, :until) AS b FROM residency
        WHERE kind = 'worker' AND until_at > :since AND from_at < :until),
    ordered AS (
        SELECT *, max(b) OVER (PARTITION BY backbone ORDER BY a, b ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
            AS covered FROM stretch)
    SELECT backbone, sum(max(0.0, b - max(a, coalesce(covered, a)))) FROM ordered GROUP BY backbone"""


def usage(
    path: str | Path, *, by: By = "function", since: float | None = None, until: float | None = None
) -> list[UsageRow]:
    """Rows in the order of their keys, an idle one last. Raises ConfigError when the file cannot be read."""
    window = _window(since, until)
    with _reading(path) as db:
        rows = [*_requests_of(db, by, window), *_memory_of(db, by, window)]
    groups: dict[tuple[bool, str | None], list[UsageRow]] = defaultdict(list)
    for row in rows:
        groups[row.idle, row.key].append(row)
    order = sorted(groups, key=lambda group: (group[0], group[1] is not None, group[1] or ""))
    return [add_up(groups[idle, key], key=key, idle=idle) for idle, key in order]


def _requests_of(db: sqlite3.Connection, by: By, window: Mapping[str, float]) -> Iterator[UsageRow]:
    """One row per key, rung and device."""
    query = f"""SELECT {by}, rung, coalesce(device, 'default'), count(*), sum(status = 'finished'),
        sum(status = 'failed'), sum(status = 'aborted'), sum(status = 'refused'), sum(status = 'interrupted'),
        sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), sum(device_s), sum(queue_s), sum(duration_s),
        sum(slo_missed) FROM requests WHERE {_WINDOW} GROUP BY 1, 2, 3"""
    for key, rung, device, num_requests, *numbers in db.execute(query, window):
        row = UsageRow(key, False, num_requests, *numbers)
        yield msgspec.structs.replace(row, rungs={rung: num_requests}, device_s_of={device: row.device_s})


def _memory_of(db: sqlite3.Connection, by: By, window: Mapping[str, float]) -> Iterator[UsageRow]:
    rows = db.execute(
        f"""SELECT function, tenant, domain, artifact_id, kind, tier, backbone, sum(inside), sum(size_bytes * inside)
        FROM ({_CLIPPED}) GROUP BY 1, 2, 3, 4, 5, 6, 7""",
        window,
    )
    held = [Held(Owner(*row[:3]), *row[3:]) for row in rows]
    with_workers: dict[str | None, float] = dict(db.execute(_WITH_WORKERS, window))
    adapters = _adapter_shares(held)
    own: list[tuple[Owner, Held, float]] = []  # who has which part of what
    for item in held:
        if not _is_shared(item):
            split = None if _is_own(item) else adapters.get(item.owner.domain)
            own += [(owner, item, part) for owner, part in (split or {item.owner: 1.0}).items()]
    worker_s: dict[str | None, dict[Owner, float]] = defaultdict(lambda: defaultdict(float))
    for owner, item, part in own:
        if item.kind == "worker":
            worker_s[item.backbone][owner] += part * item.seconds

    present_s: dict[tuple[str, str], float] = defaultdict(float)
    for item in held:
        present_s[item.artifact_id, item.tier] += item.seconds
    for owner, item, part in own:
        yield UsageRow(getattr(owner, by), byte_s={item.tier: part * item.byte_s})
    for item in filter(_is_shared, held):
        weights = worker_s[item.backbone]
        total_s = sum(weights.values())
        there_s = present_s[item.artifact_id, item.tier]
        used = min(1.0, with_workers.get(item.backbone, 0.0) / there_s) if total_s > 0 and there_s > 0 else 0.0
        for owner, weight_s in weights.items() if used > 0 else ():
            yield UsageRow(getattr(owner, by), byte_s={item.tier: item.byte_s * used * weight_s / total_s})
        if used < 1:
            yield UsageRow(None, True, byte_s={item.tier: item.byte_s * (1 - used)})


def _is_own(item: Held) -> bool:
    return item.owner.function is not None


def _is_shared(item: Held) -> bool:
    return item.owner.function is None and item.owner.domain is None


def _adapter_shares(held: list[Held]) -> dict[str | None, dict[Owner, float]]:
    """For every domain its functions' parts of the seconds of all its adapters; parts sum to 1."""
    seconds: dict[str | None, dict[Owner, float]] = defaultdict(lambda: defaultdict(float))
    for item in held:
        if item.kind == "adapter" and _is_own(item):
            seconds[item.owner.domain][item.owner] += item.seconds
    return {
        domain: {owner: value / total_s for owner, value in owners.items()}
        for domain, owners in seconds.items()
        if (total_s := sum(owners.values())) > 0
    }


def requests(
    path: str | Path,
    *,
    since: float | None = None,
    until: float | None = None,
    limit: int = 100,
    after: str | None = None,
) -> RequestPage:
    """The newest `limit` requests of a window, or those older than the page that gave `after`. Requests that come in
    between do not move the pages. Raises InvalidRequest when `after` is not what a page gave."""
    window = _window(since, until)
    query = f"SELECT {', '.join(RequestUsage.__struct_fields__)} FROM requests WHERE {_WINDOW}"
    place: dict[str, float | str] = {}
    if after is not None:
        at, _, request_id = after.partition(",")
        try:
            place = {"at": float(at), "id": urllib.parse.unquote(request_id)}
        except ValueError:
            raise InvalidRequest(f"after={after!r} is not the `next` of a page", param="after") from None
        query += " AND (started_at, request_id) < (:at, :id)"
    query += " ORDER BY started_at DESC, request_id DESC LIMIT :limit"
    with _reading(path) as db:
        rows = db.execute(query, {**window, **place, "limit": limit + 1}).fetchall()
    found = tuple(_request(row) for row in rows[:limit])
    if len(rows) <= limit:
        return RequestPage(found)
    return RequestPage(found, f"{found[-1].started_at!r},{urllib.parse.quote(found[-1].request_id, safe='')}")


_MISSED = RequestUsage.__struct_fields__.index("slo_missed")


def _request(row: tuple[object, ...]) -> RequestUsage:
    return RequestUsage(*row[:_MISSED], bool(row[_MISSED]), *row[_MISSED + 1 :])  # type: ignore[arg-type,call-arg]


def _window(since: float | None, until: float | None) -> dict[str, float]:
    return {"since": -math.inf if since is None else since, "until": math.inf if until is None else until}


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[sqlite3.Connection]:
    """One moment of the ledger, however many queries look at it."""
    try:
        with contextlib.closing(open_for_reading(Path(path))) as db:
            db.execute("BEGIN")
            yield db
    except sqlite3.Error as error:
        raise unusable(Path(path), error) from error
