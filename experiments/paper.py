"""The paper's comparison on this machine: everything on, each part off, one process per function; by class of arrivals.

    python experiments/paper.py [--model demo] [--seconds 20] [--out FOLDER] [--publish docs/results]

For each trace (functions of the Azure Functions sample that are Predictable, Normal or Bursty, and a mix of them; see
ServerlessLoRA, arXiv 2505.14468, section 6) each system is a server started anew with the same functions, memory bound
and limits; only its policy differs. The trace is compressed, and the timers of the server with it. Requests are sent
and judged by the load generator, memory is measured from outside. Without the sample ($SERVERLESSLORA_TRACES), traces
of the same classes are made up.

`process` starts a process, its libraries and a copy of the backbone when a request needs them: what platforms do that
know nothing of models. Starts take as long as they take: they do not shrink with the trace's time.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.serving import Settings as Flags
from bench.serving import deployment, find_model, function_names
from experiments.cpu import cpu_seconds
from experiments.table import Row, Table, publish, row_of, shown
from serverlesslora_loadgen.classes import CLASSES
from serverlesslora_loadgen.environment import environment
from serverlesslora_loadgen.generate.lengths import LogNormal, LogNormalLengths
from serverlesslora_loadgen.generate.workload import ArrivalClass, Workload, generate
from serverlesslora_loadgen.output import write_outputs
from serverlesslora_loadgen.plan import Target
from serverlesslora_loadgen.progress import RunProgress
from serverlesslora_loadgen.result import Limits
from serverlesslora_loadgen.run import Settings, run
from serverlesslora_loadgen.shaping import Shape, Shaped, shape
from serverlesslora_loadgen.trace import TraceRequest, read_trace
from serverlesslora_loadgen.units import parse_factor

SYSTEMS: dict[str, Flags] = {
    "ours": {},
    "sharing off": {"sharing": "off"},
    "pre-loading off": {"preload": "off"},
    "offloading off": {"offload": "off"},
    "batching off": {"batching": "off"},
    "process": {"sharing": "off", "preload": "off"},
}
TRACES = {
    "predictable": "azf2019_predictable_16ad_60min",
    "normal": "azf2019_normal_16ad_60min",
    "bursty": "azf2019_bursty_16ad_60min",
    "mixed": "azf2019_mixed_24ad_60min",
}
KEEP_ALIVE_S = (5.0, 600.0)  # of the trace's own time
GOOD_TTFT_S = 2.5  # a first token later than this is not good
DEADLINE_S = 10.0  # what the server is told: what cannot make it is refused
COLD_TIMEOUT_S = 120.0  # a process that starts slowly is waited for, and counts with all its time
SETTLE_S = 3.0


def traced(name: str, *, seconds: float) -> tuple[str, list[TraceRequest]]:
    """The published sample where it is, else one made up of the same classes, a request per second."""
    folder = os.environ.get("SERVERLESSLORA_TRACES")
    if folder is not None:
        for path in (Path(folder), Path(folder, "derived")):
            if (file := path / f"{TRACES[name]}.jsonl.gz").is_file():
                return TRACES[name], read_trace(file)
    classes = CLASSES if name == "mixed" else (name.capitalize(),)
    lengths = LogNormalLengths(input=LogNormal(mean=1155, sigma=1.0, max=4096), output=LogNormal(mean=211, sigma=0.8))
    workload = Workload(
        adapters=8 * (1 + len(classes)) if name == "mixed" else 16,
        rate_rps=1.0,
        duration_s=max(3600.0, seconds),
        classes=tuple(ArrivalClass(each) for each in classes),
        lengths=lengths,
        seed=7,
    )
    return f"made up, {name}", generate(workload)


async def measure(system: str, name: str, shaped: Shaped, functions: Sequence[str], parsed: argparse.Namespace) -> Row:
    model = find_model(parsed.model)
    keep_min, keep_max = (each / parsed.speedup for each in KEEP_ALIVE_S)
    flags: dict[str, str | float] = {
        **SYSTEMS[system],
        "memory-mb": parsed.memory_mb,
        "keep-alive-min": keep_min,
        "keep-alive-max": keep_max,
        "slo-ttft": DEADLINE_S,
        "cold-timeout": COLD_TIMEOUT_S,
        "warm-pool": 0 if SYSTEMS[system].get("preload") == "off" else 1,
    }
    began = time.monotonic()
    with deployment(model, functions, flags) as deployed:
        await asyncio.sleep(SETTLE_S)
        settings = Settings(
            target=Target(url=deployed.running.url, token_ids=model.token_ids),
            trace_name=f"{name}, {system}",
            speedup=parsed.speedup,
            length_scale=parsed.length_scale,
            notes=tuple(shaped.notes),
            limits=Limits(ttft_s=GOOD_TTFT_S),
            admin=deployed.running.admin,
            meter_group=deployed.running.pid,
            timers=dict(zip(("keep-alive-min", "keep-alive-max"), KEEP_ALIVE_S, strict=True)),
            said={flag: f"{value:g}" if isinstance(value, float) else str(value) for flag, value in flags.items()},
            title=f"{system}: {name} arrivals, {model.name} model",
        )
        cpu_before_s = cpu_seconds(deployed.running.pid)
        with RunProgress(len(shaped.requests), f"{name}, {system}") as told:
            done = await run(shaped.requests, settings, told)
        cpu_s = cpu_seconds(deployed.running.pid) - cpu_before_s
    if parsed.out is not None:
        folder = parsed.out / f"{name}-{system.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        write_outputs(folder, done.result, done.records, shaped.requests, html=parsed.html)
    return row_of(name, system, done, cpu_s=cpu_s, took_s=time.monotonic() - began)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a shape written by bench/make_models.py [demo]")
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES), metavar="TRACE")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--seconds", type=float, default=20.0, help="of requests in one run [20]")
    parser.add_argument("--speedup", type=parse_factor, default=15.0, help="time is divided by this [15]")
    parser.add_argument("--length-scale", type=parse_factor, default=1 / 8, help="of prompts and answers [1/8]")
    parser.add_argument("--functions", type=int, default=8, help="of each trace, chosen whole [8]")
    parser.add_argument("--from-minute", type=float, default=0.0, help="of the trace [0]")
    parser.add_argument("--memory-mb", type=int, default=16_000, help="bound of every system alike [16000]")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep every run's result, requests and report")
    parser.add_argument("--html", action="store_true", help="with a report of each run in it")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="write the table and its pictures here")
    parsed = parser.parse_args()
    model = find_model(parsed.model)
    began = time.monotonic()
    rows: list[Row] = []
    sources = {}
    for name in parsed.traces:
        source, whole = traced(name, seconds=60 * parsed.from_minute + parsed.seconds * parsed.speedup)
        functions = function_names(parsed.functions)
        sources[name] = source
        chosen = shape(whole, Shape(functions=parsed.functions)).requests  # before the window: it may show fewer
        shaped = shape(
            chosen,
            Shape(
                start_s=60 * parsed.from_minute,
                duration_s=parsed.seconds * parsed.speedup,
                speedup=parsed.speedup,
                models=tuple(functions),
                length_scale=parsed.length_scale,
                max_tokens=model.max_tokens,
            ),
        )
        for system in parsed.systems:
            rows.append(await measure(system, name, shaped, functions, parsed))
            print(shown(rows[-1]), file=sys.stderr, flush=True)
    table = Table(
        date=datetime.date.today().isoformat(),
        model=model.name,
        traces=sources,
        functions=parsed.functions,
        seconds=parsed.seconds,
        speedup=parsed.speedup,
        length_scale=parsed.length_scale,
        memory_mb=parsed.memory_mb,
        good_ttft_s=GOOD_TTFT_S,
        deadline_s=DEADLINE_S,
        took_s=time.monotonic() - began,
        environment=environment(),
        rows=rows,
    )
    if parsed.publish is not None:
        await asyncio.to_thread(publish, table, parsed.publish)  # the browser is driven by a loop of its own
    print(msgspec.json.encode(table).decode())


if __name__ == "__main__":
    asyncio.run(main())
