"""What a run cost, from quantities and prices: by what was seen from outside, and by the server's own ledger.

    cost = GB-seconds held * price + device seconds * price + requests let in * price

The paper (ServerlessLoRA, arXiv 2505.14468, section 6) counts alive seconds of containers instead, each at the price of
a GPU second; where instances share one device, memory and device time have to be told apart. Its cost-effectiveness,
1 / (mean E2E * cost), is shown besides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from serverlesslora_loadgen.ledger import Ledger
from serverlesslora_loadgen.money.prices import GB, Prices
from serverlesslora_loadgen.money.spans import Level, Span, length, union
from serverlesslora_loadgen.observe import Sample
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Cost, CostPart

MEASURED, BOOKS = "lifetimes", "ledger"

HOST = "cpu"  # how the name of a device begins that computes in the host's memory

# Where the memory of a part is shown; what is nobody else's belongs to processes.
SHOWN_AS = {"backbone": "backbone", "adapters": "adapters"}


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What was got for the money."""

    answered: int  # whole answers: who sheds or fails is not cheaper for it
    let_in: int  # neither shed nor unsent: what a platform charges as invocations
    output_tokens: int  # of the answers
    good: int | None = None  # answered within the limits; None: nobody judged
    mean_e2e_s: float | None = None


def is_host(device: str | None) -> bool:
    """Whether all that a server on this device holds lies in the host's memory. Of one that nobody named we believe it,
    as no other memory was seen."""
    return device is None or device.casefold().startswith(HOST)


def work_of(records: Sequence[Record], *, good: int | None = None) -> Work:
    answered = [record for record in records if record.outcome == "ok"]
    e2e = [record.e2e_s for record in answered if record.e2e_s is not None]
    return Work(
        answered=len(answered),
        let_in=sum(record.outcome in ("ok", "failed") for record in records),
        output_tokens=sum(record.output_tokens for record in answered),
        good=good,
        mean_e2e_s=statistics.fmean(e2e) if e2e else None,
    )


def in_flight(record: Record) -> Span | None:
    """From its last byte sent to the end of its answer; None: it never was, or nobody knows until when."""
    ends = (record.done_s, record.last_token_s, record.first_byte_s)
    end = max((each for each in ends if each is not None), default=None)
    return None if record.written_s is None or end is None else Span(record.written_s, end)


def busy_spans(records: Sequence[Record], seconds: float) -> list[Span]:
    """When somebody waited for an answer."""
    spans = [span for record in records if (span := in_flight(record)) is not None]
    return union(spans, within=Span(0.0, seconds))


def make_cost(
    name: str,
    how: str,
    *,
    parts: Mapping[str, float],
    work: Work,
    prices: Prices,
    gb_seconds: float,
    device_seconds: float,
    idle_share: float | None,
    e2e_s: float | None = None,
) -> Cost:
    """`parts` are money and add up to the total; `e2e_s`: mean, where this way to serve was measured."""
    total = math.fsum(parts.values())

    def per(count: float | None) -> float | None:
        return total / count if count else None

    return Cost(
        name=name,
        how=f"{how}; {prices.label}",
        total=total,
        parts=[CostPart(part, amount) for part, amount in parts.items()],
        per_1k_requests=per(work.answered / 1000),
        per_1m_output_tokens=per(work.output_tokens / 1e6),
        per_good_request=per(work.good),
        idle_share=idle_share,
        gb_seconds=gb_seconds,
        device_seconds=device_seconds,
        effectiveness=1 / (e2e_s * total) if e2e_s and total else None,
    )


def lifetimes_cost(
    samples: Sequence[Sample],
    records: Sequence[Record],
    *,
    seconds: float,
    prices: Prices,
    work: Work,
    device: str | None = None,
    source: str = "looked at from outside",
) -> Cost | None:
    """By what was seen while it ran. None: nobody saw any memory, or some of it lies on a device: how much, nobody
    tells, and it costs many times as much as the host's.

    Idle is the memory at times when no request was in flight. Without a count of device seconds, every moment at which
    one was in flight counts as one.
    """
    seen = [sample for sample in samples if sample.held_bytes is not None]
    if not seen or seconds <= 0 or not is_host(device):
        return None
    run = Span(0.0, seconds)
    busy = busy_spans(records, seconds)
    held = Level([(sample.at_s, sample.held_bytes or 0) for sample in seen])
    held_byte_s, busy_byte_s = held.sum_over([run]), held.sum_over(busy)
    device_s = device_seconds(samples, seconds)
    parts = {"backbone": 0.0, "adapters": 0.0, "workers": 0.0}
    for part in sorted({name for sample in seen for name in sample.parts}):
        level = Level([(sample.at_s, sample.parts.get(part, 0)) for sample in seen])
        parts[SHOWN_AS.get(part, "workers")] += prices.memory({"host": level.sum_over(busy)})
    told = math.fsum(parts.values())
    parts["workers"] += max(0.0, prices.memory({"host": busy_byte_s}) - told)  # what no sample says the purpose of
    parts["compute"] = prices.devices({device or "": length(busy) if device_s is None else device_s})
    parts["requests"] = work.let_in * prices.request
    parts["idle"] = prices.memory({"host": held_byte_s - busy_byte_s})
    clock = "counted by the server" if device_s is not None else "in which a request was in flight"
    return make_cost(
        MEASURED,
        f"{held_byte_s / GB:.4g} GB-seconds held ({source}) at {prices.gb_second.host:g}, "
        f"{length(busy) if device_s is None else device_s:.4g} device seconds ({clock}) at "
        f"{prices.device_price(device):g}, {work.let_in} requests at {prices.request:g}; idle: the memory while no "
        f"request of any adapter was in flight",
        parts=parts,
        work=work,
        prices=prices,
        gb_seconds=held_byte_s / GB,
        device_seconds=length(busy) if device_s is None else device_s,
        idle_share=1 - busy_byte_s / held_byte_s if held_byte_s else None,
        e2e_s=work.mean_e2e_s,
    )


def device_seconds(samples: Sequence[Sample], seconds: float) -> float | None:
    """Spent between the start and the end of the run; None: nobody counted them."""
    points = [(sample.at_s, sample.device_s) for sample in samples if sample.device_s is not None]
    if not points:
        return None
    level = Level(points)
    # What is counted only when a request ends may appear after the last answer: the first look after it has it.
    after = next((seen for at, seen in points if at >= seconds), points[-1][1])
    return after - level.at(0.0)


def ledger_cost(ledger: Ledger, *, prices: Prices, work: Work) -> Cost:
    """By the server's own books, at these prices. They do not say what memory was for, only what nobody used."""
    usage, idle = ledger.total.usage, ledger.idle_byte_s
    held = sum(usage.byte_s.values())
    idle_money = prices.memory(idle)
    return make_cost(
        BOOKS,
        f"{held / GB:.4g} GB-seconds, {usage.device_s:.4g} device seconds and {usage.requests} requests by the "
        f"server's own ledger; idle: the memory that it put down to nobody",
        parts={
            "memory": prices.memory(usage.byte_s) - idle_money,
            "compute": prices.devices(usage.device_s_of),
            "requests": (usage.requests - usage.refused) * prices.request,
            "idle": idle_money,
        },
        work=work,
        prices=prices,
        gb_seconds=held / GB,
        device_seconds=usage.device_s,
        idle_share=sum(idle.values()) / held if held else None,
        e2e_s=work.mean_e2e_s,
    )
