"""`result.json`: what a run found, versioned. A report needs this file alone; single requests are in `requests.csv`.

Times are seconds, memory is bytes, money is in the currency of the prices. Shares lie between 0 and 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from serverlesslora_loadgen.errors import ResultError

SCHEMA_VERSION = 1

MAX_LAG_S, MAX_LAG_SHARE = 0.010, 0.05  # of the 99th percentile: the larger of a time and a share of median TTFT

Mode = Literal["open", "closed", "sweep"]  # closed and sweep must say so wherever their numbers are shown
Share = Annotated[float, Meta(ge=0, le=1)]


class Estimate(msgspec.Struct, frozen=True):
    """A value with its 95 % bootstrap interval. Without one, n is too small to say."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


class Distribution(msgspec.Struct, frozen=True):
    """Of seconds, over n values. Percentiles are nearest-rank: values that were really seen."""

    n: int
    mean: Estimate
    percentiles: dict[str, Estimate]  # p50 p90 p95 p99 p99.9 max


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    sent: int  # all of the trace: also what was shed, failed or could not be sent
    ok: int
    shed: int  # 429 and 503
    failed: int
    unsent: int
    failures: dict[str, int] = {}
    shed_without_retry_after: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    coalesced: int = 0  # answers with fewer events than tokens: their gaps are not gaps between tokens


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to meet to count as good, seconds; None: whatever it is."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that share one value of a dimension. `attainment` is good of sent."""

    key: str
    counts: Counts
    attainment: Estimate
    latency: dict[str, Distribution]  # ttft, tpot, e2e of those that were answered


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is said of one set of requests: of all, and of those after the warm-up."""

    seconds: float
    counts: Counts
    attainment: Estimate
    goodput_rps: float  # good requests per second
    goodput_tps: float  # output tokens of good requests per second
    latency: dict[str, Distribution]  # ttft ttft_from_send ttst tpot itl max_gap e2e e2e_from_send
    groups: dict[str, list[Group]]  # adapter, class, decile (of popularity, 1 the most asked), cold, slice (of time)
    fairness: float | None = None  # Jain's index of the adapters' attainment


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Per step of time; `offered` by intended time, `done`, `shed` and `failed` by when they ended."""

    step_s: float
    offered: list[int]
    sent: list[int]
    done: list[int]
    shed: list[int]
    failed: list[int]
    in_flight: list[int]  # at the end of the step
    cold: dict[str, list[int]]  # by kind, when the request was meant to go out
    workers: list[int | None] = []  # None: not looked at in this step
    held_bytes: list[int | None] = []


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """Median time to first token by adapter (rows) and time (columns); None: nobody asked, or nobody was answered."""

    adapters: list[str]
    step_s: float
    ttft_s: list[list[float | None]]


class Histogram(msgspec.Struct, frozen=True):
    """counts[i] lie in [edges[i], edges[i+1]); what lies outside is counted in the first or last."""

    edges: list[float]
    counts: list[int]


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the client itself can be believed."""

    processes: int
    lag: Distribution | None  # sent minus intended
    lag_histogram: Histogram
    cpu_share: float  # of one core, of all client processes together
    late_sockets: int = 0  # requests that waited for a connection to be opened, over 10 ms


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The client against the null server on this machine, as `calibrate` found it."""

    measured_at: str
    added_ttft_p50_s: float  # what the client sees beyond the null server's own stamp
    added_ttft_p99_s: float
    lag_p99_s: float
    rate_rps: float
    max_rps: float | None = None
    max_streams: int | None = None
    setup: dict[str, Any] = {}


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """One `--slo`: what was asked, what was found."""

    text: str
    limit: float
    found: float | None  # None: nothing to judge by, which is not met
    met: bool


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`valid`: the client kept its schedule. `passed`: valid, and every objective met."""

    valid: bool
    passed: bool
    reasons: list[str]  # why not valid or not passed, in sentences
    objectives: list[Objective]


class TraceFacts(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    sha256: str  # of what was replayed
    requests: int
    adapters: int
    seconds: float  # as replayed
    speedup: float = 1.0
    length_scale: float = 1.0
    seed: int = 0
    deadlines: int = 0  # requests with one of their own for the first token
    notes: list[str] = []  # such as: timestamps jittered within 3 s


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    tool: str
    python: str
    kernel: str
    cpu: str
    cores: int
    memory_bytes: int
    git: str | None = None
    packages: dict[str, str] = {}


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All that is needed to do it again."""

    trace: TraceFacts
    target: dict[str, Any]  # url, endpoint, and how it was asked
    command: list[str]
    environment: Environment
    limits: Limits
    started_at: str  # ISO 8601, UTC
    verified: bool = False  # at least one answer was held against a golden one
    verified_requests: int = 0  # how many were
    calibration: Calibration | None = None
    server: dict[str, Any] = {}  # whatever it says of itself, and what the person says of it (`--note key=value`)
    timers: dict[str, dict[str, float]] = {}  # name → raw and effective seconds: timers shrink with time


