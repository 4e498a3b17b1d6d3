"""Numbers of one simulated system, and the table of several.

Money is defined once, for all systems alike: for every device, its price per second times the share of its memory that
is held, integrated over time; plus the same for the host memory of caches and idle containers. Always-on systems
hold their share from the beginning to the end. Cost-effectiveness is 1 / (mean end-to-end time · money), as in
ServerlessLoRA, section 6; it counts finished requests only, so read it beside the column of refused ones. A refused
request misses its SLO.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from rich.table import Table

from serverlesslora.simulator.cluster import Cluster
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
    cost: float
    cost_per_1000_in_slo: float
    cost_effectiveness: float  # 1/(s·currency)
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
    cost = (
        device_gb_hours / config.devices.memory_gb * config.devices.price_per_hour
        + host_gb_hours * config.hosts.price_per_gb_hour
    )
    mean_e2e = float(e2e.mean()) if len(e2e) else 0.0
    return Report(
        system=system.name,
        summary=system.summary,
        requests=trace.num_requests,
        finished=int(finished.sum()),
        refused=int((~finished).sum()),
        refusals=outcome.refusals,
        ttft=_spread(ttft),
        e2e=_spread(e2e),
        tpot_mean_s=_digits(float(((e2e - ttft) / gaps).mean()) if len(e2e) else 0.0),
        slo_ttft_s=config.functions.slo_ttft_s,
        slo_attainment=_digits(in_slo / trace.num_requests),
        rungs={name: int(count) for name, count in zip(RUNGS, rungs, strict=True)},
        device_busy_hours=_digits(sum(device.busy_s for device in fleet.devices) / 3600),
        device_open_hours=_digits(sum(device.occupied_s for device in fleet.devices) / 3600),
        device_gb_hours=_digits(device_gb_hours),
        host_gb_hours=_digits(host_gb_hours),
        cost=_digits(cost),
        cost_per_1000_in_slo=_digits(1000 * cost / in_slo if in_slo else 0.0),
        cost_effectiveness=_digits(1 / (mean_e2e * cost) if mean_e2e and cost else 0.0),
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
        caption=f"times in seconds; money in {currency} ({prices_are} prices): memory held · price; "
        "effect = 1000/(mean end-to-end time · money)",
        caption_justify="left",
    )
    table.add_column("SYSTEM", no_wrap=True)
    columns = ("TTFT", "P50", "P90", "P99", "E2E", "SLO %", "REFUSED", "COLD", "BUSY H", "GPU GBH", "RAM GBH", "COST")
    for column in (*columns, "EFFECT", "WALL"):
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
            f"{report.device_gb_hours:.0f}",
            f"{report.host_gb_hours:.0f}",
            f"{report.cost:.2f}",
            f"{1000 * report.cost_effectiveness:.3f}",
            f"{wall_s:.1f}",
        )
    return table
