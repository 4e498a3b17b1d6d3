"""All money of a run together: measured in two ways, beside baselines, with what has to be known to believe it."""

from __future__ import annotations

from collections.abc import Sequence

from serverlesslora_loadgen.ledger import Ledger
from serverlesslora_loadgen.money.baselines import (
    ALWAYS_ON,
    Alive,
    Instance,
    always_on,
    baseline_cost,
    device_s_of_all,
    instance_of,
    keep_alive_name,
    kept_alive,
    work_of_all,
)
from serverlesslora_loadgen.money.cost import (
    BOOKS,
    MEASURED,
    Work,
    busy_spans,
    device_seconds,
    is_host,
    ledger_cost,
    lifetimes_cost,
    work_of,
)
from serverlesslora_loadgen.money.prices import Prices
from serverlesslora_loadgen.money.spans import Level, Span, length
from serverlesslora_loadgen.observe import Sample
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Cost, Money

KEEP_ALIVE_S = 600.0  # of the trace's own time: what platforms that know nothing of models commonly use
SURPRISING = 0.1  # difference between the two ways to measure


def account(
    *,
    prices: Prices,
    records: Sequence[Record],
    seconds: float,
    samples: Sequence[Sample] = (),
    ledger: Ledger | None = None,
    device: str | None = None,
    good: int | None = None,
    instance: Instance | None = None,
    adapters: int | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
    speedup: float = 1.0,
    source: str = "looked at from outside",
) -> Money:
    """`seconds`: the run, from its start to its last answer; samples and ledger are of the same window.

    `good`: answers within the limits. `instance`: one full model, when samples cannot tell. `adapters`: that are
    deployed, where more are than were asked for. `source`: where the memory of samples comes from, for people.
    """
    work = work_of(records, good=good)
    measured = []
    if ledger is not None:
        measured.append(ledger_cost(ledger, prices=prices, work=work))
    seen = lifetimes_cost(samples, records, seconds=seconds, prices=prices, work=work, device=device, source=source)
    if seen is not None:
        measured.append(seen)
    difference = _difference(measured)
    notes = [f"All money is at {prices.label}."]
    if prices.illustrative:
        notes.append("These prices only illustrate an order of magnitude; they are nobody's offer.")
    if ledger is not None:
        notes += _ledger_notes(ledger, work, prices)
    if difference is not None and abs(difference) > SURPRISING:
        notes.append(f"The server's ledger and what was seen differ by {100 * difference:+.1f} %.")
    notes += _memory_notes(samples, device)
    # Of what is seen on a device nobody knows how much lies there.
    instance = instance or (instance_of(samples) if is_host(device) else None)
    if instance is None:
        notes.append("No baselines: nobody knows how large one full model with its process is (--instance-gb).")
        return _money(prices, measured, [], difference, notes)
    if measured:
        device_s = measured[-1].device_seconds or 0.0
    else:
        counted = device_seconds(samples, seconds)
        device_s = length(busy_spans(records, seconds)) if counted is None else counted
    device_s, of_all = device_s_of_all(device_s, work, records), work_of_all(work, records)
    ways = {
        ALWAYS_ON: ("one full model per adapter, always on", always_on(records, seconds, adapters=adapters)),
        keep_alive_name(keep_alive_s, speedup): (
            "one full model per adapter, kept after its last answer",
            kept_alive(records, seconds, keep_alive_s / speedup),
        ),
    }
    baselines = [
        baseline_cost(name, how, alive, instance, device_s=device_s, device=device, prices=prices, work=of_all)
        for name, (how, alive) in ways.items()
    ]
    notes.append(
        "Baselines take as many device seconds a request, start in no time and answer every request, all of them good "
        "and as fast as warm ones here: they look better here than they would."
    )
    if measured:
        notes.append(
            "Idle does not mean the same in all rows: of what was seen it is memory while no request of any adapter "
            "was in flight, of a ledger what was put down to nobody, of a baseline instances without a request of "
            "their own adapter."
        )
    if speedup != 1:
        notes.append(
            f"Time was compressed by {speedup:g}, answers were not: with the trace's own time, memory that waits would "
            f"wait {speedup:g} times as long, for every way to serve."
        )
    notes += _by_the_paper(samples, {name: alive for name, (_, alive) in ways.items()}, seconds, device, prices)
    return _money(prices, measured, baselines, difference, notes)


def _money(
    prices: Prices, measured: list[Cost], baselines: list[Cost], difference: float | None, notes: list[str]
) -> Money:
    return Money(
        currency=prices.currency,
        prices=prices.as_facts(),
        measured=measured,
        baselines=baselines,
        difference=difference,
        notes=notes,
    )


def _difference(measured: Sequence[Cost]) -> float | None:
    totals = {cost.name: cost.total for cost in measured}
    if BOOKS not in totals or not totals.get(MEASURED):
        return None
    return (totals[BOOKS] - totals[MEASURED]) / totals[MEASURED]


def _ledger_notes(ledger: Ledger, work: Work, prices: Prices) -> list[str]:
    notes = []
    usage, theirs = ledger.total.usage, ledger.prices
    if ledger.problem:
        notes.append(f"The server's ledger may miss something: {ledger.problem}")
    if not work.answered <= usage.finished <= work.let_in:
        notes.append(
            f"The server's ledger has {usage.finished} finished requests of this window; the client has "
            f"{work.answered} whole answers to {work.let_in} requests that were let in. Was somebody else asking?"
        )
    if (theirs.currency, theirs.date, theirs.source) != (prices.currency, prices.date, prices.source):
        kind = "illustrative prices" if theirs.illustrative else "prices"
        notes.append(
            f"By its own {kind} of {theirs.date.isoformat()} the server says {ledger.total.money.paid:.4g} "
            f"{theirs.currency}, without a price per request."
        )
    return notes


def _memory_notes(samples: Sequence[Sample], device: str | None) -> list[str]:
    """What was seen is priced as the host's memory, so it must be that."""
    if all(sample.held_bytes is None for sample in samples):
        return []
    if not is_host(device):
        return [
            f"What was seen is not priced: the server computes on {device}, and how much of what it holds lies there, "
            "where memory costs more than the host's, nobody told. The server's own ledger would; baselines need "
            "--instance-gb."
        ]
    if device is None:
        return [
            "Nobody said what the server computes on: only the host's memory was seen and is paid here. Of a server on "
            "a GPU the larger part is missing."
        ]
    return []


def _by_the_paper(
    samples: Sequence[Sample], ways: dict[str, Alive], seconds: float, device: str | None, prices: Prices
) -> list[str]:
    """cost = Σ alive seconds · price of a GPU second (ServerlessLoRA, arXiv 2505.14468, section 6)."""
    points = [(sample.at_s, sample.workers) for sample in samples if sample.workers is not None]
    if not points:
        return []
    workers_s = Level(points).sum_over([Span(0.0, seconds)])
    alive = {"measured": workers_s} | {name: each.alive_s for name, each in ways.items()}
    price = prices.device_price(device)
    costs = ", ".join(f"{name} {alive_s * price:.3g} {prices.currency}" for name, alive_s in alive.items())
    kind = "illustrative " if prices.illustrative else ""
    return [f"As the paper counts (alive seconds of workers at the {kind}price of a device second): {costs}."]
