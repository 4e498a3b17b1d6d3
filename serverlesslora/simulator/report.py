"""Numbers of one simulated system, and the table of several.

Money is counted in two ways, each the same for all systems:

- by share: for every device, its price per second times the share of its memory that is held, integrated over time.
  This is what tenants would be billed if somebody else rented the rest of every device at the same price.
- whole devices: the price per second of every device for as long as anything is in its memory. This is what an operator
  pays who can give back nothing smaller than a device.

Both add the host memory of caches and idle containers by the GB. Always-on systems hold their share, and their
devices, from the beginning to the end. Cost-effectiveness is 1 / (mean end-to-end time · money), as in ServerlessLoRA,
section 6; it counts finished requests only, so read it beside the column of refused ones. A refused request misses its
SLO. Who refuses by objective turns away what would be late, which makes the times of the others shorter; who refuses by
patience serves it late. Compare them by the share of requests within the SLO.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from rich.table import Table

from serverlesslora.simulator.cluster import Cluster, Deadline
from serverlesslora.simulator.simulation import FINISHED, RUNGS, Outcome
from serverlesslora.simulator.systems import System
from serverlesslora.simulator.trace import Trace


class Spread(msgspec.Struct, frozen=True):
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Report(msgspec.Struct, frozen=True):
    system: str
    summary: str
    requests: int
    finished: int
    refused: int
    refusals: dict[str, int]
    refuses_by: Deadline
    ttft: Spread
    e2e: Spread
    tpot_mean_s: float  # (end-to-end - TTFT) / tokens after the first
    slo_ttft_s: float
    slo_attainment: float  # share of all requests, refused ones included
    rungs: dict[str, int]  # of finished requests
    device_busy_hours: float
    device_open_hours: float  # with anything on it
    device_gb_hours: float
    host_gb_hours: float
    cost: float  # by share of devices' memory
    cost_per_1000_in_slo: float
    cost_effectiveness: float  # 1/(s·currency)
    cost_whole: float  # whole devices, while open
    cost_whole_per_1000_in_slo: float
    cost_effectiveness_whole: float
    currency: str
    worker_starts: int
    started_ahead: int
    moved_out: int
    simulated_s: float
    num_events: int


def make_report(trace: Trace, cluster: Cluster, system: System, outcome: Outcome) -> Report:
    config = cluster.config
    finished = np.frombuffer(outcome.status, dtype=np.uint8) == FINISHED
    ttft = np.asarray(outcome.ttft)[finished]
    e2e = np.asarray(outcome.e2e)[finished]
    rungs = np.bincount(np.frombuffer(outcome.rungs, dtype=np.uint8)[finished], minlength=len(RUNGS))
    in_slo = int((ttft <= config.functions.slo_ttft_s).sum())
    gaps = np.maximum(1, trace.output_tokens[finished] - 1)
    fleet = outcome.fleet
    device_gb_hours = sum(device.held for device in fleet.devices) / 3.6e12
    host_gb_hours = sum(host.held for host in fleet.hosts) / 3.6e12
    open_hours = sum(device.occupied_s for device in fleet.devices) / 3600
    host_cost = host_gb_hours * config.hosts.price_per_gb_hour
    cost = device_gb_hours / config.devices.memory_gb * config.devices.price_per_hour + host_cost
    cost_whole = open_hours * config.devices.price_per_hour + host_cost
    mean_e2e = float(e2e.mean()) if len(e2e) else 0.0
    return Report(
        system=system.name,
        summary=system.summary,
        requests=trace.num_requests,
        finished=int(finished.sum()),
        refused=int((~finished).sum()),
        refusals=outcome.refusals,
        refuses_by=config.deadline or system.deadline,
        ttft=_spread(ttft),
        e2e=_spread(e2e),
        tpot_mean_s=_digits(float(((e2e - ttft) / gaps).mean()) if len(e2e) else 0.0),
        slo_ttft_s=config.functions.slo_ttft_s,
        slo_attainment=_digits(in_slo / trace.num_requests),
        rungs={name: int(count) for name, count in zip(RUNGS, rungs, strict=True)},
        device_busy_hours=_digits(sum(device.busy_s for device in fleet.devices) / 3600),
        device_open_hours=_digits(open_hours),
        device_gb_hours=_digits(device_gb_hours),
        host_gb_hours=_digits(host_gb_hours),
        cost=_digits(cost),
        cost_per_1000_in_slo=_digits(1000 * cost / in_slo if in_slo else 0.0),
        cost_effectiveness=_digits(1 / (mean_e2e * cost) if mean_e2e and cost else 0.0),
        cost_whole=_digits(cost_whole),
        cost_whole_per_1000_in_slo=_digits(1000 * cost_whole / in_slo if in_slo else 0.0),
        cost_effectiveness_whole=_digits(1 / (mean_e2e * cost_whole) if mean_e2e and cost_whole else 0.0),
        currency=config.currency,
        worker_starts=fleet.num_starts,
        started_ahead=fleet.num_ahead,
        moved_out=fleet.num_moved_out,
        simulated_s=_digits(outcome.end_s),
        num_events=outcome.num_events,
    )


def _spread(values: np.typing.NDArray[np.float64]) -> Spread:
    if not len(values):
        return Spread(0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Spread(_digits(float(values.mean())), _digits(float(p50)), _digits(float(p90)), _digits(float(p99)))


def _digits(value: float) -> float:
    """Six significant digits: more would be noise to a reader."""
    return float(f"{value:.6g}")


def render(reports: Sequence[Report], walls: Sequence[float], *, prices_are: str) -> Table:
    currency = reports[0].currency if reports else ""
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"times in seconds, of finished requests; money in {currency} ({prices_are} prices), by the share of "
        "devices' memory held or by whole devices while open; effect = 1000/(mean end-to-end time · money)\n"
        + _who_refuses(reports),
        caption_justify="left",
    )
    table.add_column("SYSTEM", no_wrap=True)
    columns = ("TTFT", "P50", "P90", "P99", "E2E", "SLO %", "REFUSED", "COLD", "BUSY H", "OPEN H", "GPU GBH", "RAM GBH")
    money = ("COST\n(by share)", "EFFECT", "COST\n(whole devices)", "EFFECT")
    for column in (*columns, *money, "WALL"):
        table.add_column(column, justify="right", no_wrap=True)
    for report, wall_s in zip(reports, walls, strict=True):
        cold = report.rungs["worker"] + report.rungs["backbone"]
        table.add_row(
            report.system,
            *(f"{value:.2f}" for value in (report.ttft.mean, report.ttft.p50, report.ttft.p90, report.ttft.p99)),
            f"{report.e2e.mean:.2f}",
            f"{100 * report.slo_attainment:.2f}",
            str(report.refused),
            str(cold),
            f"{report.device_busy_hours:.1f}",
            f"{report.device_open_hours:.1f}",
            f"{report.device_gb_hours:.0f}",
            f"{report.host_gb_hours:.0f}",
            f"{report.cost:.2f}",
            f"{1000 * report.cost_effectiveness:.3f}",
            f"{report.cost_whole:.2f}",
            f"{1000 * report.cost_effectiveness_whole:.3f}",
            f"{wall_s:.1f}",
        )
    return table


def _who_refuses(reports: Sequence[Report]) -> str:
    by = {deadline: [r.system for r in reports if r.refuses_by == deadline] for deadline in ("objective", "patience")}
    meaning = {"objective": "who would miss the SLO and waits for no start", "patience": "who would wait too long"}
    return "; ".join(f"refused by {name} ({meaning[name]}): {', '.join(names)}" for name, names in by.items() if names)
