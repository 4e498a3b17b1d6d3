"""`serverlesslora deploy`, `list` and `remove`: functions of a running server."""

from __future__ import annotations

import argparse
import urllib.parse
from pathlib import Path

import msgspec
from rich.table import Table

from serverlesslora.cli.client import add_client_flags, call, plain, plain_console, stream
from serverlesslora.cli.progress import follow
from serverlesslora.cli.serve import Subparsers
from serverlesslora.gateway.functions_view import FunctionView
from serverlesslora.gateway.telling import ChangeEvent
from serverlesslora.registry.entries import shown


def add_parsers(commands: Subparsers) -> None:
    deploy = commands.add_parser("deploy", help="deploy an adapter as a function of a running server")
    deploy.add_argument("name", help="what clients will call it (`model` in requests)")
    deploy.add_argument(
        "adapter", help="PEFT adapter: a directory as the server sees it, hf://, s3://, gs:// or https://"
    )
    deploy.add_argument("--backbone", help="name of the backbone it belongs to [the first]")
    deploy.add_argument("--tenant", help="functions of one tenant share a worker")
    deploy.add_argument("--max-concurrency", type=int, metavar="N", help="requests it may have open at once")
    deploy.add_argument(
        "--replace",
        action="store_true",
        help="give an existing name these weights; running requests finish on the old ones",
    )
    deploy.add_argument(
        "--weight",
        type=int,
        metavar="PERCENT",
        help="requests the new version of an existing function gets, the others keep the rest [100]",
    )
    add_client_flags(deploy)
    deploy.set_defaults(run=run_deploy)

    list_ = commands.add_parser("list", help="list the functions of a running server")
    add_client_flags(list_)
    list_.set_defaults(run=run_list)

    remove = commands.add_parser("remove", help="remove a function with all versions, or NAME@v3 alone")
    remove.add_argument("name")
    add_client_flags(remove)
    remove.set_defaults(run=run_remove)


def run_deploy(arguments: argparse.Namespace) -> int:
    adapter = Path(arguments.adapter).expanduser()
    given = {
        "name": arguments.name,
        "adapter": str(adapter.resolve() if adapter.exists() else arguments.adapter),
        "backbone": arguments.backbone,
        "tenant": arguments.tenant,
        "max_concurrency": arguments.max_concurrency,
    }
    body = {
        # What is not given is not sent: a function that is replaced keeps its settings.
        "function": {name: value for name, value in given.items() if value is not None},
        "replace": arguments.replace or arguments.weight is not None,
        "weight": 100 if arguments.weight is None else arguments.weight,
    }
    function = follow(stream(arguments, "/admin/functions", body, type=ChangeEvent), functions=1).deployed
    assert function is not None
    if arguments.json:
        print(msgspec.json.encode(function).decode())
    else:
        print(
            f"{function.name} v{function.version} -> {function.digest[:16]} on {function.backbone} "
            f"(rank {function.rank}, {function.modules} modules); requests: {shown(function.weights)}"
        )
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    functions: list[FunctionView] = call(arguments, "GET", "/admin/functions", type=list[FunctionView])
    if arguments.json:
        print(msgspec.json.encode(functions).decode())
        return 0
    table = Table("function", "versions", "adapter", "backbone", "tenant", "rank", "modules", "MB", "also", "state")
    for f in functions:
        sizes = (str(f.rank), str(f.modules), f"{f.size_bytes / 1e6:.1f}")
        versions = f"v{f.version}" if len(f.weights) == 1 else shown(f.weights)
        of = f" of {len(f.versions)}" if len(f.versions) > 1 else ""
        state = f.state if f.problem is None else f"{f.state}: {f.problem}"
        texts = (versions + of, f.digest[:16], f.backbone, plain(f.tenant or ""), *sizes, ", ".join(f.kinds))
        table.add_row(plain(f.name), *texts, plain(state))
    plain_console().print(table)
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    call(arguments, "DELETE", f"/admin/functions/{urllib.parse.quote(arguments.name, safe='')}")
    print(msgspec.json.encode({"removed": arguments.name}).decode() if arguments.json else f"removed {arguments.name}")
    return 0
