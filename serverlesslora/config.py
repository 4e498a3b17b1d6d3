"""The one schema of the settings: TOML files and command-line flags both end here, and defaults live only here.

Everything is frozen; facts computed later (sizes, addresses, context limits) have objects of their own.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from serverlesslora.adapters.sources import KINDS, SourceKind
from serverlesslora.devices import DeviceSetting
from serverlesslora.errors import ConfigError
from serverlesslora.logs import LogFormat, LogLevel
from serverlesslora.scheduler.settings import PolicySettings, PreloadSetting, Switch

Dtype = Literal["bfloat16", "float32", "float16"]
Isolation = Literal["tenant", "shared"]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
Positive = Annotated[int, Meta(ge=1)]
RequestRate = Annotated[float, Meta(gt=0, le=1e6)]  # requests per second
Burst = Annotated[int, Meta(ge=1, le=10**6)]  # requests at once after a pause
TokenRate = Annotated[int, Meta(ge=1, le=10**12)]  # tokens per minute, prompt and output

Period = Literal["hour", "day", "month", "total"]

STATE_DIR_VARIABLE = "SERVERLESSLORA_STATE_DIR"
CPU_KV_MEMORY_MB = 1024
POLICY = PolicySettings()  # its defaults are the server's
CPU_STEP_TOKENS, DEVICE_STEP_TOKENS = 256, 2048  # enough rows to be bound by arithmetic, few enough to answer soon


def default_state_dir() -> str:
    if given := os.environ.get(STATE_DIR_VARIABLE):  # so that commands beside a server in a container find its files
        return given
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "serverlesslora")


class BackboneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A base model: a Hugging Face directory or hub id, and the name clients call it by."""

    model: str
    name: Name | None = None  # default: the last part of `model`
    dtype: Dtype | None = None  # default: the server's
    allow_pickle: bool = False  # checkpoints without safetensors are refused unless this is set

    @property
    def public_name(self) -> str:
        return self.name or Path(self.model.rstrip("/")).name


class FunctionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function: the name clients call, the adapter behind it, who owns it."""

    name: Name
    adapter: str
    backbone: str | None = None  # default: the first backbone
    tenant: str | None = None  # functions of one tenant share a worker
    max_concurrency: Annotated[int, Meta(ge=0)] | None = None
    slo_ttft_s: Annotated[float, Meta(gt=0)] | None = None  # default: the server's
    pinned: bool = False  # its worker and adapter are always there
    rps: RequestRate | None = None
    burst: Burst | None = None
    tokens_per_minute: TokenRate | None = None

    def __post_init__(self) -> None:
        _check_burst(self.burst, self.rps)


class TenantConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tenant may spend, in the currency of the price file, and how fast, with all its keys together.

    A tenant without an entry has no limit.
    """

    name: Name
    budget: Annotated[float, Meta(ge=0)] | None = None
    period: Period = "month"
    rps: RequestRate | None = None
    burst: Burst | None = None
    max_concurrency: Annotated[int, Meta(ge=1, le=10**6)] | None = None  # requests open at once
    tokens_per_minute: TokenRate | None = None

    def __post_init__(self) -> None:
        _check_burst(self.burst, self.rps)


