"""Logs with one line per request: Mooncake and JSON lines like it, Azure LLM inference, BurstGPT.

Mooncake: Qin et al., FAST '25. Azure LLM inference: Patel et al., "Splitwise", ISCA '24 (2023) and Stojkovic et al.,
"DynamoLLM", HPCA '25 (2024). BurstGPT: Wang et al., KDD '25.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from serverlesslora_loadgen.sources import jitter
from serverlesslora_loadgen.sources.options import Imported, ImportOptions, Progress, guard_size, in_order, to_ms
from serverlesslora_loadgen.sources.rows import Columns, Row, read_table
from serverlesslora_loadgen.trace import TraceRequest, read_trace

OUT_OF_ORDER_S = 600.0  # a log is in the order of time, but for this much: reading stops so long after the end
DAY_S = 86400.0


def import_jsonl(path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """Mooncake's format and this load generator's own. Blocks of prompts (`hash_ids`) stay as they are."""
    requests = read_trace(path)
    if progress is not None:
        progress(1.0)
    guard_size(len(requests), str(path))
    step = jitter.clock_step_ms([request.timestamp for request in requests])
    requests, notes = _spread(requests, step, options)
    if options.model and any(not request.model for request in requests):
        requests = [
            request if request.model else msgspec.structs.replace(request, model=options.model) for request in requests
        ]
    return Imported(in_order(_cut(requests, options), options, str(path)), notes)


def import_azure_llm(path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """`TIMESTAMP,ContextTokens,GeneratedTokens` of 2023 (no zone, 100 ns) and of 2024 (with a zone)."""
    header, rows = read_table(path, progress)
    names = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    when, context, generated = Columns(header).need(names, "Azure LLM trace")
    requests: list[TraceRequest] = []
    first: datetime | None = None
    before = 0
    earliest_s = _earliest_s(options)
    for row in rows:
        at = _instant(row, when)
        first = first or at
        at_s = (at - first).total_seconds()
        if at_s >= options.end_s + OUT_OF_ORDER_S:
            break
        before += at_s < 0
        if earliest_s <= at_s < options.end_s:
            input_length, output_length = row.count(context, names[1]), row.count(generated, names[2])
            requests.append(TraceRequest(to_ms(at_s), input_length, output_length, options.model))
            guard_size(len(requests), str(path))
    notes = [] if first is None else [f"times count from the first row of {path.name}, {first.isoformat(sep=' ')}"]
    if before:
        notes.append(f"{before} requests from before that, further down in the file, were left out")
    requests, more = _spread(requests, None, options)
    return Imported(in_order(_cut(requests, options), options, str(path)), notes + more)


def import_burstgpt(path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """`Timestamp,Model,Request tokens,Response tokens,…`, in later files with a session; times in whole seconds.

    Later files go on counting where the earlier ones end: times count from the beginning of the first row's day.
    """
    header, rows = read_table(path, progress)
    columns = Columns(header)
    names = ("Timestamp", "Model", "Request tokens", "Response tokens")
    when, model, asked, answered = columns.need(names, "BurstGPT trace")
    session = columns.find("Session ID")
    requests: list[TraceRequest] = []
    origin_s: float | None = None
    failed = 0
    whole_seconds = True
    # Those of the second that is begun are kept, until it is known whether they are put off within it.
    earliest_s = math.floor(options.start_s) if options.jitter_ms is None else _earliest_s(options)
    for row in rows:
        timestamp = row.number(when, names[0])
        if origin_s is None:
            origin_s = math.floor(timestamp / DAY_S) * DAY_S
        at_s = timestamp - origin_s
        if at_s >= options.end_s + OUT_OF_ORDER_S:
            break
        if not earliest_s <= at_s < options.end_s:
            continue
        input_length, output_length = row.count(asked, names[2]), row.count(answered, names[3])
        if input_length == 0 or output_length == 0:
            failed += 1
            continue
        whole_seconds = whole_seconds and at_s == int(at_s)
        of_session = row.text(session) or None if session is not None else None
        name = row.text(model) or options.model
        requests.append(TraceRequest(1000 * at_s, input_length, output_length, name, session=of_session))
        guard_size(len(requests), str(path))
    requests, notes = _spread(requests, jitter.COARSE_MS if whole_seconds else None, options)
    if origin_s:
        notes.append(
            f"times count from second {origin_s:.0f} of the log, the beginning of its day {origin_s / DAY_S:.0f}"
        )
    if failed:
        notes.append(
            f"{failed:,} requests that failed (no tokens asked or answered) were left out: nothing says how long they"
            " would have been"
        )
    return Imported(in_order(_cut(requests, options), options, str(path)), notes)


def _instant(row: Row, column: int) -> datetime:
    text = row.text(column)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise row.mistake(f"has {text!r} for TIMESTAMP, which is no time such as 2023-11-16 18:17:03.97") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _earliest_s(options: ImportOptions) -> float:
    """Of what may be put off into the time that is taken, which is cut out after that."""
    return max(0.0, options.start_s - (options.jitter_ms or 0.0) / 1000)


def _spread(
    requests: list[TraceRequest], step_ms: float | None, options: ImportOptions
) -> tuple[list[TraceRequest], list[str]]:
    """By the steps of the source's clock, unless the options say otherwise."""
    wanted = step_ms if options.jitter_ms is None else options.jitter_ms
    if wanted:
        note = jitter.note(wanted, options.seed, chosen=options.jitter_ms is not None)
        return jitter.spread(requests, wanted, options.seed), [note]
    if step_ms:
        return requests, [f"the source's clock has steps of {step_ms / 1000:g} s: requests come in volleys, as asked"]
    return requests, []


def _cut(requests: Iterable[TraceRequest], options: ImportOptions) -> list[TraceRequest]:
    """Those of the time that is taken, counted from its beginning."""
    start_ms, end_ms = 1000 * options.start_s, 1000 * options.end_s
    return [
        msgspec.structs.replace(request, timestamp=to_ms((request.timestamp - start_ms) / 1000))
        for request in requests
        if start_ms <= request.timestamp < end_ms
    ]
