"""`serverlesslora doctor --device`: what this machine's GPU offers, found by trying, and whether that is enough."""

from __future__ import annotations

from typing import Literal

import msgspec
from rich.console import Console

from serverlesslora.devices import (
    FALLBACKS,
    SENTENCES,
    choose_device,
    device_nodes,
    driver_version,
    installed_version,
    is_mps_active,
)
from serverlesslora_ipc.cuda.driver import DriverError, open_driver
from serverlesslora_ipc.cuda.region import RegionDraft
from serverlesslora_ipc.messages import Sharing

PACKAGES = ("cuda-bindings", "torch", "triton")


class DeviceReport(msgspec.Struct, frozen=True):
    verdict: str
    usable: bool
    auto: str  # what `--device auto` chooses here, and why
    nodes: tuple[str, ...] = ()
    driver: str | None = None
    packages: dict[str, str | None] = {}  # None: not installed
    mps: bool = False
    name: str | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    exports_fds: bool | None = None
    sharing: Sharing | None = None  # how a backbone would be shared: a scrap of memory was published to find out
    sharing_reason: str = ""  # why not better


def examine(kind: Literal["cuda", "emulated"]) -> DeviceReport:
    choice = choose_device("auto")
    found = DeviceReport(
        verdict="",
        usable=False,
        auto=f"{choice.kind}: {choice.reason}",
        nodes=tuple(device_nodes()),
        driver=driver_version(),
        packages={name: installed_version(name) for name in PACKAGES},
        mps=is_mps_active(),
    )
    if kind == "cuda" and not found.nodes:
        return _but(found, "no CUDA device: no NVIDIA device node in /dev (in a container: was the GPU passed on?)")
    try:
        found = _try_driver(found, kind)
    except DriverError as error:
        return _but(found, f"no CUDA device: {error}")
    build = found.packages["torch"] or "not installed"
    if kind == "cuda" and (build == "not installed" or build.endswith("+cpu")):
        return _but(found, f"the device works, but torch is {build}: install a CUDA build of torch")
    if found.packages["triton"] is None:
        return _but(found, "the device works, but triton is not installed: pip install serverlesslora[cuda]")
    assert found.sharing is not None
    sentence = SENTENCES[found.sharing]
    verdict = f"usable, with a caveat: {sentence}" if found.sharing in FALLBACKS else f"ready: {sentence}"
    return msgspec.structs.replace(found, verdict=verdict, usable=True)


def _but(found: DeviceReport, verdict: str) -> DeviceReport:
    return msgspec.structs.replace(found, verdict=verdict)


def _try_driver(found: DeviceReport, kind: Literal["cuda", "emulated"]) -> DeviceReport:
    driver = open_driver(kind)
    driver.start()
    try:
        memory = driver.memory()
        with RegionDraft(driver, driver.granularity()) as draft, draft.publish() as publication:
            return msgspec.structs.replace(
                found,
                name=driver.device_name(),
                free_bytes=memory.free_bytes,
                total_bytes=memory.total_bytes,
                exports_fds=driver.can_export_fds(),
                sharing=publication.sharing,
                sharing_reason=publication.reason,
            )
    finally:
        driver.stop()


def report(found: DeviceReport) -> None:
    lines = [
        ("device nodes", ", ".join(found.nodes) or "none"),
        ("driver", found.driver or "none"),
        *((name, version or "not installed") for name, version in found.packages.items()),
        ("MPS", "active: workers share one context server, and its fatal faults" if found.mps else "not active"),
    ]
    if found.name is not None:
        assert found.free_bytes is not None
        assert found.total_bytes is not None
        assert found.sharing is not None
        lines += [
            ("device", found.name),
            ("memory", f"{found.free_bytes >> 20} MiB free of {found.total_bytes >> 20} MiB"),
            ("descriptors", "memory can be shared by descriptor" if found.exports_fds else "none for memory here"),
            ("sharing", SENTENCES[found.sharing] + (f" ({found.sharing_reason})" if found.sharing_reason else "")),
        ]
    lines.append(("--device auto", found.auto))
    console = Console(soft_wrap=True)
    for name, value in lines:
        console.print(f"{name:<14}{value}", highlight=False, markup=False)
    console.print(found.verdict, style="green" if found.usable else "red", highlight=False, markup=False)
