"""Results as reports get them: an hour of 24 adapters, made up from a seed, and its odd relatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from serverlesslora_loadgen.record import WARM, Record
from serverlesslora_loadgen.result import (
    Calibration,
    Client,
    Cost,
    CostPart,
    Counts,
    Distribution,
    Environment,
    Estimate,
    Group,
    Heat,
    Histogram,
    KneePoint,
    Limits,
    Mode,
    Money,
    Objective,
    Result,
    Section,
    Setup,
    SlowRequest,
    Timeline,
    TraceFacts,
    Verdict,
)

LIMITS = Limits(ttft_s=0.5, tpot_s=0.05)
ADAPTERS = 24
PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
RUNGS = {"adapter": (0.132, 0.4), "worker": (1.9, 0.25), "backbone": (7.5, 0.2)}  # median seconds, sigma
GB = 1 << 30

# What a person may call an adapter, or a server may answer, to see who trusts it.
HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "</script><script>window.pwned=1</script>",
    "<b>bold</b> &lt;i&gt; &amp; <a href='javascript:window.pwned=1'>x</a>",
    "2024-01-01",
    "1e3",
    "#2777b8",
    "%{x} {{ 7 * 7 }} ${pwned} $x^2$",
    "a|b`c``d\\|e [x](http://example.com) @everyone\n# heading",
    "‮desrever‬ \x1b[31m\x00 \u2028 zero\u200bwidth",
    "long-" + 300 * "x",
    " ",
)


# --- single requests


def records(seconds: float = 3600.0, seed: int = 7) -> list[Record]:
    """About one request a second; a flood of 90 s after half an hour, which is shed in part."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, ADAPTERS + 1) ** 1.1
    found: list[tuple[float, int]] = []
    for adapter, share in enumerate(weights / weights.sum()):
        shape = (1.4, 0.4, 0.06)[adapter % 3]
        count = max(3, round(share * 3500))
        gaps = rng.gamma(shape, 1.0, 4 * count)
        times = np.cumsum(gaps) * (seconds / (count * shape))
        found += [(round(float(at), 3), adapter) for at in times if at < seconds]
    found += [(0.52 * seconds + float(at), int(rng.integers(0, 6))) for at in rng.uniform(0, 90, 240)]
    made, last = [], {adapter: -math.inf for adapter in range(ADAPTERS)}
    for number, (at, adapter) in enumerate(sorted(found)):
        made.append(_record(number, at, adapter, at - last[adapter], flood=0.52 < at / seconds < 0.552, rng=rng))
        last[adapter] = at
    return made


def _record(number: int, at: float, adapter: int, silence: float, *, flood: bool, rng: np.random.Generator) -> Record:
    rungs = (number == 0, silence > 200 and rng.random() < 0.3, silence > 100)
    cold_s = {
        rung: float(rng.lognormal(math.log(RUNGS[rung][0]), RUNGS[rung][1]))
        for rung, met in zip(("backbone", "worker", "adapter"), rungs, strict=True)
        if met
    }
    kind = f"{next(iter(cold_s))}-{'load' if 'worker' not in cold_s else 'start'}" if cold_s else WARM
    sent = at + float(rng.exponential(0.0004))
    common: dict[str, Any] = {
        "id": number,
        "model": f"adapter-{adapter:02d}",
        "class_": ("Predictable", "Normal", "Bursty")[adapter % 3],
        "intended_s": at,
        "started_s": at,
        "written_s": sent,
        "request_id": f"cmpl-{rng.integers(1 << 40):010x}",
        "input_tokens": int(rng.lognormal(4.4, 0.6)),
    }
    if flood and rng.random() < 0.18:
        return Record(**common, outcome="shed", status=429, retry_after_s=1.0, done_s=sent + 0.004)
    if flood and rng.random() < 0.02:
        return Record(**common, outcome="failed", failure="stall", status=200, done_s=sent + 60.0, cold=kind)
    wait = float(rng.lognormal(math.log(0.14), 0.32)) * (2.6 if flood else 1.0) + sum(cold_s.values())
    tokens = max(2, int(rng.lognormal(3.2, 0.8)))
    pace = float(rng.lognormal(math.log(0.018), 0.18)) * (1.5 if flood else 1.0)
    first, gaps = sent + wait, rng.lognormal(math.log(pace), 0.25, tokens - 1)
    return Record(
        **common,
        outcome="ok",
        status=200,
        first_byte_s=first - 0.001,
        first_token_s=first,
        second_token_s=first + float(gaps[0]),
        last_token_s=first + float(gaps.sum()),
        done_s=first + float(gaps.sum()) + 0.0006,
        cold=kind,
        cold_ms={rung: 1000 * cost for rung, cost in cold_s.items()},
        output_tokens=tokens,
        chunks=tokens,
        max_gap_s=float(gaps.max()),
        gaps_s=tuple(float(gap) for gap in gaps),
    )


