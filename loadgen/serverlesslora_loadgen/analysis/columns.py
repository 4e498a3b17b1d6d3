"""Records as columns, which a hundred thousand of them need to be looked at in seconds. NaN: never reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serverlesslora_loadgen.record import UNKNOWN, WARM, Record
from serverlesslora_loadgen.result import Limits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NO_CLASS = "none"  # of requests whose adapter has no class, among others that have one


class Names(NamedTuple):
    """A column of texts: `all[codes[i]]` is that of row i."""

    codes: Ints
    all: list[str]


@dataclass(frozen=True)
class Table:
    """One row per request of the trace, whatever became of it. Latencies are of those that were answered only."""

    id: Ints
    intended: Floats
    written: Floats
    lag: Floats
    done: Floats
    ok: Bools
    shed: Bools
    failed: Bools
    unsent: Bools
    has_retry_after: Bools
    good: Bools  # answered with a token at least, within the limits and its own deadline
    ttft: Floats
    ttft_from_send: Floats
    ttst: Floats
    tpot: Floats
    max_gap: Floats
    e2e: Floats
    e2e_from_send: Floats
    input_tokens: Ints
    cached_tokens: Ints
    output_tokens: Ints
    chunks: Ints
    failure: Ints  # code, see `Columns`
    model: Ints
    class_: Ints
    cold: Ints

    def __len__(self) -> int:
        return len(self.id)

    def rows(self, at: Ints | Bools | slice) -> Table:
        return Table(*(getattr(self, each.name)[at] for each in fields(self)))

    def or_never(self, latency: str) -> Floats:
        """∞ for what was not answered. NaN: answered, and there is nothing to measure, as between tokens of one."""
        values: Floats = np.where(self.ok, getattr(self, latency), np.inf)
        # An answer without a token is none.
        return np.where(np.isnan(values), np.inf, values) if latency in ("ttft", "e2e") else values


@dataclass(frozen=True)
class Columns:
    """A table, the names behind its codes, and the gaps of all answered requests in one row."""

    table: Table
    failures: list[str]  # "" is none
    models: list[str]  # by popularity in the whole trace, the most asked first
    classes: list[str]
    colds: list[str]
    gaps: Floats  # between events with tokens, as they came
    gaps_per_token: Floats  # the same, divided by how many tokens an event of that answer carried
    gap_rows: Ints  # row of the table that a gap belongs to

    def where(self, mask: Bools) -> Columns:
        """Names and their codes stay, so that an adapter keeps its rank."""
        kept = mask[self.gap_rows]
        new_rows = np.cumsum(mask) - 1
        return Columns(
            self.table.rows(mask),
            self.failures,
            self.models,
            self.classes,
            self.colds,
            self.gaps[kept],
            self.gaps_per_token[kept],
            new_rows[self.gap_rows[kept]],
        )


def columns(records: Sequence[Record], limits: Limits) -> Columns:
    def floats(get: Callable[[Record], float | None]) -> Floats:
        return np.array([get(record) for record in records], dtype=np.float64)

    def ints(get: Callable[[Record], int]) -> Ints:
        return np.array([get(record) for record in records], dtype=np.int64)

    def bools(get: Callable[[Record], bool]) -> Bools:
        return np.array([get(record) for record in records], dtype=np.bool_)

    outcome = _names(record.outcome for record in records)
    ok, shed, failed, unsent = (
        outcome.codes == (outcome.all.index(name) if name in outcome.all else -1)
        for name in ("ok", "shed", "failed", "unsent")
    )
    intended, written = floats(lambda record: record.intended_s), floats(lambda record: record.written_s)
    first, last = floats(lambda record: record.first_token_s), floats(lambda record: record.last_token_s)
    second = floats(lambda record: record.second_token_s)
    output_tokens = ints(lambda record: record.output_tokens)
    chunks = ints(lambda record: record.chunks)

    def answered(values: Floats) -> Floats:
        return np.where(ok, values, np.nan)

    ttft, e2e = answered(first - intended), answered(last - intended)
    tpot = answered(np.where(output_tokens >= 2, (last - first) / np.maximum(1, output_tokens - 1), np.nan))
    deadline = floats(lambda record: record.deadline_s)
    good = (
        ~np.isnan(ttft)
        & _within(ttft, limits.ttft_s)
        & _within(e2e, limits.e2e_s)
        & (np.isnan(deadline) | (ttft <= deadline))
    )
    good &= (output_tokens < 2) | _within(tpot, limits.tpot_s)

    model = by_popularity(_names(record.model for record in records))
    class_ = _names(record.class_ or NO_CLASS for record in records)
    # What was shed or failed found nothing in its place: nobody looked.
    cold = _names(UNKNOWN if each.cold == WARM and each.outcome != "ok" else each.cold for each in records)
    failure = _names(record.failure or "" for record in records)

    counts = np.array([len(record.gaps_s) if is_ok else 0 for record, is_ok in zip(records, ok, strict=True)], np.int64)
    gaps = np.fromiter(
        chain.from_iterable(record.gaps_s for record, is_ok in zip(records, ok, strict=True) if is_ok),
        dtype=np.float64,
        count=int(counts.sum()),
    )
    gap_rows = np.repeat(np.arange(len(records)), counts)
    per_event = np.maximum(1.0, output_tokens / np.maximum(1, chunks))
    table = Table(
        id=ints(lambda record: record.id),
        intended=intended,
        written=written,
        lag=floats(lambda record: record.lag_s),
        done=floats(lambda record: record.done_s),
        ok=ok,
        shed=shed,
        failed=failed,
        unsent=unsent,
        has_retry_after=bools(lambda record: record.retry_after_s is not None),
        good=good,
        ttft=ttft,
        ttft_from_send=answered(first - written),
        ttst=answered(second - intended),
        tpot=tpot,
        max_gap=answered(floats(lambda record: record.max_gap_s)),
        e2e=e2e,
        e2e_from_send=answered(last - written),
        input_tokens=ints(lambda record: record.input_tokens),
        cached_tokens=ints(lambda record: record.cached_tokens),
        output_tokens=output_tokens,
        chunks=chunks,
        failure=failure.codes,
        model=model.codes,
        class_=class_.codes,
        cold=cold.codes,
    )
    per_token = gaps / per_event[gap_rows] if len(gaps) else gaps
    return Columns(table, failure.all, model.all, class_.all, cold.all, gaps, per_token, gap_rows)


def by_popularity(names: Names) -> Names:
    """The most asked first; equally asked by name."""
    asked = np.bincount(names.codes, minlength=len(names.all))
    order = sorted(range(len(names.all)), key=lambda code: (-asked[code], names.all[code]))
    new = np.empty(len(order), dtype=np.int64)
    new[order] = np.arange(len(order))
    return Names(new[names.codes] if len(order) else names.codes, [names.all[code] for code in order])


def _names(texts: Iterable[str]) -> Names:
    seen: dict[str, int] = {}
    codes = [seen.setdefault(text, len(seen)) for text in texts]
    return Names(np.array(codes, dtype=np.int64), list(seen))


def _within(values: Floats, limit: float | None) -> Bools:
    """What is not known is not within a limit."""
    return np.ones(len(values), dtype=np.bool_) if limit is None else values <= limit
