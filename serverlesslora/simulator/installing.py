"""Always-on processes, where a system has them: all there is room for, from the beginning to the end."""

from __future__ import annotations

from collections.abc import Iterable

from serverlesslora.errors import ConfigError
from serverlesslora.simulator.device import Worker
from serverlesslora.simulator.fleet import Fleet


def install(fleet: Fleet, calls: Iterable[int]) -> list[Worker]:
    """The most called domains first, as an operator would who knows the day's calls (functions) before.

    They are dealt to the devices in turn; the first that fits nowhere ends it. Raises ConfigError when none fits.
    """
    system, functions = fleet.system, fleet.functions
    share, devices = system.share_of_device, fleet.devices
    devices = devices[: system.num_devices]
    if system.unit == "all":
        placed = [worker for device in devices if (worker := fleet.install(0, device, share)) is not None]
    else:
        num_calls = [0] * len(functions.members)
        for function in calls:
            num_calls[functions.domain[function]] += 1
        placed = []
        for turn, domain in enumerate(sorted(range(len(num_calls)), key=lambda domain: (-num_calls[domain], domain))):
            first = turn % len(devices)
            tries = (fleet.install(domain, device, share) for device in devices[first:] + devices[:first])
            worker = next((worker for worker in tries if worker is not None), None)
            if worker is None:
                break
            placed.append(worker)
    if not placed:
        raise ConfigError(f"no device can hold one process of {system.name!r}: raise devices.memory_gb")
    return placed
