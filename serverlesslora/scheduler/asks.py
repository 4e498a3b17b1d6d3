"""What is asked of the dispatcher, and what it answers."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec


class Ask(msgspec.Struct, frozen=True):
    """One request that wants to run. Times are seconds on the dispatcher's clock."""

    request_id: str
    function: str
    tenant: str | None  # None: the function stands for itself
    domain: str
    device: str
    prompt_tokens: int  # an estimate
    max_tokens: int
    arrived_at: float  # a retry keeps that of its first try
    deadline: float = math.inf  # of the first token
    sequences: int = 1  # slots it takes; more than a worker has are queued inside the worker
    backbone: str = ""  # latencies are learned per device and backbone

    @property
    def owner(self) -> str:
        """Who shares fairly with whom."""
        return self.function if self.tenant is None else self.tenant


class Send(NamedTuple):
    """Give it to the worker of its domain now."""

    request_id: str
    queued_s: float  # since it was offered
    window_s: float  # of that, held back for others to join its batch
    reason: str


class Refusal(NamedTuple):
    request_id: str
    status: int  # 503: too busy for its deadline; 429: its tenant fills its own share of the queue
    retry_after_s: int  # 1 to 60: until the queue has probably drained enough
    reason: str
