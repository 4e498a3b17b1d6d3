"""Which devices this machine offers and how they share a backbone, found out without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Literal, NamedTuple

from serverlesslora_ipc.messages import Sharing

DeviceKind = Literal["cpu", "cuda", "emulated"]
DeviceSetting = Literal["auto", "cpu", "cuda", "emulated"]

SENTENCES: dict[Sharing, str] = {
    "memfd": "sealed memfd, mapped read-only",
    "vmm": "CUDA VMM, mapped read-only",
    "vmm-writable": "CUDA VMM, mapped WRITABLE (driver has no read-only access): digest verified while idle",
    "cuda-ipc": "legacy CUDA IPC, WRITABLE (no VMM descriptors here): digest verified while idle, "
    "and the memory dies with its host",
}
FALLBACKS: frozenset[Sharing] = frozenset({"vmm-writable", "cuda-ipc"})

_DEV = Path("/dev")
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")


class Choice(NamedTuple):
    kind: DeviceKind
    reason: str


def choose_device(setting: DeviceSetting) -> Choice:
    """`auto` is cuda exactly where everything a CUDA worker needs seems to be there."""
    if setting != "auto":
        return Choice(setting, "as configured")
    nodes = device_nodes()
    if not nodes:
        return Choice("cpu", "no NVIDIA device node in /dev")
    if installed_version("cuda-bindings") is None:
        return Choice("cpu", f"{nodes[0]} is there, but cuda-bindings are not: pip install serverlesslora[cuda]")
    build = installed_version("torch") or "none"
    if build.endswith("+cpu"):  # the local part of the version names what it was built for
        return Choice("cpu", f"{nodes[0]} is there, but torch is a CPU build ({build}): install a CUDA build of torch")
    return Choice("cuda", f"{nodes[0]} and cuda-bindings are there")


def device_nodes() -> list[str]:
    """One per GPU this process may see; `/dev/dxg` is the GPU of a Linux inside Windows."""
    numbered = sorted(path for path in _DEV.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit())
    return [str(path) for path in (*numbered, *_DEV.glob("dxg"))]


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Of the kernel module, as it names itself."""
    try:
        return _DRIVER_VERSION.read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return None


def is_mps_active() -> bool:
    """Whether new CUDA processes of this user would share one context server, and so its fatal faults."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()
