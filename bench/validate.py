"""Does the simulator say what the server does? One trace, replayed on a live server and simulated with its profile.

    python bench/validate.py [--model demo] [--seconds 180] [--idle-timeout 20]

The server writes its profile when it ends; the simulator is given that profile, the same trace and the same settings,
and nothing of what was measured from outside. Compared: mean time to first token, cold starts by rung, device seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from harness import report
from replay import Arrival, HttpSender, cut, find_trace, read_trace, rename, replay, scale, summary
from serverless import SETTLE_S, ledger
from serving import Model, deployment, find_model, function_names

from serverlesslora.scheduler.profile import Profile, read_profile
from serverlesslora.scheduler.settings import PolicySettings
from serverlesslora.simulator import trace as traces
from serverlesslora.simulator.live import Server, simulate_server
from serverlesslora.simulator.report import Report

SLO_S = 10.0
MEMORY_MB = 12_000


def write_trace(path: Path, arrivals: Sequence[Arrival]) -> Path:
    rows = (
        {
            "timestamp": 1000 * each.at_s,
            "model": each.model,
            "input_length": each.prompt_tokens,
            "output_length": each.output_tokens,
        }
        for each in arrivals
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def live(
    model: Model, functions: list[str], arrivals: list[Arrival], idle_timeout_s: float, profile: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the client saw and what the ledger says."""
    settings: dict[str, str | float] = {
        "idle-timeout": idle_timeout_s,
        "slo-ttft": SLO_S,
        "memory-mb": MEMORY_MB,
        "profile-out": str(profile),
    }
    with deployment(model, functions, settings) as deployed:
        await asyncio.sleep(SETTLE_S)
        async with HttpSender(deployed.running.url, token_ids=model.token_ids) as send:
            done = await replay(arrivals, send)
        counted = ledger(deployed, 0.0)
        assert counted is not None
        return summary(done, slo_s=SLO_S), counted


def simulated(path: Path, profile: Profile, idle_timeout_s: float, model: Model) -> Report:
    server = Server(
        settings=PolicySettings(slo_ttft_s=SLO_S),
        idle_timeout_s=idle_timeout_s,
        slots=32,
        memory_bytes=MEMORY_MB << 20,
        adapter_bytes=sum(file.stat().st_size for file in model.adapters[0].iterdir()),
    )
    return simulate_server(traces.read_trace(path), profile, server, backbone="base")


def percent(ours: float, real: float) -> float | None:
    return round(100 * (ours / real - 1), 1) if real else None


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a shape written by make_models.py [demo]")
    parser.add_argument("--trace", default="azf2019_mixed_24ad_60min")
    parser.add_argument("--seconds", type=float, default=180.0, help="of one replay [180]")
    parser.add_argument("--from-minute", type=float, default=0.0, help="where the window begins [0]")
    parser.add_argument("--compress", type=float, default=1.0, help="of time [1]")
    parser.add_argument("--length-scale", type=float, default=1 / 8, help="of both lengths [1/8]")
    parser.add_argument("--idle-timeout", type=float, default=20.0, metavar="SECONDS", help="of workers [20]")
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    whole = read_trace(find_trace(arguments.trace))
    functions = function_names(len({each.model for each in whole}))
    begin_s = 60 * arguments.from_minute
    window = cut(rename(whole, functions), begin_s, begin_s + arguments.seconds * arguments.compress)
    arrivals = scale(window, compress=arguments.compress, length=arguments.length_scale, max_tokens=model.max_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        path, profile_path = write_trace(Path(scratch) / "trace.jsonl", arrivals), Path(scratch) / "profile.json"
        seen, counted = await live(model, functions, arrivals, arguments.idle_timeout, profile_path)
        profile = read_profile(profile_path)
        found = simulated(path, profile, arguments.idle_timeout, model)
    cold = {rung: count for rung, count in counted["rungs"].items() if rung != "hot"}
    report(
        "validate",
        workload={**vars(arguments), "requests": len(arrivals), "functions": len(functions)},
        valid=seen["valid"],
        live={
            "ttft_mean_s": seen["ttft_s"]["mean"],
            "answered": seen["answered"],
            "rungs": counted["rungs"],
            "device_s": counted["device_s"],
        },
        simulated={
            "ttft_mean_s": found.ttft.mean,
            "finished": found.finished,
            "rungs": found.rungs,
            "device_s": 3600 * found.device_busy_hours,
        },
        difference_percent={
            "ttft_mean": percent(found.ttft.mean, seen["ttft_s"]["mean"]),
            "cold_starts": percent(sum(n for rung, n in found.rungs.items() if rung != "hot"), sum(cold.values())),
            "device_s": percent(3600 * found.device_busy_hours, counted["device_s"]),
        },
        bar="each within 15 %",
        profile=msgspec.to_builtins(profile),
    )


if __name__ == "__main__":
    asyncio.run(main())
