"""The `serverlesslora` command: parsing, dispatch, and errors as one line on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msgspec

from serverlesslora import __version__
from serverlesslora.cli import admin, apply, doctor, healthcheck, keys, plan, serve, simulate, top, usage, versions
from serverlesslora.errors import ServerlessLoraError

COMMANDS = (serve, admin, apply, versions, keys, doctor, top, plan, usage, simulate, healthcheck)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serverlesslora", description="Serve many LoRA functions from one shared, read-only backbone."
    )
    parser.add_argument("--version", action="version", version=f"serverlesslora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 well, 1 failed with a reason, 2 wrong usage (argparse's own) or a dry run found work."""
    parsed = make_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        return code
    except ServerlessLoraError as error:
        if getattr(parsed, "json", False):
            print(msgspec.json.encode({"error": error.to_wire()}).decode())
        print(f"serverlesslora {parsed.command}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
