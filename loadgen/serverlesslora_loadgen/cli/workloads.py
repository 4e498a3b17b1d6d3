"""`generate`, `import` and `inspect`: traces, before anything is sent."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from serverlesslora_loadgen.classes import CLASSES
from serverlesslora_loadgen.cli.arguments import of, seconds, whole
from serverlesslora_loadgen.errors import LoadgenError, WorkloadError
from serverlesslora_loadgen.trace import TraceRequest, digest, read_trace, write_trace

Subparsers = Any  # argparse has no public name for it


def add_parsers(commands: Subparsers) -> None:
    _add_generate(commands)
    _add_import(commands)
    inspecting = commands.add_parser("inspect", help="what is in a trace: rates, classes, lengths")
    inspecting.add_argument("trace", type=Path)
    inspecting.add_argument("--adapters", type=int, default=30, metavar="N", help="that are listed one by one [30]")
    inspecting.add_argument("--html", type=Path, metavar="FILE", help="also as a page with plots")
    inspecting.add_argument("--json", action="store_true")
    inspecting.set_defaults(run=run_inspect)


def _add_generate(commands: Subparsers) -> None:
    from serverlesslora_loadgen.generate.arrivals import parse_arrivals
    from serverlesslora_loadgen.generate.diurnal import parse_diurnal
    from serverlesslora_loadgen.generate.lengths import parse_lengths
    from serverlesslora_loadgen.generate.popularity import parse_popularity
    from serverlesslora_loadgen.generate.workload import parse_classes

    parser = commands.add_parser("generate", help="make a trace up; the same seed makes the same file")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="JSON lines; .gz is packed")
    parser.add_argument("--config", type=Path, metavar="TOML", help="the whole workload; what else is given overrides")
    parser.add_argument("--adapters", type=int, metavar="N")
    parser.add_argument("--rate", type=float, dest="rate_rps", metavar="RPS", help="of all adapters together")
    parser.add_argument("--duration", type=seconds, dest="duration_s", metavar="TIME")
    parser.add_argument(
        "--popularity", type=of(parse_popularity), help="uniform, power:0.5, zipf:1.1, geometric:1.5, file:FILE"
    )
    parser.add_argument(
        "--arrivals", type=of(parse_arrivals), help="poisson, gamma:cv=4, weibull:0.5, onoff:on=20,cv=7, constant"
    )
    parser.add_argument(
        "--classes", type=of(parse_classes), help="mixed, or such as 'predictable;bursty=onoff:on=30,cv=6'"
    )
    parser.add_argument("--diurnal", type=of(parse_diurnal), help="none, sine:period=1h,depth=0.8, file:FILE")
    parser.add_argument(
        "--lengths", type=of(parse_lengths), help="fixed:128/32, uniform:16-64/8-32, lognormal:…, empirical:FILE"
    )
    parser.add_argument("--name", help="of adapter i, with a place for its number [adapter-{:02d}]")
    parser.add_argument("--seed", type=whole(0))
    parser.set_defaults(run=run_generate)


def run_generate(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.generate.workload import Workload, generate, read_workload

    given = {name: value for name in Workload.__struct_fields__ if (value := getattr(parsed, name, None)) is not None}
    if parsed.config is not None:
        workload = msgspec.structs.replace(read_workload(parsed.config), **given)
    else:
        missing = [f"--{name.removesuffix('_rps').removesuffix('_s')}" for name in NEEDED if name not in given]
        if missing:
            raise WorkloadError(f"give {', '.join(missing)}, or a file with --config")
        workload = Workload(**given)
    return _write(parsed.out, generate(workload), [])


NEEDED = ("adapters", "rate_rps", "duration_s")


def _add_import(commands: Subparsers) -> None:
    from serverlesslora_loadgen.generate.lengths import parse_lengths
    from serverlesslora_loadgen.sources import SOURCES

    parser = commands.add_parser("import", help="make a published trace into one of ours")
    parser.add_argument("kind", choices=SOURCES)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="JSON lines; .gz is packed")
    parser.add_argument("--start", type=seconds, dest="start_s", metavar="TIME")
    parser.add_argument("--duration", type=seconds, dest="duration_s", metavar="TIME")
    parser.add_argument("--model", help="where the source names none")
    parser.add_argument("--jitter-ms", type=float, metavar="MS", help="over which times are spread [its clock's steps]")
    parser.add_argument("--lengths", type=of(parse_lengths), help="where the source has none, such as empirical:FILE")
    parser.add_argument("--functions", type=int, metavar="N", help="that become adapters [all]")
    parser.add_argument("--classes", type=class_names, help="mixed, or such as predictable,bursty")
    parser.add_argument("--popularity-cap", type=int, metavar="N", help="leave out functions with more requests")
    parser.add_argument(
        "--rate", type=float, dest="rate_rps", metavar="RPS", help="leave out the busiest until it fits"
    )
    parser.add_argument("--trigger", help="only functions invoked by this, such as http")
    parser.add_argument("--seed", type=int)
    parser.set_defaults(run=run_import)


def class_names(text: str) -> tuple[str, ...]:
    """As `generate` takes them, but for laws: `mixed` is all; upper and lower case are the same."""
    if text.strip().lower() == "mixed":
        return CLASSES
    return tuple(word.strip().capitalize() for word in re.split("[,;]", text))


def run_import(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.sources import ImportOptions, import_trace

    given = {
        name: value for name in ImportOptions.__struct_fields__ if (value := getattr(parsed, name, None)) is not None
    }
    options = ImportOptions(**given)
    if not sys.stderr.isatty():
        imported = import_trace(parsed.kind, parsed.file, options)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"reading {parsed.file.name}", total=1.0)
            imported = import_trace(parsed.kind, parsed.file, options, lambda share: bar.update(task, completed=share))
    return _write(parsed.out, imported.requests, imported.notes)


def _write(path: Path, requests: list[TraceRequest], notes: list[str]) -> int:
    try:
        write_trace(path, requests)
    except OSError as error:
        raise LoadgenError(f"cannot write {path}: {error}") from error
    end_s = requests[-1].timestamp / 1000 if requests else 0.0
    adapters = len({request.model for request in requests})
    print(f"{path}: {len(requests)} requests of {adapters} adapters in {end_s:.1f} s, sha256 {digest(requests)[:16]}")
    for note in notes:
        print(f"  {note}")
    return 0


def run_inspect(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    from serverlesslora_loadgen.inspection import inspect, print_inspection
    from serverlesslora_loadgen.inspection_page import write_page

    requests = read_trace(parsed.trace)
    if parsed.html is not None:
        write_page(requests, parsed.html, title=parsed.trace.name)
    if parsed.json:
        print(msgspec.json.format(msgspec.json.encode(inspect(requests)), indent=1).decode())
    else:
        print_inspection(inspect(requests), Console(soft_wrap=True), adapters=parsed.adapters)
    return 0
