"""What the tables of a report hold, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from serverlesslora_loadgen.record import UNKNOWN, WARM
from serverlesslora_loadgen.report import words
from serverlesslora_loadgen.report.words import Cell, cell, counted, percent, percentile, price
from serverlesslora_loadgen.result import Calibration, Estimate, Result, Section, SlowRequest
from serverlesslora_loadgen.units import show_seconds

PERCENTILES = ("p50", "p90", "p95", "p99", "p99.9", "max")
OFFSETS = ("written", "first_byte", "first_token", "last_token", "done")


class Tile(NamedTuple):
    """`after`: the same without the warm-up."""

    title: str
    value: str
    note: str
    after: str = ""


class LatencyRow(NamedTuple):
    name: str
    n: int
    cells: list[Cell]  # the mean, then PERCENTILES


class LatencyPart(NamedTuple):
    title: str
    rows: list[LatencyRow]


class Piece(NamedTuple):
    """Of a request's time: `x` and `width` in thousandths of the longest story."""

    name: str  # lag, cold, wait, decode
    x: int
    width: int


class Story(NamedTuple):
    slow: SlowRequest
    at: float  # intended, seconds after the start
    offsets: list[float | None]  # OFFSETS, seconds after the intended time
    pieces: list[Piece]


def tiles(result: Result) -> list[Tile]:
    """The numbers that people look for first."""
    whole, steady = result.whole, result.steady
    shown = [_share_tile(result)]
    for name, share in (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("tpot", "p99"), ("e2e", "p99")):
        after = None if steady is None else percentile(steady, name, share)
        shown.append(_time_tile(f"{words.LATENCIES[name]} {share}", percentile(whole, name, share), after))
    good = f"{whole.goodput_rps:.3g} / s"
    tokens = f"{words.number(whole.goodput_tps)} tokens / s"
    after_good = "" if steady is None else f"after warm-up {steady.goodput_rps:.3g} / s"
    shown.append(Tile("Goodput, requests", good, tokens, after_good))
    cold = [group for group in whole.groups.get("cold", ()) if group.key not in (WARM, UNKNOWN)]
    met = sum(group.counts.sent for group in cold)
    if whole.counts.sent and whole.groups.get("cold"):
        note = f"{met:,} of n = {whole.counts.sent:,} requests"
        shown.append(Tile("Met something cold", percent(met / whole.counts.sent), note))
    if whole.fairness is not None:
        adapters = counted(len(whole.groups.get("adapter", ())), "adapter")
        shown.append(Tile("Jain's fairness", f"{whole.fairness:.3f}", f"of the shares of {adapters}"))
    cost = words.told_cost(result.money)
    if cost is not None and result.money is not None:
        idle = "" if cost.idle_share is None else f"idle {percent(cost.idle_share)}"
        note = f"{cost.name}, n = {whole.counts.sent:,}"
        shown.append(Tile("Cost of 1k requests", price(cost.per_1k_requests, result.money.currency), note, idle))
    return shown


def _share_tile(result: Result) -> Tile:
    whole, steady = result.whole, result.steady
    share = cell(whole.attainment, percent)
    after = "" if steady is None else f"after warm-up {cell(steady.attainment, percent).value}"
    return Tile(
        words.good(result).capitalize(), share.value, f"{share.between}, n = {share.n:,}" if share.n else "n = 0", after
    )


def _time_tile(title: str, estimate: Estimate | None, after: Estimate | None) -> Tile:
    time = cell(estimate)
    note = f"{time.between}, n = {time.n:,}" if time.n else "n = 0"
    return Tile(title, time.value, note, "" if after is None else f"after warm-up {show_seconds(after.value)}")


def latencies(result: Result) -> list[LatencyPart]:
    """All percentiles, of everything and without the warm-up."""
    parts = [LatencyPart(f"all, {counted(result.whole.counts.sent, 'request')}", _rows(result.whole))]
    if result.steady is not None:
        rest = counted(result.steady.counts.sent, "request")
        parts.append(LatencyPart(f"after the warm-up, {rest}. Warm-up: {result.warmup_rule}", _rows(result.steady)))
    return [part for part in parts if part.rows]


def _rows(section: Section) -> list[LatencyRow]:
    rows = []
    for name, title in words.LATENCIES.items():
        found = section.latency.get(name)
        if found is not None and found.n:
            cells = [cell(found.mean), *(cell(found.percentiles.get(share)) for share in PERCENTILES)]
            rows.append(LatencyRow(title, found.n, cells))
    return rows


