"""What `model` means: names of functions and backbones, and the adapter digest each function answers with now.

Pure bookkeeping. A name is not an identity: deploying a name again changes its digest, and requests that run keep
the digest they were admitted with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from serverlesslora.errors import InvalidRequest, ModelNotFound


class Backbone(msgspec.Struct, frozen=True):
    name: str
    source: str  # directory or hub id
    dtype: str
    created: int  # unix seconds


class Function(msgspec.Struct, frozen=True):
    name: str
    digest: str
    backbone: str
    source: str  # where its owner deployed it from
    created: int  # unix seconds
    tenant: str | None = None
    max_concurrency: int | None = None
    size_bytes: int = 0
    rank: int = 0
    modules: int = 0
    kinds: tuple[str, ...] = ()
    slo_ttft_s: float | None = None  # None: the server's
    pinned: bool = False


class Target(NamedTuple):
    """Where a request goes."""

    backbone: Backbone
    function: Function | None  # None: the bare backbone

    @property
    def digest(self) -> str | None:
        return self.function.digest if self.function else None


class Registry:
    def __init__(self, backbones: list[Backbone]) -> None:
        self._backbones = {backbone.name: backbone for backbone in backbones}
        self._functions: dict[str, Function] = {}
        self.version = 0  # counts changes, for those who keep something computed from all functions

    def resolve(self, name: str) -> Target:
        """Raises ModelNotFound; an unknown name is never answered by a backbone."""
        if function := self._functions.get(name):
            return Target(self._backbones[function.backbone], function)
        if backbone := self._backbones.get(name):
            return Target(backbone, None)
        raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")

    def backbone(self, name: str | None) -> Backbone:
        """The named backbone, or the first one. Raises ModelNotFound."""
        if name is None:
            return next(iter(self._backbones.values()))
        if name not in self._backbones:
            raise ModelNotFound(f"The backbone `{name[:200]}` is not served here.", param="backbone")
        return self._backbones[name]

    def function(self, name: str) -> Function | None:
        return self._functions.get(name)

    def deploy(self, function: Function) -> Function | None:
        """Put the function under its name; returns the one it replaced. Raises InvalidRequest for a backbone's name."""
        self.check_name(function.name)
        previous = self._functions.get(function.name)
        self._functions[function.name] = function
        self.version += 1
        return previous

    def check_name(self, name: str) -> None:
        if name in self._backbones:
            raise InvalidRequest(f"'{name}' conflicts with a served base model.", param="lora_name")

    def remove(self, name: str) -> Function | None:
        self.version += 1
        return self._functions.pop(name, None)

    def backbones(self) -> Iterator[Backbone]:
        yield from self._backbones.values()

    def functions(self) -> Iterator[Function]:
        """As they are now, whatever changes while they are read."""
        yield from list(self._functions.values())

    @property
    def num_functions(self) -> int:
        return len(self._functions)


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
