"""An API key as people know it: whose it is, what it may ask for, and how much."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Label = Annotated[str, Meta(min_length=1, max_length=128)]
State = Literal["valid", "expired", "revoked"]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one key may take. None: no limit."""

    rps: Annotated[float, Meta(gt=0, le=1e6)] | None = None  # requests per second, of any kind
    burst: Annotated[int, Meta(ge=1, le=10**6)] | None = None  # requests at once after a pause; None: a second's worth
    concurrent: Annotated[int, Meta(ge=1, le=10**6)] | None = None  # requests open at once
    tokens_per_minute: Annotated[int, Meta(ge=1, le=10**12)] | None = None  # prompt and output

    def __post_init__(self) -> None:
        if self.burst is not None and self.rps is None:
            raise ValueError(f"burst is {self.burst}, but there is no rps that it could be a burst of")

    @property
    def burst_size(self) -> int:
        return self.burst or max(1, math.ceil(self.rps or 0))


# Unknown fields are refused: a restriction that an older program does not know must not be lost in silence.
class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a key is good for."""

    tenant: Label | None = None  # None: the operator's; sees every tenant's functions and the backbones
    functions: tuple[Label, ...] = ()  # names or glob patterns; none: all of the tenant's
    allow_base: bool = False  # may ask the backbones themselves
    admin: bool = False  # may use the admin API, load adapters and unload them
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.tenant is None and not self.admin:
            raise ValueError("a key needs a tenant; only an admin key can do without one")
        if self.tenant is None and (self.functions or self.allow_base):
            raise ValueError("functions and allow_base narrow a tenant's key; name the tenant")
        for text in (self.tenant or "x", *self.functions):
            if not text.isprintable() or text != text.strip():
                raise ValueError(f"{text!r} has spaces at its ends or characters that cannot be printed")

    def may_ask(self, function: str, tenant: str | None) -> bool:
        if self.tenant is None:
            return True
        if tenant != self.tenant:  # also when the function has no tenant: nobody gave it to this one
            return False
        return not self.functions or any(fnmatchcase(function, pattern) for pattern in self.functions)

    @property
    def may_ask_backbones(self) -> bool:
        return self.tenant is None or self.allow_base


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """Times are unix seconds."""

    id: str  # public: it may be shown and written down
    grant: Grant
    name: str | None = None
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None  # to the minute
    revoked_at: float | None = None

    def state(self, now: float) -> State:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "valid"
