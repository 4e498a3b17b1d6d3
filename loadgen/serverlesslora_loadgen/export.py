"""Results for other programs: single requests as CSV, and the keys that vLLM's benchmark writes."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Result

# Gaps would make the file many times as large; their maximum stays.
COLUMNS = tuple(field.encode_name for field in msgspec.structs.fields(Record) if field.name != "gaps_s")
_ATTRIBUTES = tuple(field.name for field in msgspec.structs.fields(Record) if field.name != "gaps_s")
_TEXTS = ("model", "class", "detail", "request_id", "cold")  # whatever they look like

VLLM_LATENCIES = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """All of a record but its gaps. Empty: never reached, or nothing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([_cell(getattr(record, name)) for name in _ATTRIBUTES] for record in records)


def read_csv(path: Path) -> list[Record]:
    """Raises ResultError naming the file and the line that is no record."""
    records: list[Record] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                records += map(_record, reader)
            except (ValueError, csv.Error) as error:
                raise ResultError(f"{path}:{reader.line_num} is not a request of a run: {error}") from error
            if missing := [name for name in ("id", "intended_s", "outcome") if name not in (reader.fieldnames or ())]:
                raise ResultError(f"{path} has no column {', '.join(missing)}; is it the requests.csv of a run?")
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    return records


def _cell(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else value


def _record(row: dict[str, str]) -> Record:
    found: dict[str, Any] = {name: value for name, value in row.items() if value and name not in _TEXTS}
    if costs := found.pop("cold_ms", None):
        found["cold_ms"] = msgspec.json.decode(costs)
    record: Record = msgspec.convert({"model": "", **found}, Record, strict=False)
    texts = {name: row[name] for name in _TEXTS if row.get(name)}
    if "class" in texts:
        texts["class_"] = texts.pop("class")
    return msgspec.structs.replace(record, **texts)


def vllm_keys(result: Result) -> dict[str, Any]:
    """The keys of `vllm bench serve --save-result`, milliseconds, of the whole run, for scripts that plot them.

    Not the same: latencies count from the intended time, not from when a request left; `shed` and `unsent` are among
    `failed`, and `num_prompts` is all of the trace; standard deviations are not kept.
    """
    whole, seconds = result.whole, result.whole.seconds

    def per_second(count: int) -> float:
        return count / seconds if seconds > 0 else 0.0

    counts, limits = whole.counts, result.setup.limits
    has_limits = limits.ttft_s is not None or limits.tpot_s is not None or limits.e2e_s is not None
    keys: dict[str, Any] = {
        "date": result.setup.started_at,
        "label": result.title,
        "valid": result.verdict.valid,
        "passed": result.verdict.passed,
        "num_prompts": counts.sent,
        "duration": seconds,
        "completed": counts.ok,
        "failed": counts.sent - counts.ok,
        "shed": counts.shed,
        "unsent": counts.unsent,
        "total_input_tokens": counts.input_tokens,
        "total_output_tokens": counts.output_tokens,
        "request_throughput": per_second(counts.ok),
        "request_goodput": whole.goodput_rps if has_limits else None,
        "output_throughput": per_second(counts.output_tokens),
        "total_token_throughput": per_second(counts.input_tokens + counts.output_tokens),
        "max_concurrent_requests": max(result.timeline.in_flight, default=0),
    }
    for ours, theirs in VLLM_LATENCIES.items():
        latency = whole.latency.get(ours)
        if latency is None or latency.n == 0:
            continue
        keys[f"mean_{theirs}_ms"] = 1000 * latency.mean.value
        for name, estimate in latency.percentiles.items():
            word = {"p50": "median"}.get(name, name)
            keys[f"{word}_{theirs}_ms"] = 1000 * estimate.value
    return keys
