"""A day of the Azure Functions trace on 16 simulated devices of 48 GB, under every system: money, latency, cold starts.

    SERVERLESSLORA_TRACES=FOLDER python bench/simulated_day.py
    python bench/simulated_day.py --trace COUNTS.csv.gz --lengths LENGTHS.csv.gz --systems ours,vllm-like --hours 2

1,000 functions: those of In-Vitro's sample of 1,250 that were called at most 4,027 times that day, which are exactly
the 1,000 least called. No request is dropped. Prompts and answers are as long as in Azure's LLM conversation trace.
Money is reported by share of memory and by whole devices; the always-on dlora-like runs on 4, 8 and 16 devices.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from harness import report

from serverlesslora.simulator.cluster import SHIPPED, make_cluster, read_cluster
from serverlesslora.simulator.report import make_report
from serverlesslora.simulator.simulation import Simulation
from serverlesslora.simulator.systems import SYSTEMS, choose_systems
from serverlesslora.simulator.trace import Choice, read_trace

COUNTS = "azure_functions_2019_invitro_1250fn_1440min.csv.gz"
LENGTHS = "AzureLLMInferenceTrace_conv.csv.gz"
LEAST_CALLED_1000 = 4027  # calls a day


def simulate(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, which reads the trace itself: sending it would cost more."""
    choice = Choice(
        functions=arguments.functions, max_per_day=arguments.max_per_day, hours=arguments.hours, seed=arguments.seed
    )
    trace = read_trace(arguments.trace, choice, lengths=arguments.lengths)
    cluster = read_cluster(arguments.cluster)
    if arguments.tenants is not None:
        functions = msgspec.structs.replace(cluster.config.functions, tenants=arguments.tenants)
        cluster = make_cluster(msgspec.structs.replace(cluster.config, functions=functions), cluster.profile)
    if arguments.deadline is not None:
        cluster = make_cluster(msgspec.structs.replace(cluster.config, deadline=arguments.deadline), cluster.profile)
    (system,) = choose_systems(name)
    began, cpu = time.perf_counter(), time.process_time()
    outcome = Simulation(trace, cluster, system).run()
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {
        **msgspec.to_builtins(make_report(trace, cluster, system, outcome)),
        "trace": trace.description,
        "tenants": cluster.config.functions.tenants,
        "profile": cluster.profile.measured_on,
        "prices": cluster.config.prices_are,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "us_per_event": round(1e6 * cpu_s / outcome.num_events, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    folder = os.environ.get("SERVERLESSLORA_TRACES")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default=folder and str(Path(folder) / COUNTS))
    parser.add_argument("--lengths", default=folder and str(Path(folder) / LENGTHS))
    parser.add_argument("--cluster", default=str(SHIPPED / "clusters" / "illustrative_16x48gb.toml"))
    parser.add_argument("--systems", help="by name, comma-separated; all without it")
    parser.add_argument("--functions", type=int, default=1000)
    parser.add_argument("--max-per-day", type=int, default=LEAST_CALLED_1000)
    parser.add_argument("--tenants", type=int, help="0: every function is its own [as the cluster file says]")
    parser.add_argument("--deadline", choices=("objective", "patience"), help="for all [what each system refuses by]")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if not arguments.trace or not arguments.lengths:
        raise SystemExit("no trace: give --trace and --lengths, or the folder they are in as SERVERLESSLORA_TRACES")
    names = [system.name for system in (choose_systems(arguments.systems) if arguments.systems else SYSTEMS)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for numbers in pool.map(simulate, names, [arguments] * len(names)):
            report("simulated_day", **numbers)


if __name__ == "__main__":
    main()