def _check_burst(burst: int | None, rps: float | None) -> None:
    if burst is not None and rps is None:
        raise ValueError(f"burst is {burst}, but there is no rps that it could be a burst of")


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings. The description of a field is its `--help` text; its flag is its name with dashes."""

    backbones: tuple[BackboneConfig, ...] = ()
    functions: tuple[FunctionConfig, ...] = ()
    tenants: tuple[TenantConfig, ...] = ()

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port of the OpenAI API; 0 picks a free one")] = 8000
    admin_port: Annotated[
        int, Meta(ge=-1, le=65535, description="port of the admin API, always on 127.0.0.1; 0 picks one, -1 is off")
    ] = 8001
    device: Annotated[
        DeviceSetting,
        Meta(
            description="where backbones live and workers compute; 'auto': cuda where a GPU and cuda-bindings are, "
            "else cpu; 'emulated': the CUDA path on host memory, slowly, for tests"
        ),
    ] = "auto"
    dtype: Annotated[Dtype, Meta(description="dtype of backbones that do not name their own")] = "bfloat16"
    isolation: Annotated[
        Isolation,
        Meta(description="'tenant': one worker per tenant (or per function without one); 'shared': one for all"),
    ] = "tenant"
    keep_alive_min_s: Annotated[
        float, Meta(gt=0, description="a worker without requests is kept at least this long")
    ] = POLICY.keep_alive_min_s
    keep_alive_max_s: Annotated[
        float,
        Meta(gt=0, description="and at most this long; in between, its functions' own arrivals say when it is let go"),
    ] = POLICY.keep_alive_max_s
    idle_timeout_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="stop every worker that had no request for exactly this long, whatever its arrivals"),
    ] = None
    stall_timeout_s: Annotated[
        float, Meta(gt=0, description="a worker that has requests and says nothing for this long is killed")
    ] = 300.0
    cold_timeout_s: Annotated[float, Meta(gt=0, description="how long a request waits for a starting worker")] = 60.0
    warm_pool: Annotated[
        int, Meta(ge=0, description="workers per backbone kept forked and warm for the domains that start next")
    ] = 1
    sharing: Annotated[
        Switch, Meta(description="'off', for comparison: every worker has a private copy of its backbone (cpu only)")
    ] = POLICY.sharing
    preload: Annotated[
        PreloadSetting,
        Meta(
            description="'on': workers and adapters are loaded ahead of demand; 'lru': what was used last stays; 'off' "
            "for comparison: nothing is there before a request needs it, neither libraries nor backbone (cpu only)"
        ),
    ] = POLICY.preload
    offload: Annotated[
        Switch, Meta(description="'off', for comparison: nothing is moved out of a full memory, starts wait for room")
    ] = POLICY.offload
    batching: Annotated[
        Switch, Meta(description="'off', for comparison: a worker runs one request at a time, first come first served")
    ] = POLICY.batching
    slo_ttft_s: Annotated[
        float,
        Meta(
            gt=0,
            description="time to the first token of functions that name no objective of their own; a request that "
            "cannot make it is refused early with 503 and Retry-After",
        ),
    ] = POLICY.slo_ttft_s
    memory_mb: Annotated[
        Positive | None,
        Meta(
            description="what backbones, workers, adapters and KV may take together, MiB; not given: what the machine "
            "or its container has, less a tenth"
        ),
    ] = None
    watermark: Annotated[
        float, Meta(gt=0, le=1, description="share of the memory above which artifacts are moved out")
    ] = POLICY.watermark
    min_gain_per_gb: Annotated[
        float,
        Meta(ge=0, description="nothing is held ahead that saves less than this: seconds of waiting per second and GB"),
    ] = POLICY.min_gain_per_gb
    prices: Annotated[
        str | None, Meta(description="price file (TOML); not given: the built-in one, which is only an illustration")
    ] = None
    profile_out: Annotated[
        str | None, Meta(description="write what was measured (times, sizes) here, for `serverlesslora simulate`")
    ] = None
    threads: Annotated[
        int, Meta(ge=0, description="threads per worker; 0 is every core on cpu (workers take turns), 1 elsewhere")
    ] = 0
    kv_memory_mb: Annotated[
        Positive | None,
        Meta(
            description=f"upper bound of one worker's KV cache, MiB; not given: {CPU_KV_MEMORY_MB} on cpu, on a device "
            "sized from what is free"
        ),
    ] = None
    max_running: Annotated[Positive, Meta(description="sequences one worker runs at once")] = 32
    max_step_tokens: Annotated[
        Positive | None,
        Meta(
            description="prompt tokens one step may process; not given: "
            f"{CPU_STEP_TOKENS} on cpu, {DEVICE_STEP_TOKENS} on a device"
        ),
    ] = None
    max_queue: Annotated[
        int, Meta(ge=0, description="requests one domain may have open; more are refused with 429 and Retry-After")
    ] = 512
    max_model_len: Annotated[Positive | None, Meta(description="context limit, if lower than the model's")] = None
    prefix_cache: Annotated[bool, Meta(description="reuse the KV of shared prompt prefixes, per adapter")] = True
    adapter_roots: Annotated[
        tuple[str, ...],
        Meta(
            description="directories adapters may be deployed from while running; none given: any on a loopback "
            "address, no run-time deployment on another"
        ),
    ] = ()
    adapter_sources: Annotated[
        tuple[SourceKind, ...],
        Meta(
            description="where adapters may come from: local, hf, s3, gs, https; none given: all of them on a loopback "
            "address, local on another"
        ),
    ] = ()
    adapter_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="hosts https adapters may come from (HOST, *.DOMAIN), or SCHEME://HOST[:PORT] of one in a "
            "private network; none given: every public host"
        ),
    ] = ()
    adapter_store_mb: Annotated[
        Positive | None,
        Meta(
            description="what stored adapters may take on disk, MiB: the least recently used leave, and are fetched "
            "again when needed; not given: no limit"
        ),
    ] = None
    adapter_fetch_timeout_s: Annotated[float, Meta(gt=0, description="how long fetching one adapter may take")] = 600.0
    max_adapter_mb: Annotated[Positive, Meta(description="largest adapter accepted, MiB")] = 4096
    max_body_mb: Annotated[Positive, Meta(description="largest HTTP body accepted, MiB")] = 16
    state_dir: Annotated[str, Meta(description="where adapters, the usage ledger and API keys are kept")] = (
        msgspec.field(default_factory=default_state_dir)
    )
    drain_timeout_s: Annotated[float, Meta(ge=0, description="how long running requests may finish after SIGTERM")] = (
        30.0
    )
    drain_delay_s: Annotated[
        float,
        Meta(
            ge=0,
            description="after SIGTERM, the port stays open at least this long, refusing new requests with 503, so "
            "that load balancers see /ready fail before connections do",
        ),
    ] = 0.0
    max_connections: Annotated[
        Positive | None,
        Meta(description="connections at once to the API; not given: what the limit of open files allows"),
    ] = None
    log_level: Annotated[
        LogLevel, Meta(description="what is logged; 'info' has one line per finished request, without its text")
    ] = "warning"
    log_format: Annotated[LogFormat, Meta(description="'json': one object per line, for collectors of logs")] = "text"
    otlp_endpoint: Annotated[
        str | None,
        Meta(
            description="send a trace per request, without its text, to this OpenTelemetry collector (OTLP over HTTP), "
            "such as http://127.0.0.1:4318; needs serverlesslora[otel]"
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.keep_alive_min_s > self.keep_alive_max_s:
            raise ValueError(
                f"keep_alive_min_s is {self.keep_alive_min_s:g}, more than keep_alive_max_s, {self.keep_alive_max_s:g}"
            )
        names = [backbone.public_name for backbone in self.backbones] + [f.name for f in self.functions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the names {twice} are used more than once; every backbone and function needs its own")
        known = {backbone.public_name for backbone in self.backbones}
        for name in known:  # a domain is called after its backbone: "llama/tenant:acme"
            if continued := [other for other in known if other.startswith(name + "/")]:
                raise ValueError(f"the backbone names {name!r} and {continued[0]!r} could be confused; rename one")
        for function in self.functions:
            if function.backbone is not None and function.backbone not in known:
                raise ValueError(
                    f"function {function.name!r} names the backbone {function.backbone!r}; known are {sorted(known)}"
                )

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def policy(self) -> PolicySettings:
        return PolicySettings(**{name: getattr(self, name) for name in PolicySettings.__struct_fields__})

    @property
    def allowed_sources(self) -> tuple[SourceKind, ...]:
        return self.adapter_sources or (KINDS if self.is_loopback else ("local",))

    def may_deploy_from(self, kind: SourceKind) -> bool:
        """While running, over the public port."""
        if kind == "local" and not (self.is_loopback or self.adapter_roots):
            return False
        return kind in self.allowed_sources

    @property
    def runtime_deploys_allowed(self) -> bool:
        return any(self.may_deploy_from(kind) for kind in KINDS)


def read_toml(path: str) -> dict[str, Any]:
    """The file's table. Raises ConfigError when it cannot be read or parsed."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def build_config(*layers: Mapping[str, Any]) -> ServerConfig:
    """Later layers win field by field. Raises ConfigError naming the field that is wrong."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    try:
        return msgspec.convert(merged, ServerConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad configuration: {error}") from error
