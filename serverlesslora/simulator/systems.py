"""The systems that are compared: switches of one engine, nothing else. A system is a row of the table SYSTEMS.

The baselines are idealised, always in their own favour, and keep only what sets each apart: who shares what, who is
kept alive, and what a start costs. All of them get this server's continuous batching, dispatcher and chunked prefill
inside their processes, and the checkpoint of the one base model in host memory after its first use. They know no
objectives and refuse by patience alone; this server and its ablations refuse by objective, as the live one does.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from serverlesslora.errors import ConfigError
from serverlesslora.scheduler.settings import PolicySettings
from serverlesslora.simulator.cluster import Deadline

Unit = Literal["tenant", "function", "all"]
Life = Literal["elastic", "always"]
Start = Literal["fork", "process", "container"]


class System(msgspec.Struct, frozen=True):
    name: str
    summary: str
    settings: PolicySettings = PolicySettings()
    unit: Unit = "tenant"  # whose requests one worker may serve
    life: Life = "elastic"  # started on demand and let go when idle; always: from the beginning to the end
    keep_alive_s: float | None = None  # elastic: after the last request; None: what the settings' policy says
    # What a start is. fork: from a launcher that has its libraries. process: a new process imports them, then takes the
    # shared backbone or copies its model from host memory. container: for the most wanted functions both are waiting
    # in an idle container of one host.
    start: Start = "fork"
    share_of_device: float | None = None  # always: the memory a process holds, used or not; None: what it needs
    num_devices: int | None = None  # always: how many of the devices it is installed on; None: all
    deadline: Deadline = "objective"  # what a request that will be late is refused by; baselines know no objectives

    @property
    def sharing(self) -> bool:
        """One backbone per device, whoever uses it; else every worker has a copy of its own."""
        return self.settings.sharing == "on"


_LRU = PolicySettings(sharing="off", preload="off")


def _dlora_like(num_devices: int) -> System:
    """Its users choose how many devices it has; a comparison should show several choices."""
    return System(
        f"dlora-like/{num_devices}",
        f"always-on replicas that serve every tenant in one process, on {num_devices} devices (all, if there are "
        "fewer); requests go to the least loaded and take their adapter along; merging is free and gains nothing, as "
        "LoRA's own cost is not in the profile (Wu et al., dLoRA, OSDI'24)",
        _LRU,
        unit="all",
        life="always",
        start="process",
        share_of_device=1.0,
        num_devices=num_devices,
        deadline="patience",
    )


SYSTEMS: tuple[System, ...] = (
    System("ours", "one worker per tenant on a shared backbone; all policies on"),
    System(
        "sharing=off", "as ours, with a private copy of the backbone in every worker", PolicySettings(sharing="off")
    ),
    System(
        "preload=off",
        "as ours, nothing is there before a request needs it: no launcher, no spares, each worker a fresh process",
        PolicySettings(preload="off"),
        start="process",
    ),
    System("offload=off", "as ours, nothing idle is moved out to make room", PolicySettings(offload="off")),
    System("batching=off", "as ours, one request at a time per worker", PolicySettings(batching="off")),
    System(
        "ours-shared",
        "as ours, all tenants in one domain (--isolation shared): no isolation, as dlora-like",
        unit="all",
    ),
    System(
        "dedicated",
        "one process with its own model per function, always on; as many as fit, most called first, the others refused",
        _LRU,
        unit="function",
        life="always",
        start="process",
        deadline="patience",
    ),
    System(
        "serverlessllm-like",
        "one model per function, started on demand from a checkpoint in host memory, kept alive for ten minutes "
        "(fast checkpoint loading: Fu et al., ServerlessLLM, OSDI'24)",
        _LRU,
        unit="function",
        keep_alive_s=600.0,
        start="process",
        deadline="patience",
    ),
    System(
        "instainfer-like",
        "one model per function; the most wanted have libraries and model waiting in an idle container's memory "
        "(opportunistic pre-loading: Sui et al., InstaInfer, SoCC'24)",
        _LRU,
        unit="function",
        keep_alive_s=600.0,
        start="container",
        deadline="patience",
    ),
    System(
        "vllm-like",
        "one always-on multi-LoRA process per tenant with its own backbone, two to a device, each holding half of it "
        "(Kwon et al., vLLM, SOSP'23; multi-LoRA batches: Chen et al., Punica, MLSys'24)",
        _LRU,
        unit="tenant",
        life="always",
        start="process",
        share_of_device=0.5,
        deadline="patience",
    ),
    *(_dlora_like(count) for count in (4, 8, 16)),
)


def choose_systems(names: str | None) -> tuple[System, ...]:
    """By comma-separated names; None is all. Raises ConfigError naming the unknown one."""
    known = {system.name: system for system in SYSTEMS}
    if names is None:
        return SYSTEMS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"there is no system {name!r}; there are: {', '.join(known)}")
    return tuple(known[name] for name in wanted)
