"""Whether a calibration is one of the client that made a run: the machine, its processes, and how much it was asked."""

from __future__ import annotations

from collections.abc import Iterator

from serverlesslora_loadgen.result import Calibration, Environment

WHERE = {"cpu": "CPU", "cores": "cores"}  # of the environment, and what people call it


def differences(known: Calibration, machine: Environment, processes: int) -> list[str]:
    """What was not the same when the client was calibrated, as `CPU: A, not B`, or is not known to be; empty: it was
    this client."""
    return list(_differences(known, machine, processes))


def _differences(known: Calibration, machine: Environment, processes: int) -> Iterator[str]:
    there = known.setup.get("environment")
    found = {**known.setup, **(there if isinstance(there, dict) else {})}
    here = {name: getattr(machine, name) for name in WHERE} | {"processes": processes}
    for name, now in here.items():
        what = WHERE.get(name, "client processes")
        if name not in found:
            yield f"{what}: not told"
        elif found[name] != now:
            yield f"{what}: {found[name]}, not {now}"


def doubts(
    known: Calibration | None, machine: Environment, *, processes: int, busiest_rps: float, most_streams: int
) -> list[str]:
    """What has to be known before the calibration is believed, in sentences.

    `busiest_rps`: requests that were sent in the busiest second. `most_streams`: that were open at one time.
    """
    if known is None:
        return []
    said = []
    if other := differences(known, machine, processes):
        said.append(
            f"the calibration may not be of this client ({'; '.join(other)}): make one here, with as many processes"
        )
    for name, asked, borne in (
        ("requests in the busiest second", busiest_rps, known.max_rps),
        ("streams at one time", most_streams, known.max_streams),
    ):
        if borne is not None and asked > borne:
            said.append(f"{asked:,.0f} {name}, and the calibrated client bears {borne:,.0f}")
    return said