def longest(slowest: Sequence[SlowRequest]) -> float:
    """Seconds from when one of them was meant to go out until nothing more came."""
    ends = (slow.stamps.get(name) for slow in slowest for name in ("last_token", "done"))
    begins = (slow.stamps.get("intended") or 0.0 for slow in slowest for _ in range(2))
    return max((end - begin for end, begin in zip(ends, begins, strict=True) if end is not None), default=0.0) or 1.0


def stories(slowest: Sequence[SlowRequest]) -> list[Story]:
    """Each with its time in pieces, on one scale."""
    scale_s = longest(slowest)
    told = []
    for slow in slowest:
        at = slow.stamps.get("intended") or 0.0
        stamps = [slow.stamps.get(name) for name in OFFSETS]
        offsets = [None if stamp is None else stamp - at for stamp in stamps]
        told.append(Story(slow, at, offsets, _pieces(slow, offsets, scale_s)))
    return told


def _pieces(slow: SlowRequest, offsets: Sequence[float | None], scale_s: float) -> list[Piece]:
    """What was cold is drawn first: the server says how long it took, not when."""
    written, _, first, last, done = offsets
    sent = written or 0.0
    began = first if first is not None else done if done is not None else sent
    warmed = min(began, sent + sum(slow.cold_ms.values()) / 1000)
    ends = (("lag", sent), ("cold", warmed), ("wait", began), ("decode", last if last is not None else began))
    pieces, x = [], 0
    for name, end in ends:
        until = round(1000 * min(1.0, max(0.0, end / scale_s)))
        if until > x:
            pieces.append(Piece(name, x, until - x))
            x = until
    return pieces


def client(result: Result) -> dict[str, Any]:
    """Names and texts of what tells whether the client can be believed."""
    of, lag = result.client, result.client.lag
    told: dict[str, Any] = {"processes": of.processes, "CPU, of one core": percent(of.cpu_share)}
    for share in ("p50", "p99", "max"):
        time = cell(None if lag is None else lag.percentiles.get(share))
        told[f"lag {share}"] = f"{time.value} ({time.between}, n = {time.n:,})" if time.n else "nothing was sent"
    told["may be late by"] = f"{show_seconds(words.allowed_lag_s(result))}, p99"
    told["late sockets"] = f"{of.late_sockets:,} requests waited over 10 ms for a connection"
    return told


def calibration(of: Calibration | None) -> dict[str, Any]:
    if of is None:
        return {}
    return {
        "measured": of.measured_at,
        "adds to TTFT": f"p50 {show_seconds(of.added_ttft_p50_s)}, p99 {show_seconds(of.added_ttft_p99_s)}",
        "lag p99": f"{show_seconds(of.lag_p99_s)} at {of.rate_rps:g} requests / s",
        "at most": f"{words.number(of.max_rps)} requests / s" if of.max_rps else "not searched",
        "streams at most": f"{of.max_streams:,} at a time" if of.max_streams else "not searched",
        **of.setup,
    }


def setup(result: Result) -> dict[str, dict[str, Any]]:
    """All that is needed to do it again, by what it is about."""
    trace, machine = result.setup.trace, result.setup.environment
    return {
        "Trace": {
            "name": trace.name or words.MISSING,
            "sha256": trace.sha256 or words.MISSING,
            "holds": f"{counted(trace.requests, 'request')}, {counted(trace.adapters, 'adapter')}, "
            f"{show_seconds(trace.seconds)}",
            "speed": f"×{trace.speedup:g}",
            "lengths": f"×{trace.length_scale:.4g}",
            "seed": trace.seed,
            **({"notes": "; ".join(trace.notes)} if trace.notes else {}),
        },
        "How it was asked": {
            **result.setup.target,
            "limits": words.limits(result.setup.limits) or "none",
            "warm-up": result.warmup_rule,
        },
        "Server": result.setup.server,
        "Machine": {
            "processor": machine.cpu,
            "cores": machine.cores,
            "memory": words.size(machine.memory_bytes),
            "kernel": machine.kernel,
            "python": machine.python,
            "load generator": f"{machine.tool}{f' ({machine.git})' if machine.git else ''}",
            **machine.packages,
        },
    }
