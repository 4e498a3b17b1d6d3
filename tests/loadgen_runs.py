"""Runs of one request or many, made by hand, to see what is said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from serverlesslora_loadgen.analysis.build import Run, make_result
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Environment, Limits, Result, Setup, TraceFacts
from serverlesslora_loadgen.trace import TraceRequest

LIMITS = Limits(ttft_s=0.5, tpot_s=0.05)


def answered(number: int, at: float | None = None, /, *, ttft: float = 0.1, tokens: int = 11, **more: Any) -> Record:
    """10 ms between tokens, sent 1 ms late."""
    at = float(number) if at is None else at
    first, gaps = at + ttft, more.pop("gaps_s", (0.01,) * (tokens - 1))
    last = first + math.fsum(gaps)
    fields: dict[str, Any] = {
        "id": number,
        "model": "m",
        "intended_s": at,
        "started_s": at,
        "written_s": at + 0.001,
        "first_byte_s": first,
        "first_token_s": first,
        "second_token_s": first + gaps[0] if gaps else None,
        "last_token_s": last,
        "done_s": last,
        "outcome": "ok",
        "status": 200,
        "cold": "warm",
        "input_tokens": 7,
        "output_tokens": tokens,
        "chunks": len(gaps) + 1,
        "max_gap_s": max(gaps, default=None),
        "gaps_s": gaps,
    }
    return Record(**{**fields, **more})


def shed(number: int, at: float | None = None, /, **more: Any) -> Record:
    at = float(number) if at is None else at
    fields: dict[str, Any] = {"model": "m", "intended_s": at, "written_s": at + 0.001, "done_s": at + 0.002}
    return Record(**{"id": number, "outcome": "shed", "status": 429, "retry_after_s": 1.0, **fields, **more})


def failed(number: int, at: float | None = None, /, *, failure: str | None = "stall", **more: Any) -> Record:
    """After it looked like a fast answer: what it measured must be in no latency."""
    base = answered(number, at, ttft=0.001, **more)
    return replace(base, outcome="failed", failure=failure)


def unsent(number: int, at: float | None = None, /) -> Record:
    return Record(id=number, model="m", intended_s=float(number) if at is None else at, outcome="unsent")


def many(n: int, *, seed: int = 0, rate: float = 10.0, models: int = 5, **more: Any) -> list[Record]:
    """Answers at Poisson times, log-normal about 100 ms."""
    rng = np.random.default_rng(seed)
    times, waits = np.cumsum(rng.exponential(1 / rate, n)), rng.lognormal(math.log(0.1), 0.3, n)
    names = rng.integers(0, models, n)
    return [
        answered(i, float(times[i]), **{"ttft": float(waits[i]), "model": f"m{names[i]}", **more}) for i in range(n)
    ]


def slower(records: Sequence[Record], by: Callable[[float], float]) -> list[Record]:
    """The same requests, each answered `by(its time to first token)` later."""
    found = []
    for record in records:
        if record.ttft_s is not None:
            more = by(record.ttft_s)
            late = {
                name: stamp + more
                for name in ("first_byte_s", "first_token_s", "second_token_s", "last_token_s", "done_s")
                if (stamp := getattr(record, name)) is not None
            }
            record = replace(record, **late)
        found.append(record)
    return found


def setup(sha256: str = "a" * 64, *, limits: Limits = LIMITS, verified: bool = True) -> Setup:
    return Setup(
        trace=TraceFacts(name="t", sha256=sha256, requests=1, adapters=1, seconds=1.0),
        target={"url": "http://127.0.0.1:1", "endpoint": "completions"},
        command=[],
        environment=Environment(tool="1", python="3", kernel="6", cpu="c", cores=2, memory_bytes=1),
        limits=limits,
        started_at="2026-01-01T00:00:00Z",
        verified=verified,
    )


def run(records: Sequence[Record], **more: Any) -> Run:
    """Of a trace that had just these requests."""
    fields: dict[str, Any] = {
        "title": "t",
        "mode": "open",
        "setup": setup(),
        "requests": [
            TraceRequest(timestamp=1000 * each.intended_s, input_length=7, output_length=11, model=each.model)
            for each in records
        ],
        "records": records,
        "seconds": max((each.done_s or each.intended_s for each in records), default=0.0),
        "processes": 1,
        "cpu_s": 1.0,
    }
    return Run(**{**fields, **more})


def result(records: Sequence[Record], **more: Any) -> Result:
    return make_result(run(records, **more))
