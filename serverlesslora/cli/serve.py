"""`serverlesslora serve`: from flags and files to a running server, with progress while it loads."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import uvloop
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from serverlesslora.cli.flags import add_config_flags, given_flags
from serverlesslora.config import ServerConfig, build_config, read_toml
from serverlesslora.demo import adapter_paths, backbone_path
from serverlesslora.errors import ConfigError
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.server import Server
from serverlesslora_ipc.messages import Progress as LoadProgress

Subparsers = Any  # argparse's own type for this is private

DESCRIPTION = """\
Load MODEL once and serve it and every adapter as a model of its own, on an OpenAI-compatible API.
Without MODEL and --config, the embedded demo is served: a tiny base that repeats what it is told, and adapters that
change it visibly."""


def add_parsers(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "serve", help="start the server", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="Hugging Face directory or hub id; NAME=MODEL names it"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[TENANT/]NAME=PATH",
        help="serve the PEFT adapter in PATH as the function NAME; may be repeated",
    )
    parser.add_argument("--config", metavar="FILE.toml", help="read settings from a file; flags win over it")
    parser.add_argument("--demo", action="store_true", help="serve the embedded demo")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    add_config_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = Console(stderr=True)
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(name)s: %(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start-up lines repeat what `greet` says
    config = config_from(arguments)
    uvloop.run(_serve(config, console))
    return 0


def config_from(arguments: argparse.Namespace) -> ServerConfig:
    """Raises ConfigError."""
    file = read_toml(arguments.config) if arguments.config else {}
    flags = given_flags(arguments)
    if arguments.models:
        flags["backbones"] = [_parse_model(text) for text in arguments.models]
    if arguments.adapter:
        flags["functions"] = [*file.get("functions", ()), *map(_parse_adapter, arguments.adapter)]
    demo: dict[str, Any] = {}
    if arguments.demo or not (arguments.models or file.get("backbones")):
        if arguments.models:
            raise ConfigError("--demo serves its own model; leave MODEL out")
        demo["backbones"] = [{"name": "demo", "model": str(backbone_path())}]
        # The golden answers are float32's; at this size it costs nothing.
        demo["dtype"] = "float32"
        flags["functions"] = [
            *({"name": name, "adapter": str(path)} for name, path in adapter_paths().items()),
            *flags.get("functions", file.get("functions", ())),
        ]
    return build_config(demo, file, flags)


def _parse_model(text: str) -> dict[str, str]:
    name, equals, model = text.partition("=")
    return {"name": name, "model": model} if equals else {"model": text}


def _parse_adapter(text: str) -> dict[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ConfigError(f"--adapter {text!r}: expected NAME=PATH or TENANT/NAME=PATH")
    tenant, slash, rest = name.partition("/")
    return {"name": rest, "tenant": tenant, "adapter": path} if slash else {"name": name, "adapter": path}


async def _serve(config: ServerConfig, console: Console) -> None:
    with LoadingBars(console) as bars:
        server = Server(config, Fleet(config, on_progress=bars.show))

        def on_ready(server: Server) -> None:
            bars.stop()
            greet(server, config)

        await server.run(on_ready)


class LoadingBars:
    """A progress bar per backbone, on a terminal; silent elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("loading {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, name: str, progress: LoadProgress) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name)
        self._progress.update(self._tasks[name], completed=progress.done_bytes, total=progress.total_bytes)

    def stop(self) -> None:
        self._progress.stop()

    def __enter__(self) -> LoadingBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def greet(server: Server, config: ServerConfig) -> None:
    url = server.api.address
    model = config.functions[0].name if config.functions else config.backbones[0].public_name
    # Quoted for the shell: the key is the reader's to fill in.
    key = ' -H "authorization: Bearer $KEY"' if server.keys.is_required else ""
    names = [*(b.public_name for b in config.backbones), *(f.name for f in config.functions)]
    print(
        f"""
serverlesslora is serving on {url}{f" (admin on {server.admin.address})" if server.admin else ""}
models: {", ".join(names[:20])}{" ..." if len(names) > 20 else ""}

curl {url}/v1/models{key}

curl {url}/v1/chat/completions{key} -H 'content-type: application/json' \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello World"}}]}}'

curl -N {url}/v1/chat/completions{key} -H 'content-type: application/json' \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello World"}}]}}'
""",
        flush=True,
        file=sys.stdout,
    )
