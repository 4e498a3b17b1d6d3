"""What a tenant, with all its keys together, and a function may take: requests per second and at once, and tokens.

Keys have limits of their own at the door; these hold for whoever asks, also where no keys are needed. How many requests
of a function may be open is the fleet's to say, which counts every prompt of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from serverlesslora.config import TenantConfig
from serverlesslora.errors import RateLimited
from serverlesslora.gateway.backend import ModelCard
from serverlesslora.tenancy.key import Limits
from serverlesslora.tenancy.rate_limits import Limiter, Permit, Refusal

NO_LIMITS = Limits()


class Rates(Protocol):
    """How fast something may be asked, as its settings and the registry say it."""

    @property
    def rps(self) -> float | None: ...
    @property
    def burst(self) -> int | None: ...
    @property
    def tokens_per_minute(self) -> int | None: ...


def limits_of(rates: Rates, concurrent: int | None = None) -> Limits:
    return Limits(rps=rates.rps, burst=rates.burst, concurrent=concurrent, tokens_per_minute=rates.tokens_per_minute)


def tenant_limits(tenants: Iterable[TenantConfig]) -> dict[str, Limits]:
    return {tenant.name: limits_of(tenant, tenant.max_concurrency) for tenant in tenants}


class Stay:
    """What one request holds of the limits it is under. `leave` gives it back, once."""

    def __init__(self) -> None:
        self._permits: list[Permit] = []

    def enter(self, entered: Permit | Refusal) -> None:
        """Raises RateLimited."""
        if isinstance(entered, Refusal):
            raise _limited(entered)
        self._permits.append(entered)

    def expect(self, tokens: int) -> None:
        """Raises RateLimited when a minute does not have so many left."""
        for permit in self._permits:
            if refusal := permit.expect(tokens):
                raise _limited(refusal)

    def used(self, tokens: int) -> None:
        for permit in self._permits:
            permit.used(tokens)

    def leave(self) -> None:
        while self._permits:
            self._permits.pop().leave()

    def undo(self) -> None:
        while self._permits:
            self._permits.pop().undo()


class Quotas:
    def __init__(self, tenants: Mapping[str, Limits], limiter: Limiter | None = None) -> None:
        self._tenants = tenants
        self._limiter = limiter or Limiter()

    def enter(self, card: ModelCard, *, key_tenant: str | None = None) -> Stay:
        """One request for this model. A backbone belongs to nobody: who asks it with a key is counted as the key's
        tenant. Raises RateLimited, and has taken nothing then."""
        stay = Stay()
        tenant = card.tenant if card.tenant is not None else key_tenant
        try:
            if tenant is not None and (limits := self._tenants.get(tenant, NO_LIMITS)) != NO_LIMITS:
                whose = f"The tenant {tenant!r}, with all its keys together,"
                stay.enter(self._limiter.enter(f"tenant:{tenant}", limits, whose=whose))
            if card.limits != NO_LIMITS:
                stay.enter(
                    self._limiter.enter(f"function:{card.name}", card.limits, whose=f"The function {card.name!r}")
                )
        except RateLimited:
            stay.undo()  # a function at its limit must not use up its tenant's rate
            raise
        return stay


def _limited(refusal: Refusal) -> RateLimited:
    return RateLimited(refusal.reason, retry_after_s=refusal.retry_after_s)
