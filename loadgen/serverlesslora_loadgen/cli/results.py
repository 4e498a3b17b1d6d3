"""`compare` and `report`: results that are there already."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from serverlesslora_loadgen.result import read_result, schema

Subparsers = Any  # argparse has no public name for it


def add_parsers(commands: Subparsers) -> None:
    comparing = commands.add_parser("compare", help="two results: which is better, or that nobody can tell")
    comparing.add_argument("a", type=Path, help="result.json, or the folder it is in")
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--json", action="store_true")
    comparing.set_defaults(run=run_compare)

    reporting = commands.add_parser("report", help="draw a result again")
    reporting.add_argument("result", type=Path, help="result.json, or the folder it is in")
    reporting.add_argument("-o", "--out", type=Path, metavar="FILE", help="[report.html beside it]")
    reporting.set_defaults(run=run_report)

    printing = commands.add_parser("schema", help="JSON Schema of result.json")
    printing.set_defaults(run=run_schema)


def file_of(path: Path) -> Path:
    return path / "result.json" if path.is_dir() else path


def run_compare(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    from serverlesslora_loadgen.compare import compare, print_comparison
    from serverlesslora_loadgen.export import read_csv

    files = [file_of(path) for path in (parsed.a, parsed.b)]
    results = [read_result(path) for path in files]
    records = [read_csv(path.parent / "requests.csv") for path in files]
    comparison = compare(results[0], results[1], records[0], records[1])
    if parsed.json:
        print(msgspec.json.format(msgspec.json.encode(comparison), indent=1).decode())
    else:
        print_comparison(comparison, Console(soft_wrap=True))
    return 0


def run_report(parsed: argparse.Namespace) -> int:
    from serverlesslora_loadgen.report.html import write_report

    path = file_of(parsed.result)
    out = parsed.out or path.parent / "report.html"
    write_report(read_result(path), out)
    print(out)
    return 0


def run_schema(parsed: argparse.Namespace) -> int:
    print(json.dumps(schema(), indent=1))
    return 0
