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
    instance_of,
    keep_alive_name,
    kept_alive,
)
from serverlesslora_loadgen.money.cost import (
    BOOKS,
    MEASURED,
    Work,
    busy_spans,
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
    instance = instance or instance_of(samples)
    if instance is None:
        notes.append("No baselines: nobody knows how large one full model with its process is (--instance-gb).")
        return _money(prices, measured, [], difference, notes)
    device_s = measured[-1].device_seconds if measured else length(busy_spans(records, seconds))
    ways = {
        ALWAYS_ON: ("one full model per adapter, always on", always_on(records, seconds, adapters=adapters)),
        keep_alive_name(keep_alive_s, speedup): (
            "one full model per adapter, kept after its last answer",
            kept_alive(records, seconds, keep_alive_s / speedup),
        ),
    }
    baselines = [
        baseline_cost(name, how, alive, instance, device_s=device_s or 0.0, device=device, prices=prices, work=work)
        for name, (how, alive) in ways.items()
    ]
    notes.append(
        "Baselines do the same work with the same device seconds, start in no time and answer every request: they "
        "cost less here than they would."
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
