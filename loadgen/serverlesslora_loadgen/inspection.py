"""What is in a trace, before anything is sent: rates, popularity, classes, lengths, and what to beware of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from serverlesslora_loadgen.classes import CLASSES, DEFINITION, MIN_ARRIVALS, AdapterFacts, adapter_facts, cv
from serverlesslora_loadgen.trace import TraceRequest, digest
from serverlesslora_loadgen.units import show_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TOP_PERCENT = (1, 5, 10, 20)
LENGTH_PERCENT = (50, 90, 99, 100)
TOO_FEW = "too few requests"
COARSE_MS = 100  # times on a grid this coarse or coarser are told: they make bursts that nobody sent


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens. Percentiles are nearest-rank: lengths that are really there."""

    total: int
    mean: float
    percentiles: dict[str, int]  # p50 p90 p99 max


class ClassFacts(msgspec.Struct, frozen=True):
    adapters: int
    requests: int


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    requests: int
    adapters: int
    seconds: float  # from the start of the trace to its last request
    sha256: str
    mean_rps: float
    peak_second: int  # most requests in one second of the clock
    cv: float | None  # of the gaps between all requests, whoever is asked
    top_shares: dict[str, float]  # "10 %" → share of the requests that the most asked 10 % of adapters get, rounded up
    input: Lengths
    output: Lengths
    prefix_reuse: float | None  # share of prompt blocks that came before; None: the trace has no `hash_ids`
    classes: dict[str, ClassFacts]  # and TOO_FEW
    by_adapter: tuple[AdapterFacts, ...]  # the most asked first
    definition: str  # of the classes
    notes: tuple[str, ...]


def inspect(requests: Sequence[TraceRequest]) -> Inspection:
    """`requests` in the order of time, as in every trace."""
    times_s = np.array([each.timestamp for each in requests]) / 1000
    seconds = float(times_s[-1]) if requests else 0.0
    facts = adapter_facts(requests)
    classes = {name or TOO_FEW: [each for each in facts if each.class_ == name] for name in (*CLASSES, None)}
    return Inspection(
        requests=len(requests),
        adapters=len(facts),
        seconds=seconds,
        sha256=digest(requests),
        mean_rps=len(requests) / seconds if seconds > 0 else 0.0,
        peak_second=max(Counter(times_s.astype(np.int64).tolist()).values(), default=0),
        cv=cv(times_s),
        top_shares={
            f"{percent} %": sum(each.share for each in facts[: math.ceil(len(facts) * percent / 100)])
            for percent in TOP_PERCENT
        },
        input=_lengths([each.input_length for each in requests]),
        output=_lengths([each.output_length for each in requests]),
        prefix_reuse=_prefix_reuse(requests),
        classes={
            name: ClassFacts(adapters=len(each), requests=sum(one.n for one in each))
            for name, each in classes.items()
            if each
        },
        by_adapter=tuple(facts),
        definition=DEFINITION,
        notes=tuple(_notes(requests, facts)),
    )


def _lengths(tokens: list[int]) -> Lengths:
    ordered = sorted(tokens)
    ranks = {percent: max(0, math.ceil(len(ordered) * percent / 100) - 1) for percent in LENGTH_PERCENT}
    return Lengths(
        total=sum(ordered),
        mean=sum(ordered) / len(ordered) if ordered else 0.0,
        percentiles={
            "max" if percent == 100 else f"p{percent}": ordered[rank] for percent, rank in ranks.items() if ordered
        },
    )


def _prefix_reuse(requests: Sequence[TraceRequest]) -> float | None:
    seen: set[int] = set()
    reused = total = 0
    for each in requests:
        for block in each.hash_ids or ():
            total += 1
            reused += block in seen
            seen.add(block)
    return reused / total if total else None


