"""The client against a server that computes nothing: what it adds of its own, and how much it can take, here.

Requests leave at random times, as those of many people do (exponential gaps). A trial counts as one that the client
could bear when every answer was right, and neither its lag nor what it added to first tokens was over `BEARABLE_S`.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from serverlesslora_loadgen.client.drive import Driven, drive
from serverlesslora_loadgen.client.prompts import plan
from serverlesslora_loadgen.environment import environment
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.fetching import get_json
from serverlesslora_loadgen.null_server import null_server
from serverlesslora_loadgen.plan import Target
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Calibration
from serverlesslora_loadgen.trace import TraceRequest

LEAST_S = 1.0  # of a trial: a rate is not held with less
RATE_RPS = 300  # at which what the client adds is measured
BEARABLE_S = 0.01  # as for the runs themselves: a client that is later than this measures itself
ADAPTERS = 8
PROMPT_TOKENS = 128
RAMP = 0.75  # of a stream's length: by then all have begun
PRECISION = 1.25  # of the searches: the largest that is borne and the smallest that is not lie this far apart
TRIES = 2  # of what was not borne: other programs of the machine come and go

# What the client promises on two cores, one of which the null server has.
LAG_BAR_S = 0.005
ADDED_BAR_S = 0.001
RPS_BAR = 1000
STREAMS_BAR = 2000

Kind = Literal["rate", "streams"]


class Cadence(msgspec.Struct, frozen=True, kw_only=True):
    """Of the null server, and how long its answers are."""

    ttft_ms: float
    tpot_ms: float
    tokens: int

    @property
    def seconds(self) -> float:
        """From the request to the last token."""
        return (self.ttft_ms + (self.tokens - 1) * self.tpot_ms) / 1e3


CADENCES: dict[Kind, Cadence] = {
    "rate": Cadence(ttft_ms=20, tpot_ms=10, tokens=16),
    "streams": Cadence(ttft_ms=20, tpot_ms=100, tokens=60),
}


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Shares are of one core; times are seconds, None without any answer."""

    kind: Kind
    asked: int  # requests per second, or streams at once
    requests: int
    events_per_s: float  # with tokens
    peak_streams: int
    lag_p50_s: float | None
    lag_p99_s: float | None
    added_p50_s: float | None  # to the time to the first token: the client's, from having sent, less the server's own
    added_p99_s: float | None
    client_cpu: float
    server_cpu: float
    faults: dict[str, int] = {}  # what became of those that were not answered right

    @property
    def is_borne(self) -> bool:
        if self.faults or self.lag_p99_s is None or self.added_p99_s is None:
            return False
        return max(self.lag_p99_s, self.added_p99_s) <= BEARABLE_S


