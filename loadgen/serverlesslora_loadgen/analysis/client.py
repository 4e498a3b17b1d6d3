"""Whether the client itself can be believed: what it cost, how late it was, and when a run says nothing."""

from __future__ import annotations

import numpy as np

from serverlesslora_loadgen.analysis import statistics
from serverlesslora_loadgen.analysis.columns import Floats, Table
from serverlesslora_loadgen.result import Client, max_lag_s
from serverlesslora_loadgen.units import show_seconds

EARLY_S = 0.001  # nobody may be asked before time, but clocks have grains

# Seconds: each about twice the one before, over the range from what no one sees to what makes a run worthless.
EDGES = (0.0, *(scale * each for scale in (1e-4, 1e-3, 1e-2, 1e-1) for each in (1.0, 2.0, 5.0)), 1.0)


def client(table: Table, *, seconds: float, processes: int, cpu_s: float, late_sockets: int) -> Client:
    lags = lag(table)
    return Client(
        processes=processes,
        lag=statistics.distribution(lags) if len(lags) else None,
        lag_histogram=statistics.histogram(lags, EDGES),
        cpu_share=cpu_s / seconds if seconds > 0 else 0.0,
        late_sockets=late_sockets,
    )


def lag(table: Table) -> Floats:
    """How much later than intended, without what it took to connect, of all that left."""
    return table.lag[~np.isnan(table.lag)]


def flaws(table: Table, found: Client, median_ttft_s: float | None) -> list[str]:
    """Why the numbers say nothing about the server, in sentences; empty when they do."""
    if not len(table):
        return ["no request was sent"]
    said = []
    if unsent := int(table.unsent.sum()):
        said.append(f"{_requests(unsent)} of {len(table):,} {'was' if unsent == 1 else 'were'} not sent")
    if found.lag is None:
        said.append("no request got as far as the server")
        return said
    late, allowed = found.lag.percentiles["p99"].value, max_lag_s(median_ttft_s)
    if late > allowed:
        said.append(f"the client was late: p99 lag {show_seconds(late)}, more than {show_seconds(allowed)}")
    early = int((lag(table) < -EARLY_S).sum())
    if early:
        said.append(f"the client sent {_requests(early)} before their time")
    return said


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"
