"""The `serverlesslora-loadgen` command: parsing, dispatch, and errors as one line on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from serverlesslora_loadgen.cli import checks, results, running, sweeping, workloads
from serverlesslora_loadgen.errors import LoadgenError

COMMANDS = (workloads, running, sweeping, checks, results)
EPILOG = """exit codes: 0 passed; 1 could not be done; 2 wrong usage; 3 an objective was missed or an answer was wrong;
4 INVALID, the client did not keep its schedule. A first run:

  serverlesslora-loadgen generate --adapters 4 --rate 5 --duration 30s -o trace.jsonl
  serverlesslora-loadgen run --url http://127.0.0.1:8000 --trace trace.jsonl --map served --slo ttft=500ms:p99
"""


class Parser(argparse.ArgumentParser):
    """Options are spelled out: what keeps keys out of results has to know them by their names."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | more)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serverlesslora-loadgen",
        description="Replay traces of many adapters against an OpenAI-compatible server, and say what happened.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = make_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        return code
    except LoadgenError as error:
        print(f"serverlesslora-loadgen {parsed.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