async def calibrate(
    *,
    processes: int = 1,
    seconds: float = 5.0,
    search: bool = True,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Calibration:
    """`seconds` of each trial; without `search` only what the client adds at RATE_RPS is measured.

    Raises ResultError when not even that could be borne so far that something was answered, or when that is no time to
    measure in.
    """
    if not seconds >= LEAST_S:
        raise ResultError(f"trials of {seconds:g} s say nothing of requests per second: give {LEAST_S:g} s or more")
    where = environment()
    trials: list[Trial] = []

    async def attempt(kind: Kind, asked: int) -> Trial:
        trial = await measure(kind, asked, CADENCES[kind], processes=processes, seconds=seconds)
        trials.append(trial)
        on_trial(trial)
        return trial

    async def is_borne(kind: Kind, asked: int) -> bool:
        for _ in range(TRIES):
            if (await attempt(kind, asked)).is_borne:
                return True
        return False

    measured_at = datetime.now(UTC).isoformat(timespec="seconds")
    base = await attempt("rate", RATE_RPS)
    if base.lag_p99_s is None or base.added_p50_s is None or base.added_p99_s is None:
        raise ResultError(f"the null server answered none of {base.requests} requests: {base.faults}")
    max_rps = max_streams = None
    if search:
        max_rps = await largest(lambda asked: is_borne("rate", asked), RPS_BAR)
        max_streams = await largest(lambda asked: is_borne("streams", asked), STREAMS_BAR)
    return Calibration(
        measured_at=measured_at,
        added_ttft_p50_s=base.added_p50_s,
        added_ttft_p99_s=base.added_p99_s,
        lag_p99_s=base.lag_p99_s,
        rate_rps=RATE_RPS,
        max_rps=max_rps,
        max_streams=max_streams,
        setup={
            "processes": processes,
            "cores": where.cores,
            "environment": msgspec.to_builtins(where),
            "seconds": seconds,
            "bearable_s": BEARABLE_S,
            "cadences": msgspec.to_builtins(CADENCES),
            "trials": msgspec.to_builtins(trials),
        },
    )


class _Stats(msgspec.Struct):
    cpu_s: float


async def measure(kind: Kind, asked: int, cadence: Cadence, *, processes: int, seconds: float) -> Trial:
    """One trial against a null server of its own. A trial of streams takes as long as its cadence makes it."""
    requests = requests_of(kind, asked, cadence, seconds=seconds)
    with null_server(ttft_ms=cadence.ttft_ms, tpot_ms=cadence.tpot_ms) as url:
        target = Target(url=url)
        planned = plan(requests, target)
        before = await asyncio.to_thread(get_json, f"{url}/stats", _Stats)
        driven = await drive(target, planned, processes=processes)
        after = await asyncio.to_thread(get_json, f"{url}/stats", _Stats)
    return summarise(kind, asked, driven, server_cpu_s=after.cpu_s - before.cpu_s)


def requests_of(kind: Kind, asked: int, cadence: Cadence, *, seconds: float) -> list[TraceRequest]:
    """Streams all begin before the first of them ends, so that at one time all are open.

    Arrivals of a Poisson process, given their number, are uniform and independent in their window.
    """
    window_s = seconds if kind == "rate" else RAMP * cadence.seconds
    count = max(1, round(asked * seconds)) if kind == "rate" else asked
    times = np.sort(np.random.default_rng(asked).uniform(0, window_s, count))
    return [
        TraceRequest(
            timestamp=1e3 * at,
            input_length=PROMPT_TOKENS,
            output_length=cadence.tokens,
            model=f"null-{number % ADAPTERS}",
        )
        for number, at in enumerate(times.tolist())
    ]


def summarise(kind: Kind, asked: int, driven: Driven, *, server_cpu_s: float) -> Trial:
    records = driven.records
    lags = [record.lag_s for record in records if record.lag_s is not None]
    added = [
        record.ttft_from_send_s - record.server_ttft_s
        for record in records
        if record.ttft_from_send_s is not None and record.server_ttft_s is not None
    ]
    return Trial(
        kind=kind,
        asked=asked,
        requests=len(records),
        events_per_s=sum(record.chunks for record in records) / max(driven.seconds, 1e-9),
        peak_streams=peak(records),
        lag_p50_s=percentile(lags, 0.5),
        lag_p99_s=percentile(lags, 0.99),
        added_p50_s=percentile(added, 0.5),
        added_p99_s=percentile(added, 0.99),
        client_cpu=driven.cpu_s / max(driven.seconds, 1e-9),
        server_cpu=server_cpu_s / max(driven.seconds, 1e-9),
        faults=dict(Counter(record.failure or record.outcome for record in records if record.outcome != "ok")),
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank: the smallest value that this share of all does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def peak(records: Sequence[Record]) -> int:
    """The most that were open at once: sent, and not ended."""
    steps = [(record.written_s, 1) for record in records if record.written_s is not None]
    steps += [(record.done_s, -1) for record in records if record.written_s is not None and record.done_s is not None]
    now = most = 0
    for _, step in sorted(steps):  # of equal times the ends come first
        now += step
        most = max(most, now)
    return most


async def largest(is_borne: Callable[[int], Awaitable[bool]], start: int, *, limit: int = 1 << 17) -> int:
    """The largest number that is borne, within PRECISION; 0 when not even an eighth of `start` is.

    Goes up or down from `start` by doubling and halving, then halves the gap on a logarithmic scale.
    """
    low, high = 0, limit + 1
    asked = start
    while low * PRECISION < high and high - low > 1:
        if await is_borne(asked):
            low = asked
        else:
            high = asked
        if low == 0:
            asked = high // 2
            if asked < max(1, start // 8):
                return 0
        elif high > limit:
            if low == limit:
                break
            asked = min(2 * low, limit)
        else:
            asked = round(math.sqrt(low * high))
    return low


def missed(calibration: Calibration) -> list[str]:
    """Which of the promises do not hold here, in sentences; what was not measured is not missed."""
    found = []
    if calibration.lag_p99_s > LAG_BAR_S:
        found.append(
            f"one request in a hundred leaves {1e3 * calibration.lag_p99_s:.2f} ms late or more at"
            f" {calibration.rate_rps:g} requests/s; {1e3 * LAG_BAR_S:g} ms are promised"
        )
    if calibration.added_ttft_p99_s > ADDED_BAR_S:
        found.append(
            f"the client adds {1e3 * calibration.added_ttft_p99_s:.2f} ms to one first token in a hundred;"
            f" {1e3 * ADDED_BAR_S:g} ms are promised"
        )
    for name, reached, bar in (
        ("requests/s", calibration.max_rps, RPS_BAR),
        ("streams at once", calibration.max_streams, STREAMS_BAR),
    ):
        if reached is not None and reached < bar:
            found.append(f"the client bears {reached:g} {name}; {bar} are promised")
    return found


def read_calibration(path: Path) -> Calibration:
    """Raises ResultError when there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise ResultError(f"cannot read the calibration {path}: {error}") from error
    except msgspec.DecodeError as error:
        raise ResultError(f"{path} is no calibration: {error}; make one with `calibrate`") from error


def write_calibration(path: Path, calibration: Calibration) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")