# --- what is said of them; plainer than the real analysis, so that reports can be tested without it


def distribution(values: Sequence[float]) -> Distribution:
    ordered, n = sorted(values), len(values)
    if n == 0:
        return Distribution(n=0, mean=Estimate(0.0, 0), percentiles={})
    spread = 1.96 * float(np.std(ordered)) / math.sqrt(n)
    mean = float(np.mean(ordered))
    return Distribution(
        n=n,
        mean=Estimate(mean, n, mean - spread, mean + spread) if n > 1 else Estimate(mean, n),
        percentiles={name: _percentile(ordered, share) for name, share in PERCENTILES},
    )


def _percentile(ordered: Sequence[float], share: float) -> Estimate:
    n = len(ordered)

    def at(rank: float) -> float:
        return ordered[min(n - 1, max(0, math.ceil(rank) - 1))]

    if share == 1.0 or n * (1 - share) < 5:
        return Estimate(at(share * n), n)
    half = 1.96 * math.sqrt(n * share * (1 - share))
    return Estimate(at(share * n), n, at(share * n - half), at(share * n + half))


def good(record: Record) -> bool:
    ttft, tpot = record.ttft_s, record.tpot_s
    return record.outcome == "ok" and ttft is not None and ttft <= 0.5 and (tpot is None or tpot <= 0.05)


def attainment(chosen: Sequence[Record]) -> Estimate:
    n = len(chosen)
    if n == 0:
        return Estimate(0.0, 0)
    share = sum(map(good, chosen)) / n
    centre, scale = (share + 1.92 / n) / (1 + 3.84 / n), 1.96 / (1 + 3.84 / n)  # Wilson's interval
    half = scale * math.sqrt(share * (1 - share) / n + 0.96 / n**2)
    return Estimate(share, n, max(0.0, centre - half), min(1.0, centre + half))


def counts(chosen: Sequence[Record]) -> Counts:
    failures = [record.failure for record in chosen if record.failure]
    return Counts(
        sent=len(chosen),
        ok=sum(record.outcome == "ok" for record in chosen),
        shed=sum(record.outcome == "shed" for record in chosen),
        failed=sum(record.outcome == "failed" for record in chosen),
        unsent=sum(record.outcome == "unsent" for record in chosen),
        failures={str(failure): failures.count(failure) for failure in failures},
        input_tokens=sum(record.input_tokens for record in chosen),
        output_tokens=sum(record.output_tokens for record in chosen),
    )


