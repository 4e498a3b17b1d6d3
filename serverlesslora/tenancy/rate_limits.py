"""How much one key, tenant or function may take: requests per second, requests at once, tokens per minute. Pure; the
clock is injected.

Both rates are token buckets: `level` rises at `rate` per second up to `capacity`. A request takes one from the first
and, when its prompt is known, the prompt's estimated tokens from the second; at its end the second is corrected by what
was really used, output included. So the second may fall below nothing, and who overdrew it waits until it is paid back.
A prompt larger than the whole bucket passes when the bucket is full: it would otherwise wait for ever.

What is counted lives in memory: a server that starts again forgets it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from serverlesslora.tenancy.key import Limits

SHORTEST_WAIT_S, LONGEST_WAIT_S = 1, 60  # clients ignore a Retry-After beyond a minute
ROUNDING = 1e-6  # a bucket that lacks less is not short of anything


class Refusal(NamedTuple):
    reason: str
    retry_after_s: int


class Bucket:
    def __init__(self, *, rate: float, capacity: float, now: float) -> None:
        self.rate = rate  # per second
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        if now > self._at:
            self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
            self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Until so much could be taken; 0: now. Changes nothing."""
        missing = min(amount, self.capacity) - self.level(now)
        return missing / self.rate if missing > ROUNDING else 0.0

    def take(self, amount: float, now: float) -> None:
        """Also more than there is. A negative amount gives back."""
        self._level = min(self.capacity, self.level(now) - amount)


class _Account:
    """One key's, tenant's or function's."""

    def __init__(self, limits: Limits, now: float, whose: str) -> None:
        self.whose = whose
        self.num_open = 0
        self.set_limits(limits, now)

    def set_limits(self, limits: Limits, now: float) -> None:
        """Its buckets begin full."""
        self.limits = limits
        self.requests = None if limits.rps is None else Bucket(rate=limits.rps, capacity=limits.burst_size, now=now)
        per_minute = limits.tokens_per_minute
        self.tokens = None if per_minute is None else Bucket(rate=per_minute / 60, capacity=per_minute, now=now)


class Permit:
    """One request that was let in. `leave` ends it, once; what comes later is ignored."""

    def __init__(self, account: _Account, clock: Callable[[], float]) -> None:
        self._account = account
        self._clock = clock
        self._estimated = 0
        self._used = 0
        self._is_open = True

    def expect(self, tokens: int) -> Refusal | None:
        """Take the prompt's estimated tokens. Refused, it has taken nothing."""
        bucket = self._account.tokens
        if bucket is None:
            return None
        now = self._clock()
        if wait_s := bucket.wait_s(tokens, now):
            per_minute = self._account.limits.tokens_per_minute
            return _refusal(f"{self._account.whose} may use {per_minute} tokens per minute.", wait_s)
        bucket.take(tokens, now)
        self._estimated += tokens
        return None

    def used(self, tokens: int) -> None:
        """What it really took, prompt and output; until this is said it is nothing."""
        self._used += tokens

    def undo(self) -> None:
        """As if it had never come in."""
        if self._is_open and self._account.requests is not None:
            self._account.requests.take(-1, self._clock())
        self.leave()

    def leave(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._account.num_open -= 1
        if self._account.tokens is not None:
            self._account.tokens.take(self._used - self._estimated, self._clock())


class Limiter:
    """The accounts of all who are limited."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}  # as many as there are limits, which people make by hand

    def enter(self, account_id: str, limits: Limits, *, whose: str = "This API key") -> Permit | Refusal:
        """Refused, it has taken nothing. `whose`: as a refusal names it."""
        now = self._clock()
        account = self._accounts.get(account_id)
        if account is None:
            account = self._accounts[account_id] = _Account(limits, now, whose)
        elif account.limits != limits:  # a function was deployed again; who is open stays counted
            account.set_limits(limits, now)
        if limits.concurrent is not None and account.num_open >= limits.concurrent:
            return _refusal(f"{whose} may have {limits.concurrent} requests open at once.", 0.0)
        if account.requests is not None:
            if wait_s := account.requests.wait_s(1, now):
                return _refusal(f"{whose} may make {limits.rps:g} requests per second.", wait_s)
            account.requests.take(1, now)
        account.num_open += 1
        return Permit(account, self._clock)


def _refusal(reason: str, wait_s: float) -> Refusal:
    return Refusal(reason, min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, math.ceil(wait_s))))
