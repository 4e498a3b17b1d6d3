"""The same requests served by one full model per adapter: always on, or kept for a while after each answer.

All of them, also those that the measured server refused, failed or was never sent.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serverlesslora_loadgen.money.cost import Work, in_flight, is_host, make_cost
from serverlesslora_loadgen.money.prices import GB, Prices
from serverlesslora_loadgen.money.spans import Span, length, union
from serverlesslora_loadgen.observe import Sample
from serverlesslora_loadgen.record import WARM, Record
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


def work_of_all(work: Work, records: Sequence[Record]) -> Work:
    """`work`: of the measured server. One that answers every request is not to look dearer by the failures of another;
    answers that are missing are as long as those that came. All are good where anybody judged, and take as long as
    those that met nothing cold, where the server says which: a baseline is not made worse than it need be."""
    sent = len(records)
    warm = [record.e2e_s for record in records if record.outcome == "ok" and record.cold == WARM]
    known = [each for each in warm if each is not None]
    return Work(
        answered=sent,
        let_in=sent,
        output_tokens=round(work.output_tokens * sent / work.answered) if work.answered else 0,
        good=None if work.good is None else sent,
        mean_e2e_s=statistics.fmean(known) if known else work.mean_e2e_s,
    )


def device_s_of_all(device_s: float, work: Work, records: Sequence[Record]) -> float:
    """What the measured server took for those that it let in, for every request."""
    return device_s * len(records) / work.let_in if work.let_in else 0.0


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
    only make it less for who can. `work`, `device_s`: of this baseline, which answers everything."""
    tier = "host" if is_host(device) else "device"
    per_second = prices.memory({tier: instance.size_bytes})
    backbone = prices.memory({tier: instance.backbone_bytes}) * alive.busy_s
    return make_cost(
        name,
        f"{how}: {alive.alive_s:.4g} instance seconds of {instance.size_bytes / GB:.3g} GB ({instance.source}) at "
        f"{prices.memory({tier: GB}):g} ({tier} memory), "
        f"{device_s:.4g} device seconds at {prices.device_price(device):g} (as many a request as in the measured run), "
        f"{work.let_in} requests at {prices.request:g}; idle: the memory of instances while no request of their own "
        f"adapter was in flight; E2E as measured where nothing was cold",
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
        e2e_s=work.mean_e2e_s,
    )


def keep_alive_name(keep_alive_s: float, speedup: float) -> str:
    """Timers shrink with time; both are shown."""
    if speedup == 1:
        return f"{KEEP_ALIVE} {show_seconds(keep_alive_s)}"
    return f"{KEEP_ALIVE} {show_seconds(keep_alive_s)} ({show_seconds(keep_alive_s / speedup)} at x{speedup:g})"
