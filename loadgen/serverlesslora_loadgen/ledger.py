"""What a server of ours has written down of a run: its ledger's sums of a window of time."""

from __future__ import annotations

import datetime
import urllib.parse
from collections.abc import Mapping

import msgspec

from serverlesslora_loadgen.errors import TargetError
from serverlesslora_loadgen.fetching import get_json


class Usage(msgspec.Struct, frozen=True):
    """A sum of the ledger; seconds, bytes and tokens."""

    key: str | None = None
    idle: bool = False  # shared memory while nobody used it
    requests: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    refused: int = 0
    interrupted: int = 0
    completion_tokens: int = 0
    device_s: float = 0.0
    rungs: dict[str, int] = {}
    device_s_of: dict[str, float] = {}  # by the device's name
    byte_s: dict[str, float] = {}  # by tier: host, device


class Paid(msgspec.Struct, frozen=True):
    paid: float = 0.0


class Row(msgspec.Struct, frozen=True):
    usage: Usage
    money: Paid


class PriceNote(msgspec.Struct, frozen=True):
    """Of the server's own price file."""

    currency: str
    date: datetime.date
    source: str = ""
    illustrative: bool = False


class Ledger(msgspec.Struct, frozen=True):
    """GET /admin/usage?by=function, the part that is read here."""

    rows: tuple[Row, ...]
    total: Row
    prices: PriceNote
    since: float | None = None
    until: float | None = None
    problem: str | None = None  # why something may be missing

    @property
    def idle_byte_s(self) -> dict[str, float]:
        """By tier, what no function's worker was there to use."""
        sums: dict[str, float] = {}
        for row in self.rows:
            if row.usage.idle:
                for tier, byte_s in row.usage.byte_s.items():
                    sums[tier] = sums.get(tier, 0.0) + byte_s
        return sums


def read_ledger(
    admin: str,
    *,
    since: float,
    until: float | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
) -> Ledger:
    """Sums of [since, until), unix seconds: requests that started in it, and memory for its part inside of it.

    To be asked once the last answer has arrived: the server writes down what it holds when it is asked. A window is
    what the difference of two sums would be, and needs no first look at the right moment.

    Raises TargetError (HasNone: the server has no ledger) naming the address.
    """
    window = {"by": "function", "format": "json", "since": repr(since)}
    if until is not None:
        window["until"] = repr(until)
    address = f"{admin.rstrip('/')}/admin/usage?{urllib.parse.urlencode(window)}"
    ledger = get_json(address, Ledger, headers=headers, timeout_s=timeout_s)
    if ledger.since is None or abs(ledger.since - since) > 1e-3:
        raise TargetError(f"{address} answered for another window, from {ledger.since}: its sums are not of this run")
    return ledger
