"""What is said of a set of requests: counts, attainment, latencies, and the same for its parts.

Attainment is good of sent. What was shed, failed or never left is in no latency, but it is in every denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from serverlesslora_loadgen.analysis import statistics
from serverlesslora_loadgen.analysis.columns import NO_CLASS, Columns, Floats, Ints, Table
from serverlesslora_loadgen.classes import CLASSES
from serverlesslora_loadgen.record import UNKNOWN, WARM
from serverlesslora_loadgen.result import Counts, Distribution, Estimate, Group, Section

DECILES = 10
SLICES = 12  # of time, at most

_GROUPED = ("ttft", "tpot", "e2e")
_MEASURED = ("ttft", "ttft_from_send", "ttst", "tpot", "max_gap", "e2e", "e2e_from_send")


def section(columns: Columns, *, seconds: float, until_s: float | None = None) -> Section:
    """`seconds` is the time it took. `until_s`: answers that ended later are no goodput (they are in attainment)."""
    table = columns.table
    counted = table.good if until_s is None else table.good & (table.done <= until_s)
    adapters = by_adapter(columns)
    return Section(
        seconds=seconds,
        counts=counts(table, columns.failures),
        attainment=attainment(table),
        goodput_rps=int(counted.sum()) / seconds if seconds > 0 else 0.0,
        goodput_tps=int(table.output_tokens[counted].sum()) / seconds if seconds > 0 else 0.0,
        latency={**latencies(table, _MEASURED), "itl": statistics.distribution(columns.gaps_per_token)},
        groups={
            "adapter": adapters,
            "class": by_class(columns),
            "decile": by_decile(columns),
            "cold": by_cold(columns),
            "slice": by_slice(columns),
        },
        fairness=statistics.jain([group.attainment.value for group in adapters]),
    )


def counts(table: Table, failures: Sequence[str]) -> Counts:
    """Tokens are those of answered requests; the others were worth nothing to anybody."""
    found = np.bincount(table.failure[table.failed], minlength=len(failures))
    return Counts(
        sent=len(table),
        ok=int(table.ok.sum()),
        shed=int(table.shed.sum()),
        failed=int(table.failed.sum()),
        unsent=int(table.unsent.sum()),
        failures={
            name or "unknown": int(count)
            for name, count in sorted(zip(failures, found, strict=True), key=lambda each: (-each[1], each[0]))
            if count
        },
        shed_without_retry_after=int((table.shed & ~table.has_retry_after).sum()),
        input_tokens=int(table.input_tokens[table.ok].sum()),
        cached_tokens=int(table.cached_tokens[table.ok].sum()),
        output_tokens=int(table.output_tokens[table.ok].sum()),
        coalesced=int((table.ok & (table.chunks < table.output_tokens)).sum()),
    )


def attainment(table: Table) -> Estimate:
    return statistics.share(int(table.good.sum()), len(table))


def latencies(table: Table, names: Sequence[str]) -> dict[str, Distribution]:
    return {name: statistics.distribution(getattr(table, name)) for name in names}


def by_adapter(columns: Columns) -> list[Group]:
    """By popularity in the whole trace."""
    return _groups(columns, columns.table.model, columns.models)


def by_class(columns: Columns) -> list[Group]:
    """None when no request has a class."""
    if columns.classes in ([], [NO_CLASS]):
        return []

    def order(name: str) -> tuple[int, str]:
        known = [*CLASSES, name, NO_CLASS] if name != NO_CLASS else [*CLASSES, "", NO_CLASS]
        return known.index(name), name

    return _sorted(columns, columns.table.class_, columns.classes, order)


def by_decile(columns: Columns) -> list[Group]:
    """Of adapters by popularity in the whole trace, 1 the most asked. None below ten adapters: each is its own."""
    adapters = len(columns.models)
    if adapters < DECILES:
        return []
    names = [str(decile + 1) for decile in range(DECILES)]
    return _groups(columns, columns.table.model * DECILES // adapters, names)


def by_cold(columns: Columns) -> list[Group]:
    """Warm first, those nothing was said of last."""

    def order(name: str) -> tuple[int, str]:
        return (0 if name == WARM else 2 if name == UNKNOWN else 1), name

    return _sorted(columns, columns.table.cold, columns.colds, order)


def by_slice(columns: Columns) -> list[Group]:
    """Of intended time."""
    intended = columns.table.intended
    if not len(intended):
        return []
    step_s = statistics.nice_step(float(intended.max()) + 1e-9, SLICES)
    unit, scale = ("min", 60) if step_s >= 60 else ("s", 1)
    codes = _steps(intended, step_s)
    names = [f"{n * step_s / scale:g}–{(n + 1) * step_s / scale:g} {unit}" for n in range(int(codes.max()) + 1)]
    return _groups(columns, codes, names)


def _steps(times: Floats, step_s: float) -> Ints:
    return np.maximum(0, times // step_s).astype(np.int64)


def _sorted(columns: Columns, codes: Ints, names: Sequence[str], key: Callable[[str], tuple[int, str]]) -> list[Group]:
    order = sorted(range(len(names)), key=lambda code: key(names[code]))
    new = np.empty(len(names), dtype=np.int64)
    new[order] = np.arange(len(names))
    return _groups(columns, new[codes], [names[code] for code in order])


def _groups(columns: Columns, codes: Ints, names: Sequence[str]) -> list[Group]:
    """In the order of codes; those without a request are left out."""
    order = np.argsort(codes, kind="stable")
    table, ends = columns.table.rows(order), np.cumsum(np.bincount(codes, minlength=len(names)))
    groups, begin = [], 0
    for name, end in zip(names, ends, strict=True):
        if end > begin:
            members = table.rows(slice(begin, int(end)))
            groups.append(
                Group(
                    key=name,
                    counts=counts(members, columns.failures),
                    attainment=attainment(members),
                    latency=latencies(members, _GROUPED),
                )
            )
        begin = int(end)
    return groups
