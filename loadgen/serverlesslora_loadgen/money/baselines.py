"""The same requests served by one full model per adapter: always on, or kept for a while after each answer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serverlesslora_loadgen.money.cost import Work, in_flight, make_cost
from serverlesslora_loadgen.money.prices import GB, Prices
from serverlesslora_loadgen.money.spans import Span, length, union
from serverlesslora_loadgen.observe import Sample
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Cost
from serverlesslora_loadgen.units import show_seconds

ALWAYS_ON, KEEP_ALIVE = "always on", "keep-alive"


class Instance(NamedTuple):
    """One full model with one adapter, in a process of its own."""

    backbone_bytes: int
    own_bytes: int  # process, adapter, keys and values
    source: str  # where the sizes come from, for people

    @property
    def size_bytes(self) -> int:
        return self.backbone_bytes + self.own_bytes


class Alive(NamedTuple):
    """Instances of a baseline over the run, seconds summed over all of them."""

    alive_s: float
    busy_s: float  # of these, with a request in flight


def instance_of(samples: Sequence[Sample]) -> Instance | None:
    """A backbone, and the least that was seen of all else per worker: a baseline is not made dearer than it need be.

    None: no sample tells a shared backbone from the rest.
    """
    backbone = max((sample.parts.get("backbone", 0) for sample in samples), default=0)
    own = [
        sum(sample.parts.get(part, 0) for part in ("workers", "adapters", "kv")) // sample.workers
        for sample in samples
        if sample.workers and sample.parts
    ]
    if not backbone or not own:
        return None
    return Instance(backbone, min(own), "a backbone and the smallest share per worker that was seen")


def spans_by_adapter(records: Sequence[Record]) -> dict[str, list[Span]]:
    """When each adapter's requests are in flight. One that was not answered takes as long as the median of those that
    were: a server of its own would have answered it."""
    durations = [span.end - span.begin for record in records if record.outcome == "ok" and (span := in_flight(record))]
    usual_s = statistics.median(durations) if durations else 0.0
    spans: dict[str, list[Span]] = {}
    for record in records:
        span = in_flight(record) if record.outcome == "ok" else None
        spans.setdefault(record.model, []).append(span or Span(record.intended_s, record.intended_s + usual_s))
    return spans


def always_on(records: Sequence[Record], seconds: float, *, adapters: int | None = None) -> Alive:
    """`adapters`: that are deployed; None: those that were asked for."""
    spans = spans_by_adapter(records)
    return Alive(max(len(spans), adapters or 0) * seconds, _covered(spans, seconds))


def kept_alive(records: Sequence[Record], seconds: float, keep_alive_s: float) -> Alive:
    """An instance is there from an adapter's request until `keep_alive_s` after its last answer, at most until the end
    of the run. Starting it takes no time: again, a baseline is not made dearer than it need be."""
    spans = spans_by_adapter(records)
    kept = {model: [Span(begin, end + keep_alive_s) for begin, end in each] for model, each in spans.items()}
    return Alive(_covered(kept, seconds), _covered(spans, seconds))


def _covered(spans: Mapping[str, Sequence[Span]], seconds: float) -> float:
    """Of each adapter what any of its spans covers, together."""
    return sum(length(union(each, within=Span(0.0, seconds))) for each in spans.values())


def baseline_cost(
    name: str,
    how: str,
    alive: Alive,
    instance: Instance,
    *,
    device_s: float,
    device: str | None,
    prices: Prices,
    work: Work,
) -> Cost:
    """The same work takes the same device seconds: batches of several adapters, which these servers cannot make, would
    only make it less for who can."""
    per_second = prices.memory({"host": instance.size_bytes})
    backbone = prices.memory({"host": instance.backbone_bytes}) * alive.busy_s
    return make_cost(
        name,
        f"{how}: {alive.alive_s:.4g} instance seconds of {instance.size_bytes / GB:.3g} GB ({instance.source}) at "
        f"{prices.gb_second.host:g} per GB-second, and the device seconds and requests of the measured run",
        parts={
            "backbone": backbone,
            "workers": per_second * alive.busy_s - backbone,
            "compute": prices.devices({device or "": device_s}),
            "requests": work.let_in * prices.request,
            "idle": per_second * (alive.alive_s - alive.busy_s),
        },
        work=work,
        prices=prices,
        gb_seconds=alive.alive_s * instance.size_bytes / GB,
        device_seconds=device_s,
        idle_share=1 - alive.busy_s / alive.alive_s if alive.alive_s else None,
    )


def keep_alive_name(keep_alive_s: float, speedup: float) -> str:
    """Timers shrink with time; both are shown."""
    if speedup == 1:
        return f"{KEEP_ALIVE} {show_seconds(keep_alive_s)}"
    return f"{KEEP_ALIVE} {show_seconds(keep_alive_s)} ({show_seconds(keep_alive_s / speedup)} at x{speedup:g})"