LATENCIES: dict[str, Callable[[Record], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "ttft_from_send": lambda record: record.ttft_from_send_s,
    "ttst": lambda record: record.ttst_s,
    "tpot": lambda record: record.tpot_s,
    "max_gap": lambda record: record.max_gap_s,
    "e2e": lambda record: record.e2e_s,
}


def latency(chosen: Sequence[Record], names: Iterable[str]) -> dict[str, Distribution]:
    found = {name: [LATENCIES[name](record) for record in chosen] for name in names}
    return {name: distribution([value for value in values if value is not None]) for name, values in found.items()}


def groups(chosen: Sequence[Record], key: Callable[[Record], str], order: Iterable[str] = ()) -> list[Group]:
    split: dict[str, list[Record]] = {name: [] for name in order}
    for record in chosen:
        split.setdefault(key(record), []).append(record)
    return [
        Group(
            key=name,
            counts=counts(members),
            attainment=attainment(members),
            latency=latency(members, ("ttft", "tpot", "e2e")),
        )
        for name, members in split.items()
        if members
    ]


def section(chosen: Sequence[Record], seconds: float) -> Section:
    asked: dict[str, int] = {}
    for record in chosen:
        asked[record.model] = asked.get(record.model, 0) + 1
    rank = {name: number for number, name in enumerate(sorted(asked, key=lambda name: -asked[name]))}
    fine = [record for record in chosen if good(record)]
    by_adapter = groups(chosen, lambda record: record.model, rank)
    met = [group.attainment.value for group in by_adapter]
    return Section(
        seconds=seconds,
        counts=counts(chosen),
        attainment=attainment(chosen),
        goodput_rps=len(fine) / seconds,
        goodput_tps=sum(record.output_tokens for record in fine) / seconds,
        latency={
            **latency(chosen, LATENCIES),
            "itl": distribution([gap for record in chosen for gap in record.gaps_s]),
            "e2e_from_send": latency(chosen, ["e2e"])["e2e"],
        },
        groups={
            "adapter": by_adapter,
            "class": groups(chosen, lambda record: record.class_ or "", ("Predictable", "Normal", "Bursty")),
            "decile": groups(
                chosen, lambda record: str(1 + 10 * rank[record.model] // len(rank)), map(str, range(1, 11))
            ),
            "cold": groups(chosen, lambda record: record.cold if record.outcome == "ok" else "unknown", (WARM,)),
            "slice": groups(
                chosen,
                lambda record: f"{5 * int(record.intended_s // 300)}–{5 * int(record.intended_s // 300) + 5} min",
            ),
        },
        fairness=sum(met) ** 2 / (len(met) * sum(value * value for value in met)) if any(met) else None,
    )


def timeline(chosen: Sequence[Record], seconds: float, step_s: float = 1.0) -> Timeline:
    steps = math.ceil(seconds / step_s)

    def per_step(times: Iterable[float | None]) -> list[int]:
        found = [0] * steps
        for at in times:
            if at is not None:
                found[min(steps - 1, int(at / step_s))] += 1
        return found

    def ended(outcome: str) -> list[int]:
        return per_step(record.done_s for record in chosen if record.outcome == outcome)

    sent = per_step(record.written_s for record in chosen)
    gone = np.cumsum(per_step(record.done_s for record in chosen))
    kinds = sorted({record.cold for record in chosen})
    in_flight = [int(value) for value in np.cumsum(sent) - gone]
    workers = [
        1 + int(3.5 * (1 + math.sin(step * step_s / 400)) + min(4, value)) for step, value in enumerate(in_flight)
    ]
    seen: list[int | None] = [value if step % 2 == 0 else None for step, value in enumerate(workers)]
    return Timeline(
        step_s=step_s,
        offered=per_step(record.intended_s for record in chosen),
        sent=sent,
        done=ended("ok"),
        shed=ended("shed"),
        failed=ended("failed"),
        in_flight=in_flight,
        cold={kind: per_step(record.intended_s for record in chosen if record.cold == kind) for kind in kinds},
        workers=seen,
        held_bytes=[None if count is None else int((1.1 + 0.09 * count) * GB) for count in seen],
    )


def heat(chosen: Sequence[Record], seconds: float) -> Heat:
    names = [group.key for group in section(chosen, seconds).groups["adapter"]]
    cells: list[list[list[float]]] = [[[] for _ in range(60)] for _ in names]
    for record in chosen:
        if record.ttft_s is not None:
            cells[names.index(record.model)][int(60 * record.intended_s / seconds)].append(record.ttft_s)
    return Heat(
        adapters=names,
        step_s=seconds / 60,
        ttft_s=[[float(np.median(cell)) if cell else None for cell in row] for row in cells],
    )


def curve(values: Iterable[float | None]) -> list[float]:
    found = [value for value in values if value is not None]
    return [float(value) for value in np.quantile(found, np.linspace(0, 1, 101))] if found else []


def slowest(chosen: Sequence[Record]) -> list[SlowRequest]:
    ordered = sorted(chosen, key=lambda record: record.ttft_s or 0.0, reverse=True)
    return [
        SlowRequest(
            id=record.id,
            model=record.model,
            request_id=record.request_id,
            cold=record.cold,
            cold_ms=record.cold_ms,
            stamps={
                "intended": record.intended_s,
                "written": record.written_s,
                "first_byte": record.first_byte_s,
                "first_token": record.first_token_s,
                "last_token": record.last_token_s,
                "done": record.done_s,
            },
            ttft_s=record.ttft_s,
            e2e_s=record.e2e_s,
            output_tokens=record.output_tokens,
        )
        for record in ordered[:20]
    ]


def money() -> Money:
    def cost(name: str, how: str, idle: float, /, **parts: float) -> Cost:
        total = sum(parts.values())
        return Cost(
            name=name,
            how=how,
            total=total,
            parts=[CostPart(part, amount) for part, amount in parts.items()],
            per_1k_requests=total / 3.6,
            per_1m_output_tokens=total / 0.11,
            per_good_request=total / 3500,
            idle_share=idle,
            gb_seconds=total * 31_000,
            device_seconds=640.0,
            effectiveness=1 / (0.71 * total),
        )

    books = {"backbone": 0.402, "adapters": 0.071, "workers": 0.283, "compute": 0.494, "requests": 0.0036, "idle": 0.31}
    return Money(
        currency="USD",
        prices={
            "date": "2026-07-01",
            "source": "list prices of three clouds, averaged",
            "illustrative": True,
            "gb_second": 2.5e-05,
            "device_second": 0.00077,
            "request": 1e-06,
        },
        measured=[
            cost("ledger", "the server's own books, before and after the run", 0.63, **books),
            cost(
                "lifetimes",
                "held GB x seconds x price + device seconds x price + requests x price, seen from outside",
                0.61,
                **{part: 1.03 * amount for part, amount in books.items()},
            ),
        ],
        baselines=[
            cost(
                "one model per adapter, keep-alive 10 min",
                "an instance per adapter from its first request until 10 min without one",
                0.91,
                backbone=6.21,
                adapters=0.05,
                compute=0.49,
                requests=0.0036,
                idle=3.4,
            ),
            cost(
                "one model per adapter, always on",
                "an instance per adapter for the whole run",
                0.985,
                backbone=2.3,
                adapters=0.07,
                compute=0.49,
                requests=0.0036,
                idle=15.8,
            ),
        ],
        difference=-0.029,
        notes=["The backbone counts once, however many workers map it."],
    )


def knee() -> list[KneePoint]:
    points = []
    for rate in (0.5, 1, 2, 4, 6, 8, 10, 12, 16):
        load = rate / 11
        met = 0.997 if load < 0.7 else max(0.05, 0.997 - 1.4 * (load - 0.7) ** 1.5)
        points.append(
            KneePoint(
                rate_rps=rate,
                speedup=float(rate),
                attainment=Estimate(met, int(600 * rate), met - 0.02, min(1.0, met + 0.008)),
                ttft_p50_s=0.13 + 0.3 * max(0.0, load - 0.7) ** 2,
                ttft_p99_s=0.42 / max(0.06, 1.02 - load),
                goodput_rps=rate * met,
                valid=rate < 16,
            )
        )
    return points


# --- results


def sample(chosen: Sequence[Record] | None = None, *, seconds: float = 3600.0, mode: Mode = "open") -> Result:
    made = records(seconds) if chosen is None else list(chosen)
    answered = [record for record in made if record.outcome == "ok"]
    lags = [record.lag_s for record in made if record.lag_s is not None]
    kinds = sorted({record.cold for record in answered})
    edges = [0.0, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    late = [record for record in made if record.intended_s >= 212.0]
    whole = section(made, seconds)
    return Result(
        title="Mixed classes, 24 adapters, shared backbone",
        mode=mode,
        setup=Setup(
            trace=TraceFacts(
                name="azf2019_mixed_24ad_60min.jsonl.gz",
                sha256="9f2c31d07b5e4a86c1d9e0f3a2b47c58d6e1f09a3b5c7d8e2f4a6b8c0d1e3f57",
                requests=len(made),
                adapters=len({record.model for record in made}),
                seconds=seconds,
                length_scale=1 / 8,
                seed=7,
                notes=["arrivals are placed uniformly inside their minute", "lengths are drawn from conversations"],
            ),
            target={
                "url": "http://127.0.0.1:8000",
                "endpoint": "completions",
                "prompt": "ids",
                "temperature": 0.0,
                "ignore_eos": True,
                "cold_header": "x-serverlesslora-cold",
            },
            command=[
                *("serverlesslora-loadgen", "run", "--url", "http://127.0.0.1:8000"),
                *("--trace", "azf2019_mixed_24ad_60min.jsonl.gz", "--scale-lengths", "1/8", "--seed", "7"),
                *("--limit", "ttft=500ms,tpot=50ms", "--slo", "ttft=1s:p99", "--slo", "errors=0"),
                *("--out", "mixed classes"),
            ],
            environment=Environment(
                tool="0.9.0",
                python="3.11.9",
                kernel="6.1.0-18-amd64",
                cpu="AMD EPYC 7763 64-Core Processor",
                cores=2,
                memory_bytes=8 * GB,
                git="4cab321",
                packages={"httptools": "0.6.4", "msgspec": "0.20.0", "numpy": "2.4.6", "uvloop": "0.22.1"},
            ),
            limits=LIMITS,
            started_at="2026-07-14T09:30:00Z",
            verified=True,
            calibration=Calibration(
                measured_at="2026-07-14T09:12:41Z",
                added_ttft_p50_s=0.00021,
                added_ttft_p99_s=0.00078,
                lag_p99_s=0.0016,
                rate_rps=300.0,
                max_rps=1480.0,
                max_streams=2600,
            ),
            server={
                "version": "0.9.0",
                "model": "TinyLlama-1.1B-Chat-v1.0",
                "adapters": {"count": 24, "rank": 16},
                "flags": ["--keep-alive", "60", "--adapters-dir", "adapters"],
            },
            timers={
                "adapter keep-alive": {"raw_s": 60.0, "effective_s": 60.0},
                "worker keep-alive": {"raw_s": 600.0, "effective_s": 600.0},
            },
        ),
        verdict=Verdict(
            valid=True,
            passed=False,
            reasons=["ttft=1s:p99 was asked, 1.83 s was found", f"errors=0 was asked, {whole.counts.failed} was found"],
            objectives=[
                Objective(text="ttft=500ms:p50", limit=0.5, found=0.149, met=True),
                Objective(text="ttft=1s:p99", limit=1.0, found=1.83, met=False),
                Objective(text="attainment=95%", limit=0.95, found=whole.attainment.value, met=True),
                Objective(text="shed=5%", limit=0.05, found=0.0109, met=True),
                Objective(text="errors=0", limit=0.0, found=float(whole.counts.failed), met=False),
            ],
        ),
        whole=whole,
        steady=section(late, seconds - 212.0) if late else None,
        warmup_rule="until each adapter has had one request (212 s, 188 requests)",
        timeline=timeline(made, seconds),
        heat=heat(made, seconds),
        cdf={
            "ttft": {kind: curve(r.ttft_s for r in answered if r.cold == kind) for kind in kinds},
            "e2e": {
                "all": curve(r.e2e_s for r in answered),
                **{kind: curve(r.e2e_s for r in answered if r.cold == kind) for kind in kinds},
            },
            "gap": {"all": curve(gap for r in answered for gap in r.gaps_s)},
        },
        client=Client(
            processes=1,
            lag=distribution(lags) if lags else None,
            lag_histogram=Histogram(edges, [int(n) for n in np.histogram(lags, edges)[0]]),
            cpu_share=0.083,
            late_sockets=3,
        ),
        slowest=slowest(answered),
        money=money(),
    )


@functools.cache
def full() -> Result:
    return sample()


def invalid() -> Result:
    lags = [float(lag) for lag in np.random.default_rng(1).gamma(1.2, 0.011, 3600)]
    edges = full().client.lag_histogram.edges
    late = Histogram(edges, [int(n) for n in np.histogram(lags, edges)[0]])
    return replace(
        full(),
        verdict=Verdict(
            valid=False,
            passed=False,
            reasons=["the client was late: p99 lag 61.3 ms, more than 10 ms"],
            objectives=full().verdict.objectives,
        ),
        client=replace(full().client, lag=distribution(lags), lag_histogram=late, cpu_share=0.98),
    )


def passed() -> Result:
    return replace(
        full(), verdict=Verdict(valid=True, passed=True, reasons=[], objectives=full().verdict.objectives[:1])
    )


def closed() -> Result:
    return replace(full(), mode="closed", title="How much at most, 32 at a time")


def swept() -> Result:
    return replace(full(), mode="sweep", knee=knee())


def without_money() -> Result:
    return replace(full(), money=None, setup=replace(full().setup, calibration=None, limits=Limits(), verified=False))


def one_request() -> Result:
    return replace(sample(records()[:1], seconds=10.0), steady=None, money=None)


def nothing() -> Result:
    empty = section([], 1.0)
    return replace(
        full(),
        verdict=Verdict(valid=False, passed=False, reasons=["no request was sent"], objectives=[]),
        setup=replace(
            full().setup,
            trace=TraceFacts(name="", sha256="", requests=0, adapters=0, seconds=0.0),
            calibration=None,
            server={},
            timers={},
            limits=Limits(),
        ),
        whole=empty,
        steady=None,
        timeline=Timeline(step_s=1.0, offered=[], sent=[], done=[], shed=[], failed=[], in_flight=[], cold={}),
        heat=Heat(adapters=[], step_s=1.0, ttft_s=[]),
        cdf={},
        client=Client(processes=1, lag=None, lag_histogram=Histogram([], []), cpu_share=0.0),
        slowest=[],
        money=None,
    )


def hostile() -> Result:
    """Every text that comes from a trace, a server or a person is an attack."""
    names = {
        f"adapter-{number:02d}": HOSTILE[number % len(HOSTILE)] + number // len(HOSTILE) * "'" for number in range(24)
    }
    kinds = {"adapter-load": HOSTILE[0], "worker-start": HOSTILE[3], "backbone-load": HOSTILE[7]}
    classes = {"Predictable": HOSTILE[2], "Normal": HOSTILE[1], "Bursty": HOSTILE[4]}
    attack = HOSTILE[0] + HOSTILE[1] + HOSTILE[2]
    result = sample(
        [
            replace(
                record,
                model=names[record.model],
                class_=classes[record.class_ or ""],
                cold=kinds.get(record.cold, record.cold),
                cold_ms={HOSTILE[1] + rung: cost for rung, cost in record.cold_ms.items()},
                request_id=HOSTILE[record.id % len(HOSTILE)],
            )
            for record in records()
        ]
    )
    costs = [replace(cost, name=attack, how=attack, parts=[CostPart(attack, 1.0)]) for cost in money().measured]
    return replace(
        result,
        title=attack,
        warmup_rule=attack,
        verdict=replace(
            result.verdict, reasons=[attack], objectives=[Objective(text=attack, limit=1, found=2, met=False)]
        ),
        setup=replace(
            result.setup,
            trace=replace(result.setup.trace, name=attack, notes=[attack]),
            target={attack: attack},
            server={attack: {attack: [attack]}},
            command=["serverlesslora-loadgen", attack],
            timers={attack: {attack: 1.0}},
            environment=replace(result.setup.environment, packages={attack: attack}, git=attack, cpu=attack),
        ),
        money=replace(
            money(), currency=attack, measured=costs, baselines=costs, notes=[attack], prices={attack: attack}
        ),
    )


VARIANTS: dict[str, Callable[[], Result]] = {
    "full": full,
    "passed": passed,
    "invalid": invalid,
    "closed": closed,
    "swept": swept,
    "without_money": without_money,
    "one_request": one_request,
    "nothing": nothing,
    "hostile": hostile,
}
