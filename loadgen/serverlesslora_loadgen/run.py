"""One run from a trace to its result: what is asked, what came back, what it cost."""

from __future__ import annotations

import asyncio
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from serverlesslora_loadgen.analysis.build import Run, complete, make_result
from serverlesslora_loadgen.analysis.objectives import check_objectives
from serverlesslora_loadgen.client.drive import Driven, Progress, drive
from serverlesslora_loadgen.client.golden import read_goldens
from serverlesslora_loadgen.client.prompts import plan
from serverlesslora_loadgen.environment import environment
from serverlesslora_loadgen.errors import TargetError, WorkloadError
from serverlesslora_loadgen.fetching import HasNone, get_json
from serverlesslora_loadgen.ledger import Ledger, read_ledger
from serverlesslora_loadgen.money.account import KEEP_ALIVE_S, account
from serverlesslora_loadgen.money.baselines import Instance
from serverlesslora_loadgen.money.prices import Prices, read_prices
from serverlesslora_loadgen.observe import Observer
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.privacy import without_secrets, without_userinfo
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Calibration, Limits, Money, Result, Setup, TraceFacts
from serverlesslora_loadgen.trace import TraceRequest, digest

MODELS_WAIT_S = 10.0  # a server that has just started may list its base models before their adapters
ASK_EVERY_S = 0.5


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a run but its requests. What is None is not looked at, not judged, or not asked."""

    target: Target
    trace_name: str
    speedup: float = 1.0  # that the requests were compressed by already, for what is said of timers and money
    length_scale: float = 1.0
    notes: tuple[str, ...] = ()  # how the trace came to be what it is
    seed: int = 0
    processes: int = 1
    concurrency: int | None = None  # closed loop
    limits: Limits = Limits()
    objectives: tuple[str, ...] = ()
    warmup_s: float | None = None  # None: until each adapter has been asked once
    goldens: Path | None = None
    check_models: bool = True  # that the server lists all of the trace's
    admin: str | None = None
    admin_headers: dict[str, str] = {}
    meter_group: int | None = None
    interval_s: float = 1.0  # between looks at the server
    prices: Path | None = None
    instance_bytes: int | None = None  # one full model with its process, for the baselines
    keep_alive_s: float = KEEP_ALIVE_S  # of a baseline, in the trace's own time
    calibration: Calibration | None = None
    timers: dict[str, float] = {}  # of the server, in the trace's own time
    timer_speedup: float | None = None  # that the server's timers were divided by; None: `speedup`
    said: dict[str, str] = {}  # of the server, by the person who started it
    title: str = ""
    command: tuple[str, ...] = ()


class Finished(NamedTuple):
    result: Result
    records: list[Record]
    interrupted: bool = False  # a person ended it before its time


class Served(msgspec.Struct, frozen=True):
    id: str
    parent: str | None = None  # the base model of an adapter, where the server tells


class Models(msgspec.Struct, frozen=True):
    data: tuple[Served, ...]


def served_models(url: str, headers: Mapping[str, str]) -> tuple[Served, ...]:
    """Raises TargetError when the server cannot say."""
    return get_json(f"{url}/v1/models", Models, headers=headers).data


async def check_models(requests: Sequence[TraceRequest], url: str, headers: Mapping[str, str]) -> None:
    """Raises TargetError naming what the trace asks for and the server does not list, nor after a while; WorkloadError
    when the trace names nothing."""
    wanted = {request.model for request in requests}
    if "" in wanted:
        unnamed = sum(not request.model for request in requests)
        raise WorkloadError(
            f"{unnamed} of {len(requests)} requests of the trace name no model; say which one is asked (--model NAME)"
        )
    until = time.monotonic() + MODELS_WAIT_S
    served = [model.id for model in served_models(url, headers)]
    while not wanted.issubset(served) and time.monotonic() < until:
        await asyncio.sleep(ASK_EVERY_S)
        served = [model.id for model in served_models(url, headers)]
    if missing := sorted(wanted - set(served)):
        raise TargetError(
            f"the server lists {_some(served)}; the trace asks for {_some(missing)} besides. "
            "Deploy them, or map the trace's names to the server's (--map FILE, or --map served)"
        )


def _some(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "nothing"


async def run(
    requests: Sequence[TraceRequest], settings: Settings, on_progress: Callable[[Progress], None] = lambda _: None
) -> Finished:
    """Raises LoadgenError when it cannot begin; whatever happens after that is in the result."""
    target = settings.target
    deadlines = any(request.deadline_ms is not None for request in requests)
    check_objectives(settings.objectives, settings.limits, deadlines=deadlines)
    if settings.check_models:
        await check_models(requests, target.url, target.headers)
    goldens = read_goldens(settings.goldens) if settings.goldens is not None else None
    prices = read_prices(settings.prices)
    planned = plan(requests, target, seed=settings.seed, goldens=goldens)
    if goldens is not None and all(each.golden is None for each in planned):
        raise WorkloadError(
            f"none of the golden answers of {settings.goldens} is for a prompt of this run;"
            " were they made with the same trace, seed and options?"
        )
    observer = _observer(settings)
    facts = {} if observer is None else observer.facts()
    if observer is not None:
        observer.start()
    try:
        driven = await drive(
            target,
            planned,
            processes=settings.processes,
            concurrency=settings.concurrency,
            on_progress=on_progress,
        )
    finally:
        if observer is not None:
            observer.stop()
    records = complete(requests, driven.records)
    result = make_result(
        Run(
            title=without_userinfo(settings.title or f"{settings.trace_name} on {target.url}"),
            mode="open" if settings.concurrency is None else "closed",
            setup=make_setup(requests, settings, facts, driven.began_unix, verified=held(planned, records)),
            requests=requests,
            records=records,
            seconds=driven.seconds,
            processes=driven.processes,
            cpu_s=driven.cpu_s,
            late_sockets=driven.late_sockets,
            samples=[] if observer is None else observer.samples(driven.began_at),
            limits=settings.limits,
            objectives=settings.objectives,
            warmup_s=settings.warmup_s,
        )
    )
    whole = result.whole
    good = round(whole.attainment.value * whole.counts.sent)
    device = facts.get("device")
    money = await asyncio.to_thread(_money, settings, driven, records, observer, prices, good, device)
    return Finished(msgspec.structs.replace(result, money=money), records, driven.interrupted)


def held(planned: Sequence[Planned], records: Sequence[Record]) -> int:
    """How many answers were held against golden ones: those that there is one for, and that came."""
    golden = {each.id for each in planned if each.golden is not None}
    return sum(
        record.id in golden and (record.outcome == "ok" or record.failure == "wrong-answer") for record in records
    )


def _money(
    settings: Settings,
    driven: Driven,
    records: Sequence[Record],
    observer: Observer | None,
    prices: Prices,
    good: int,
    device: str | None,
) -> Money | None:
    samples = [] if observer is None else observer.samples(driven.began_at)
    ledger, notes = _ledger(settings, driven)
    if not samples and ledger is None and settings.instance_bytes is None:
        return None
    money = account(
        prices=prices,
        records=records,
        seconds=driven.seconds,
        samples=samples,
        ledger=ledger,
        device=device,
        good=good,
        instance=None if settings.instance_bytes is None else Instance(settings.instance_bytes, 0, "as told"),
        keep_alive_s=settings.keep_alive_s,
        speedup=settings.speedup,
        source="" if observer is None else observer.how,
    )
    seen = [] if observer is None else observer.notes
    return msgspec.structs.replace(money, notes=[*money.notes, *notes, *seen])


def make_setup(
    requests: Sequence[TraceRequest],
    settings: Settings,
    server: Mapping[str, object],
    began_unix: float,
    *,
    verified: int,
) -> Setup:
    """`verified`: answers that were held against golden ones."""
    target = msgspec.to_builtins(settings.target)
    # Headers may carry keys; results are shown around.
    target["headers"] = sorted(settings.target.headers)
    target["url"] = without_userinfo(settings.target.url)
    timers_by = settings.speedup if settings.timer_speedup is None else settings.timer_speedup
    began = datetime.datetime.fromtimestamp(began_unix, tz=datetime.UTC)
    return Setup(
        trace=TraceFacts(
            name=settings.trace_name,
            sha256=digest(requests),
            requests=len(requests),
            adapters=len({request.model for request in requests}),
            seconds=requests[-1].timestamp / 1000 if requests else 0.0,
            speedup=settings.speedup,
            length_scale=settings.length_scale,
            seed=settings.seed,
            deadlines=sum(request.deadline_ms is not None for request in requests),
            notes=list(settings.notes),
        ),
        target=target,
        command=list(settings.command) or without_secrets(sys.argv),
        environment=environment(),
        limits=settings.limits,
        started_at=began.isoformat(timespec="seconds"),
        verified=verified > 0,
        verified_requests=verified,
        calibration=settings.calibration,
        server={**server, **settings.said},
        timers={name: {"raw": seconds, "effective": seconds / timers_by} for name, seconds in settings.timers.items()},
    )


def _observer(settings: Settings) -> Observer | None:
    if settings.admin is None and settings.meter_group is None:
        return None
    return Observer(
        url=settings.target.url,
        admin=settings.admin,
        group=settings.meter_group,
        interval_s=settings.interval_s,
        headers=settings.admin_headers,
    )


def _ledger(settings: Settings, driven: Driven) -> tuple[Ledger | None, list[str]]:
    """The server's own books of the run; a server that cannot show them spoils nothing else."""
    if settings.admin is None:
        return None, []
    try:
        since = driven.began_unix
        ledger = read_ledger(settings.admin, since=since, until=since + driven.seconds, headers=settings.admin_headers)
        return ledger, []
    except HasNone:
        return None, []
    except TargetError as error:
        return None, [f"The server's ledger could not be read: {error}"]
