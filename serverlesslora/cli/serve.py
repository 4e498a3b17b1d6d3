"""`serverlesslora serve`: from flags and files to a running server, with progress while it loads."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

import uvloop
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from serverlesslora import logs
from serverlesslora.cli.flags import add_config_flags, given_flags
from serverlesslora.config import ServerConfig, build_config, read_toml
from serverlesslora.demo import adapter_paths, backbone_path
from serverlesslora.environment import CONFIG_VARIABLE, settings_in
from serverlesslora.errors import ConfigError
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.server import Server
from serverlesslora_ipc.messages import Progress as LoadProgress

STOPPING = (signal.SIGTERM, signal.SIGINT)
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
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="read settings from a file; variables like SERVERLESSLORA_PORT win over it, and flags over both",
    )
    parser.add_argument("--demo", action="store_true", help="serve the embedded demo")
    add_config_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # Until the server takes them over; as process 1, signals without a handler would do nothing.
    for number in STOPPING:
        signal.signal(number, _leave)
    config = config_from(arguments)
    logs.set_up(config.log_level, config.log_format, role="gateway")
    uvloop.run(_serve(config, Console(stderr=True)))
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # it has stopped; one more signal must not change its exit status
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def config_from(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """Raises ConfigError."""
    path = arguments.config or environment.get(CONFIG_VARIABLE)
    file = (read_toml(path) if path else {}) | settings_in(environment)
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
    try:
        await _serve_until_stopped(config, console)
    finally:
        # The loop's handlers end with it; what comes between that and the end is held back.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


async def _serve_until_stopped(config: ServerConfig, console: Console) -> None:
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
