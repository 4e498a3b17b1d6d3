"""What a backbone's processes are on each kind of device: which module runs, with which arguments and environment."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serverlesslora.config import BackboneConfig, Dtype
from serverlesslora.devices import DeviceKind
from serverlesslora.scheduler.settings import Switch

# OpenMP threads keep spinning for a moment after a parallel region. Long enough to bridge the gap to the next region
# of a step, short enough to be asleep when another worker's turn begins.
_LAUNCHER_ENV = {"GOMP_SPINCOUNT": "20000", "MALLOC_ARENA_MAX": "2"}

# With a thread per core, each stays on its own: else the kernel may put two on one core beside a foreign load, and
# every barrier of a step waits for a time slice.
_PINNED_ENV = {"OMP_PROC_BIND": "true"}


class WorkerSetting(NamedTuple):
    """What every worker of a backbone on the CPU is told, however it is made."""

    threads: int
    lease_fd: int
    state_dir: str
    sharing: Switch = "on"

    @property
    def env(self) -> dict[str, str]:
        pinned = _PINNED_ENV if self.threads == num_cores() else {}
        return _LAUNCHER_ENV | pinned | _caches(self.state_dir)


class Command(NamedTuple):
    module: str
    arguments: Sequence[str]
    env: Mapping[str, str]
    pass_fds: Sequence[int] = ()


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def host_command(config: BackboneConfig, dtype: Dtype, device: DeviceKind, *, adopts: bool, state_dir: str) -> Command:
    """`adopts`: the memory is there already and will be sent with an Adopt message."""
    arguments = [] if adopts else _checkpoint(config, dtype)
    if device != "cpu":
        module = "serverlesslora.backbone.device_host"
        arguments += ["--device", device]
    else:
        module = "serverlesslora.backbone.hold" if adopts else "serverlesslora.backbone.host"
    return Command(module, arguments, _caches(state_dir))


def launcher_command(device: DeviceKind, setting: WorkerSetting) -> Command:
    """The lease is for pools of CPU threads; a GPU shares its time between processes by itself."""
    module, born = "serverlesslora.launcher.zygote", ["--spawned-at", repr(time.monotonic())]
    if device != "cpu":
        return Command(module, ["--device", device, *born], _LAUNCHER_ENV | _caches(setting.state_dir))
    private = ["--private"] if setting.sharing == "off" else []
    arguments = ["--lease-fd", str(setting.lease_fd), *private, *born]
    return Command(module, arguments, setting.env, [setting.lease_fd])


def worker_command(config: BackboneConfig, dtype: Dtype, setting: WorkerSetting) -> Command:
    """A worker on the CPU that no launcher makes; one that does not share loads the checkpoint itself."""
    checkpoint = _checkpoint(config, dtype) if setting.sharing == "off" else []
    arguments = ["--lease-fd", str(setting.lease_fd), *checkpoint, "--spawned-at", repr(time.monotonic())]
    return Command("serverlesslora.launcher.alone", arguments, setting.env, [setting.lease_fd])


def _checkpoint(config: BackboneConfig, dtype: Dtype) -> list[str]:
    return ["--model", config.model, "--dtype", dtype, *(["--allow-pickle"] if config.allow_pickle else [])]


def _caches(state_dir: str) -> dict[str, str]:
    return {
        # transformers imports torch's compiler, which makes this folder (else in the temporary one) and leaves it.
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(state_dir, "torch"),
        # Compiled kernels: only the first worker ever waits for the compiler.
        "TRITON_CACHE_DIR": os.path.join(state_dir, "triton"),
    }
