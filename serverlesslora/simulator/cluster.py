"""The cluster file: which devices and hosts there are, what they cost, and whose functions run on which backbone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from serverlesslora.config import read_toml
from serverlesslora.errors import ConfigError
from serverlesslora.scheduler.profile import Profile, read_profile
from serverlesslora.scheduler.settings import PolicySettings

Deadline = Literal["objective", "patience"]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]

SHIPPED = Path(__file__).parent


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: Count
    memory_gb: Positive  # 1e9 bytes
    price_per_hour: Positive  # of a whole device, without its host's memory


class HostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices_each: Count = 4
    memory_gb: Positive = 256.0
    price_per_gb_hour: Annotated[float, Meta(ge=0)] = 0.0


class FunctionsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is true of all functions of a trace, which names nothing but them."""

    backbone: str | None = None  # default: the profile's only one
    tenants: Annotated[int, Meta(ge=0)] = 0  # functions are dealt to so many at random; 0: each is its own
    tenant_seed: int = 0
    tenant_of: dict[str, str] = {}  # by name, where it is known; these are not dealt
    adapter_bytes: Count = 84_000_000
    slo_ttft_s: Positive = 3.0
    # What a token after the first may take: a device is full when one more busy worker would make rounds longer.
    slo_tpot_s: Positive = 0.08


class PolicyNumbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of PolicySettings, for every system; None leaves what the system says. Switches are what systems differ in."""

    keep_alive_min_s: Positive | None = None
    keep_alive_max_s: Positive | None = None
    watermark: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_gain_per_gb: Annotated[float, Meta(ge=0)] | None = None

    def applied_to(self, settings: PolicySettings) -> PolicySettings:
        named = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(settings, **named)


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    profile: str  # a file, beside this one or shipped with the simulator
    currency: str = "USD"
    prices_are: Literal["illustrative", "stated"] = "illustrative"
    prices_from: str = ""
    devices: DeviceConfig = DeviceConfig(count=1, memory_gb=48.0, price_per_hour=1.0)
    hosts: HostConfig = HostConfig()
    functions: FunctionsConfig = FunctionsConfig()
    policies: PolicyNumbers = PolicyNumbers()
    slots: Count = 64  # sequences a worker runs at once
    max_queue: Count = 512  # requests a domain may have waiting on one device
    patience_s: Positive = 60.0  # a request that got no worker for so long is refused, under every system
    # When a first token is too late to be worth computing; None leaves what the system says: objective (who cannot have
    # it within functions.slo_ttft_s is refused, unless its worker is starting) or patience (within patience_s).
    deadline: Deadline | None = None
    warm_pool: Annotated[int, Meta(ge=0)] = 1  # spare workers of each device, where a system forks workers
    refill_s: Annotated[float, Meta(ge=0)] = 1.0  # from a spare's use until the next one is begun
    plan_every_s: Positive = 60.0  # between plans of the preloader
    started: bool = False  # a shared backbone and its spares are on the first device when the trace begins


class Cluster(msgspec.Struct, frozen=True):
    """The file and the profile it names."""

    config: ClusterConfig
    profile: Profile

    @property
    def backbone(self) -> str:
        return self.config.functions.backbone or next(iter(self.profile.backbones))

    def tenants_of(self, names: Sequence[str]) -> list[str]:
        """The tenant of each function: dealt at random with the file's own seed, so that traces can be compared."""
        functions = self.config.functions
        dealer = random.Random(functions.tenant_seed)
        dealt = [f"tenant-{dealer.randrange(functions.tenants)}" if functions.tenants else name for name in names]
        return [functions.tenant_of.get(name, tenant) for name, tenant in zip(names, dealt, strict=True)]


def read_cluster(path: str | Path) -> Cluster:
    """Raises ConfigError naming the file, the field and what is wrong with it."""
    path = Path(path)
    try:
        config = msgspec.convert(read_toml(str(path)), ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is not a cluster file: {error}") from error
    beside, shipped = path.parent / config.profile, SHIPPED / "profiles" / config.profile
    return make_cluster(config, read_profile(beside if beside.exists() or not shipped.exists() else shipped))


def make_cluster(config: ClusterConfig, profile: Profile) -> Cluster:
    """Raises ConfigError when the profile does not fit the cluster."""
    if not profile.backbones:
        raise ConfigError("the profile has no backbone: nothing can be simulated")
    name = config.functions.backbone
    if name is None and len(profile.backbones) > 1:
        raise ConfigError(f"name one of the profile's backbones as functions.backbone: {', '.join(profile.backbones)}")
    if name is not None and name not in profile.backbones:
        raise ConfigError(f"functions.backbone is {name!r} and the profile has {', '.join(profile.backbones)}")
    cluster = Cluster(config, profile)
    backbone = profile.backbones[cluster.backbone]
    wanted = backbone.size_bytes + profile.worker_bytes + config.functions.adapter_bytes
    if wanted > config.devices.memory_gb * 1e9:
        raise ConfigError(
            f"a device of {config.devices.memory_gb} GB cannot hold the backbone {cluster.backbone!r}, one worker and "
            f"one adapter ({wanted / 1e9:.1f} GB): raise devices.memory_gb"
        )
    return cluster