def _notes(requests: Sequence[TraceRequest], facts: Sequence[AdapterFacts]) -> list[str]:
    notes = []
    times = np.unique(np.rint([each.timestamp for each in requests]).astype(np.int64))
    grid = int(np.gcd.reduce(times)) if len(times) else 0
    if grid >= COARSE_MS and len(requests) >= MIN_ARRIVALS and len(times) < len(requests):
        notes.append(
            f"all times are multiples of {grid} ms: replayed as they are, requests come in heaps that nobody sent;"
            " spread them inside that time, or say so with every result"
        )
    if any(not each.model for each in facts):
        notes.append("requests without an adapter ask whatever the run is told to ask")
    told = {(each.model, each.class_) for each in requests if each.class_ in CLASSES}
    found = {each.model: each.class_ for each in facts}
    if strayed := sorted({model for model, name in told if found[model] is not None and name != found[model]}):
        notes.append(
            f"the trace gives {len(strayed)} adapters another class than its times do: {', '.join(strayed[:5])}"
            f"{' …' if len(strayed) > 5 else ''}"
        )
    end_s = requests[-1].timestamp / 1000 if requests else 0.0
    if idle := sum(each.class_ == "Predictable" and each.silence_max_s > end_s / 2 for each in facts):
        notes.append(
            f"{idle} Predictable adapters are silent for more than half of the trace, before their first request or"
            " after their last: no gap, so not in the CV, and yet a cold start"
        )
    if rare := sum(each.n < MIN_ARRIVALS for each in facts):
        notes.append(f"{rare} of {len(facts)} adapters have fewer than {MIN_ARRIVALS} requests, too few for a class")
    if empty := sum(min(each.input_length, each.output_length) == 0 for each in requests):
        notes.append(f"{empty} requests have a length of 0; they are sent with one token")
    return notes


def print_inspection(inspection: Inspection, console: Console, *, adapters: int = 30) -> None:
    """At most so many of the adapters, the most asked."""
    from rich.table import Table

    one = inspection
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("requests", f"{one.requests:,} in {show_seconds(one.seconds)}"),
        ("rate", f"{one.mean_rps:.3g} per second, {one.peak_second:,} in the busiest second"),
        ("gaps", "too few" if one.cv is None else f"CV {one.cv:.2f} over all adapters together"),
        ("adapters", f"{one.adapters:,}: {_classes_in_words(one)}"),
        ("most asked", ", ".join(f"{top}: {share:.0%} of requests" for top, share in one.top_shares.items())),
        ("prompts", _lengths_in_words(one.input)),
        ("answers", _lengths_in_words(one.output)),
        ("prefixes", "" if one.prefix_reuse is None else f"{one.prefix_reuse:.0%} of prompt blocks came before"),
        ("sha256", one.sha256),
    ):
        if value:
            facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(facts)
    console.print(_adapter_table(one.by_adapter[:adapters]))
    if one.adapters > adapters:
        console.print(f"and {one.adapters - adapters:,} more, each with fewer requests", style="dim")
    console.print(one.definition, style="dim", highlight=False)
    for note in one.notes:
        console.print(f"[yellow]note:[/yellow] {_escaped(note)}", highlight=False)


def _classes_in_words(inspection: Inspection) -> str:
    return ", ".join(
        f"{each.adapters:,} {name} ({each.requests:,} requests)" for name, each in inspection.classes.items()
    )


def _lengths_in_words(lengths: Lengths) -> str:
    percentiles = ", ".join(f"{name} {tokens:,}" for name, tokens in lengths.percentiles.items())
    return f"mean {lengths.mean:,.0f} tokens, {percentiles}; {lengths.total:,} in all"


def _adapter_table(facts: Sequence[AdapterFacts]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("adapter", overflow="fold")
    for name in ("requests", "share", "per second", "CV", "longest silence"):
        table.add_column(name, justify="right")
    table.add_column("class", min_width=max(map(len, CLASSES)))
    for each in facts:
        table.add_row(
            _escaped(each.model) or "–",
            f"{each.n:,}",
            f"{each.share:.1%}",
            f"{each.rate_rps:.3g}",
            "–" if each.cv is None else f"{each.cv:.2f}",
            show_seconds(each.silence_max_s),
            each.class_ or "–",
        )
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
