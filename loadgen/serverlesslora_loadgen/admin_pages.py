"""The pages of a server of ours that say what it holds: its admin API's state and plan, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from serverlesslora_loadgen.errors import TargetError
from serverlesslora_loadgen.fetching import HasNone, get, get_json

HELD, DEVICE_S = "serverlesslora_memory_held_bytes", "serverlesslora_device_seconds_total"
UNNAMED = "cpu"


class Backbone(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int  # of the memory that is held for all workers
    state: str = ""
    sharing: str = ""
    device: str = UNNAMED


class WorkerStats(msgspec.Struct, frozen=True):
    adapter_bytes: int = 0
    kv_bytes: int = 0
    busy_s: float = 0.0


class Worker(msgspec.Struct, frozen=True):
    worker_id: str
    pid: int | None = None
    stats: WorkerStats | None = None


class State(msgspec.Struct, frozen=True):
    """GET /admin/state, the part that is read here."""

    backbones: tuple[Backbone, ...]
    workers: tuple[Worker, ...]
    functions: tuple[msgspec.Raw, ...] = ()

    @property
    def device(self) -> str:
        return self.backbones[0].device if self.backbones else UNNAMED

    @property
    def backbone_bytes(self) -> int:
        return sum(each.size_bytes for each in self.backbones)

    @property
    def adapter_bytes(self) -> int:
        """In the host's memory, where there is no device."""
        return sum(each.adapter_bytes for each in self._stats())

    @property
    def kv_bytes(self) -> int:
        return sum(each.kv_bytes for each in self._stats())

    def _stats(self) -> list[WorkerStats]:
        if not self.device.startswith(UNNAMED):
            return []
        return [each.stats for each in self.workers if each.stats is not None]


class Gauges(msgspec.Struct, frozen=True):
    """Of the page of metrics. None: it has no such series."""

    held_bytes: int | None
    device_s: float | None  # of all functions


def read_gauges(page: str) -> Gauges:
    """Only the lines that matter are given to the parser: pages of many functions are long."""
    lines = [line for line in page.splitlines() if line.startswith((HELD, DEVICE_S))]
    values: dict[str, list[float]] = {HELD: [], DEVICE_S: []}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if sample.name in values:
                    values[sample.name].append(sample.value)
    except ValueError as error:
        raise TargetError(f"its metrics cannot be read: {error}") from error
    held = values[HELD]
    # A counter with labels has no line before the first request.
    return Gauges(int(held[0]) if held else None, sum(values[DEVICE_S]) if held else None)


class _Plan(msgspec.Struct, frozen=True):
    capacity_bytes: int | None = None
    watermark: float | None = None
    policies: dict[str, str] = {}


class Admin:
    """`admin`, `url`: the admin API's address and the public one (for metrics; None: not asked), without a path."""

    def __init__(
        self, admin: str, url: str | None, *, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0
    ) -> None:
        self._admin = admin.rstrip("/")
        self._url = None if url is None else url.rstrip("/")
        self._headers = dict(headers or {})
        self._timeout_s = timeout_s

    def state(self) -> State:
        return get_json(f"{self._admin}/admin/state", State, headers=self._headers, timeout_s=self._timeout_s)

    def gauges(self) -> Gauges | None:
        """None: it has no page of metrics."""
        if self._url is None:
            return None
        try:
            page = get(f"{self._url}/metrics", headers=self._headers, timeout_s=self._timeout_s)
        except HasNone:
            return None
        return read_gauges(page.decode("utf-8", "replace"))

    def facts(self) -> dict[str, Any]:
        """Raises TargetError when the server does not answer."""
        state = self.state()
        facts: dict[str, Any] = {
            "device": state.device,
            "functions": len(state.functions),
            "backbones": {each.name: {"bytes": each.size_bytes, "sharing": each.sharing} for each in state.backbones},
        }
        try:
            plan = get_json(f"{self._admin}/admin/plan", _Plan, headers=self._headers, timeout_s=self._timeout_s)
        except HasNone:
            return facts
        return facts | {
            "capacity_bytes": plan.capacity_bytes,
            "watermark": plan.watermark,
            **{f"policy.{name}": choice for name, choice in plan.policies.items()},
        }
