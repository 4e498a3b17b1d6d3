"""One device as a live server has it, to check the simulator against the server: the same trace, the same profile.

What differs from a cluster: the backbone and its spares are there when the trace begins, if the server preloads; there
is one device; adapters come from disk where the profile knows no other way; the settings are the server's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from serverlesslora.scheduler.profile import Profile
from serverlesslora.scheduler.settings import PolicySettings
from serverlesslora.simulator.cluster import ClusterConfig, DeviceConfig, FunctionsConfig, HostConfig, make_cluster
from serverlesslora.simulator.report import Report, make_report
from serverlesslora.simulator.simulation import Simulation
from serverlesslora.simulator.systems import System
from serverlesslora.simulator.trace import Trace


class Server(NamedTuple):
    """What a server was started with, as far as it shows in latencies."""

    settings: PolicySettings = PolicySettings()
    idle_timeout_s: float | None = None  # a fixed time instead of the policy's
    slots: int = 64  # --max-running
    max_queue: int = 512
    warm_pool: int = 1
    memory_bytes: int = 16_000_000_000  # for the backbone, workers, adapters and KV together
    adapter_bytes: int = 1_000_000
    tenant_of: Mapping[str, str] = {}  # functions without one are their own
    patience_s: float = 60.0  # how long a start is waited for; beyond it a request that waits is refused
    plan_every_s: float = 5.0
    shares_one_domain: bool = False  # --isolation shared


def simulate_server(trace: Trace, profile: Profile, server: Server, *, backbone: str | None = None) -> Report:
    """Raises ConfigError when the profile does not fit."""
    starts_alone = server.settings.preload == "off"  # no launcher: every worker is a fresh process
    config = ClusterConfig(
        profile="",
        devices=DeviceConfig(count=1, memory_gb=server.memory_bytes / 1e9, price_per_hour=1.0),
        hosts=HostConfig(devices_each=1, memory_gb=server.memory_bytes / 1e9),
        functions=FunctionsConfig(
            backbone=backbone,
            tenant_of=dict(server.tenant_of),
            adapter_bytes=server.adapter_bytes,
            slo_ttft_s=server.settings.slo_ttft_s,
        ),
        slots=server.slots,
        max_queue=server.max_queue,
        patience_s=server.patience_s,
        warm_pool=server.warm_pool,
        plan_every_s=server.plan_every_s,
        started=not starts_alone,
    )
    cluster = make_cluster(config, profile)
    system = System(
        "live",
        "one device of a running server",
        server.settings,
        unit="all" if server.shares_one_domain else "tenant",
        keep_alive_s=server.idle_timeout_s,
        start="process" if starts_alone else "fork",
    )
    return make_report(trace, cluster, system, Simulation(trace, cluster, system).run())
