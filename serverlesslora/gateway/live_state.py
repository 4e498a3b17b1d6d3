"""What the live page shows of the server behind it, as plain values: no prompt, no answer and no path is among them."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

# hot: loaded in a worker that serves; disk: that worker would have to read it first; cold: no worker serves its domain.
FunctionState = Literal["hot", "disk", "cold"]


class LiveFunction(msgspec.Struct, frozen=True):
    name: str
    backbone: str
    domain: str
    state: FunctionState = "cold"
    tenant: str | None = None
    version: str | None = None  # None: versions are not kept
    pinned: bool = False
    size_bytes: int = 0  # of its adapter
    open_requests: int = 0


class LiveWorker(msgspec.Struct, frozen=True):
    """`size_bytes` is all its own memory: process, KV and adapters; the two others are parts of it."""

    worker_id: str
    domain: str
    backbone: str
    device: str
    state: str
    pid: int | None = None
    age_s: float = 0.0
    idle_s: float = 0.0
    open_requests: int = 0
    running: int = 0
    waiting: int = 0
    functions: tuple[str, ...] = ()  # whose adapters it has loaded
    kv_usage: float = 0.0  # 0..1, of its blocks
    kv_bytes: int = 0
    adapter_bytes: int = 0
    size_bytes: int = 0


class LiveBackbone(msgspec.Struct, frozen=True):
    name: str
    state: str
    device: str
    sharing: str
    size_bytes: int = 0
    workers: int = 0  # that map it now


class LivePart(msgspec.Struct, frozen=True):
    """One piece of the memory map."""

    kind: str  # "backbone", "process", "worker", "adapter", "kv", "shared"
    name: str
    size_bytes: int


class LiveMemory(msgspec.Struct, frozen=True):
    capacity_bytes: int = 0
    measured_bytes: int | None = None  # by the kernel's own sums; None: not read yet
    parts: tuple[LivePart, ...] = ()


class LiveState(msgspec.Struct, frozen=True):
    functions: tuple[LiveFunction, ...] = ()
    workers: tuple[LiveWorker, ...] = ()
    backbones: tuple[LiveBackbone, ...] = ()
    memory: LiveMemory = LiveMemory()
    currency: str = ""


class Spending(Protocol):
    """Hears of money and memory when they are written down; what belongs to no function alone has the name ""."""

    def spent(self, function: str, tenant: str | None, device: float, charged: float | None) -> None:
        """One request, in the price file's currency."""

    def held(self, function: str, tenant: str | None, kind: str, byte_s: float, money: float) -> None:
        """One stretch of memory."""
