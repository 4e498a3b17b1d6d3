"""What a backbone's processes are on each kind of device: which module runs, with which arguments and environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serverlesslora.config import BackboneConfig, Dtype
from serverlesslora.devices import DeviceKind

# OpenMP threads keep spinning for a moment after a parallel region. Long enough to bridge the gap to the next region
# of a step, short enough to be asleep when another worker's turn begins.
_LAUNCHER_ENV = {"GOMP_SPINCOUNT": "20000", "MALLOC_ARENA_MAX": "2"}

# With a thread per core, each stays on its own: else the kernel may put two on one core beside a foreign load, and
# every barrier of a step waits for a time slice.
_PINNED_ENV = {"OMP_PROC_BIND": "true"}


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
    arguments = [] if adopts else ["--model", config.model, "--dtype", dtype]
    if config.allow_pickle and not adopts:
        arguments.append("--allow-pickle")
    if device != "cpu":
        module = "serverlesslora.backbone.device_host"
        arguments += ["--device", device]
    else:
        module = "serverlesslora.backbone.hold" if adopts else "serverlesslora.backbone.host"
    return Command(module, arguments, _caches(state_dir))


def launcher_command(device: DeviceKind, *, threads: int, lease_fd: int, state_dir: str) -> Command:
    """The lease is for pools of CPU threads; a GPU shares its time between processes by itself."""
    module, env = "serverlesslora.launcher.zygote", _LAUNCHER_ENV | _caches(state_dir)
    if device != "cpu":
        return Command(module, ["--device", device], env)
    pinned = _PINNED_ENV if threads == num_cores() else {}
    return Command(module, ["--lease-fd", str(lease_fd)], env | pinned, [lease_fd])


def _caches(state_dir: str) -> dict[str, str]:
    return {
        # transformers imports torch's compiler, which makes this folder (else in the temporary one) and leaves it.
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(state_dir, "torch"),
        # Compiled kernels: only the first worker ever waits for the compiler.
        "TRITON_CACHE_DIR": os.path.join(state_dir, "triton"),
    }
