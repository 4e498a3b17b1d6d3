"""`serverlesslora apply`: have the functions of a file, and see beforehand what that changes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from serverlesslora.cli.client import add_client_flags, plain, plain_console, stream
from serverlesslora.cli.progress import follow
from serverlesslora.cli.serve import Subparsers
from serverlesslora.config import read_toml
from serverlesslora.errors import ConfigError, InvalidRequest
from serverlesslora.gateway.telling import ChangeEvent
from serverlesslora.registry.declared import Declared, Difference

DIFFERENT = 2


class FunctionsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    functions: tuple[Declared, ...] = ()


DESCRIPTION = """\
FILE declares functions: [[functions]] with name, adapter, backbone, tenant, limits, pinned, slo_ttft_s, and who gets
which version: canary = {v4 = 10} or weights = {v3 = 90, v4 = 10}, where `latest` is the version that the adapter is.
Adapter directories are relative to the file. All of it comes to be or nothing.

Exit codes: 0 there was nothing to do or it is done, 1 an error, 2 a dry run found something to do."""


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "apply",
        help="have the functions that a file declares",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-f", "--file", required=True, metavar="FILE.toml")
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    parser.add_argument("--prune", action="store_true", help="remove functions that the file does not name")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    body = {"functions": read_functions(arguments.file), "prune": arguments.prune}
    found = _ask(arguments, body | {"dry_run": True})
    if arguments.dry_run or found.is_empty:
        _show(arguments, found)
        return DIFFERENT if arguments.dry_run and not found.is_empty else 0
    if not arguments.json:
        _show(arguments, found)
    _check_agreed(arguments, found)
    applied = _ask(arguments, body | {"revision": found.revision})
    if arguments.json:
        _show(arguments, applied)
    else:
        print(f"applied to {sum(row.actions != ('unchanged',) for row in applied.rows)} functions")
    return 0


def read_functions(path: str) -> list[Declared]:
    """Raises ConfigError."""
    try:
        functions = msgspec.convert(read_toml(path), type=FunctionsFile).functions
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    return [msgspec.structs.replace(each, adapter=_from(Path(path).parent, each.adapter)) for each in functions]


def _from(directory: Path, adapter: str) -> str:
    """A directory as the server sees it; what is none here may be another kind of source, or the server's own."""
    path = directory / Path(adapter).expanduser()
    return str(path.resolve()) if path.exists() else adapter


def _ask(arguments: argparse.Namespace, body: dict[str, Any]) -> Difference:
    events = stream(arguments, "/admin/apply", body, type=ChangeEvent)
    difference = follow(events, functions=len(body["functions"])).difference
    assert difference is not None
    return difference


def _check_agreed(arguments: argparse.Namespace, found: Difference) -> None:
    """Raises InvalidRequest. Nobody can be asked in a script: only removing needs --yes there."""
    if arguments.yes:
        return
    pruned = [row.name for row in found.rows if "prune" in row.actions]
    if arguments.json or not sys.stdin.isatty():
        if pruned:
            raise InvalidRequest(f"{len(pruned)} functions would be removed, {pruned[0]!r} among them; say --yes")
        return
    if input("apply? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InvalidRequest("nothing was changed")


def _show(arguments: argparse.Namespace, found: Difference) -> None:
    if arguments.json:
        print(msgspec.json.encode(found).decode())
    elif not found.rows:
        print("the file declares no functions, and there is nothing to do")
    else:
        plain_console().print(render(found))


def render(found: Difference) -> Table:
    table = Table("function", "what", "version", "details")
    for row in found.rows:
        version = "" if row.version is None else f"v{row.version}"
        table.add_row(plain(row.name), ", ".join(row.actions), version, plain("; ".join(row.details)))
    return table
