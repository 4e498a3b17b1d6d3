"""What a request meets: a backbone, and perhaps one version of a function on it; and the domain that it belongs to."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Backbone(msgspec.Struct, frozen=True):
    name: str
    source: str  # directory or hub id
    dtype: str
    created: int  # unix seconds


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is true for all versions of a function, and may change without a new one."""

    tenant: str | None = None
    max_concurrency: int | None = None
    slo_ttft_s: float | None = None  # None: the server's
    pinned: bool = False
    rps: float | None = None
    burst: int | None = None
    tokens_per_minute: int | None = None


class Function(Settings, frozen=True, kw_only=True):
    """A function as one of its versions. A name is not an identity: requests that run keep the digest they have."""

    name: str
    digest: str
    backbone: str
    source: str  # where its owner deployed it from
    created: int  # unix seconds, of this version
    version: int = 1
    share: float = 1.0  # of the function's requests, 0..1
    size_bytes: int = 0
    rank: int = 0
    modules: int = 0
    kinds: tuple[str, ...] = ()


class Target(NamedTuple):
    """Where a request goes."""

    backbone: Backbone
    function: Function | None  # None: the bare backbone

    @property
    def digest(self) -> str | None:
        return self.function.digest if self.function else None


def settings_of(other: msgspec.Struct) -> Settings:
    """Its fields that are settings, such as a declared function's."""
    return Settings(**{name: getattr(other, name) for name in Settings.__struct_fields__})


def domain_of(target: Target, *, isolation: str) -> str:
    """The isolation domain a request belongs to: the tenant, else the function; the bare backbone has its own.

    The kind is part of the name, so a tenant can never be called like somebody's function and share its worker.
    """
    base = target.backbone.name
    if isolation == "shared":
        return f"{base}/shared"
    if target.function is None:
        return f"{base}/base"
    if target.function.tenant is not None:
        return f"{base}/tenant:{target.function.tenant}"
    return f"{base}/function:{target.function.name}"