class CostPart(msgspec.Struct, frozen=True):
    """`backbone`, `adapters`, `workers`, `compute`, `requests`, `idle`: what was paid for."""

    name: str
    amount: float


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One way to count, or one baseline, on this trace."""

    name: str
    how: str  # the formula or the source, for people
    total: float
    parts: list[CostPart]
    per_1k_requests: float | None = None
    per_1m_output_tokens: float | None = None
    per_good_request: float | None = None
    idle_share: float | None = None  # of the memory paid for, while nothing was computed
    gb_seconds: float | None = None
    device_seconds: float | None = None
    effectiveness: float | None = None  # 1 / (mean E2E * cost), as serverless papers plot it


class Money(msgspec.Struct, frozen=True, kw_only=True):
    currency: str
    prices: dict[str, Any]  # with date, source, and whether they only illustrate
    measured: list[Cost]  # ledger: by the server's own books; lifetimes: from what was seen from outside
    baselines: list[Cost]
    difference: float | None = None  # (ledger - lifetimes) / lifetimes
    notes: list[str] = []


class KneePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One trial of a sweep."""

    rate_rps: float
    speedup: float
    attainment: Estimate
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    goodput_rps: float
    valid: bool


class SlowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One of the slowest, with its whole story: seconds after the start of the run."""

    id: int
    model: str
    request_id: str
    cold: str
    cold_ms: dict[str, float]
    stamps: dict[str, float | None]  # intended written first_byte first_token last_token done
    ttft_s: float | None
    e2e_s: float | None
    output_tokens: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    version: Annotated[int, Meta(ge=1)] = SCHEMA_VERSION
    title: str
    mode: Mode
    setup: Setup
    verdict: Verdict
    whole: Section
    steady: Section | None  # without the warm-up; None: nothing is left of it
    warmup_rule: str
    timeline: Timeline
    heat: Heat
    cdf: dict[str, dict[str, list[float]]]  # ttft, e2e, gap → curve (cold kind, or all) → values at 0, 1, … 100 %
    client: Client
    slowest: list[SlowRequest]
    money: Money | None = None
    knee: list[KneePoint] = []


def max_lag_s(median_ttft_s: float | None) -> float:
    """Up to which 99th percentile of its lag a client is believed; None: nothing was answered."""
    return max(MAX_LAG_S, MAX_LAG_SHARE * (median_ttft_s or 0.0))


def read_result(path: Path) -> Result:
    """Raises ResultError when there is none, or of another version."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    except msgspec.DecodeError as error:
        raise ResultError(f"{path} is no result of the load generator: {error}") from error
    if result.version != SCHEMA_VERSION:
        raise ResultError(f"{path} has version {result.version}; this program reads {SCHEMA_VERSION}")
    return result


def write_result(path: Path, result: Result) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def schema() -> dict[str, Any]:
    """JSON Schema of `result.json`."""
    return msgspec.json.schema(Result)
