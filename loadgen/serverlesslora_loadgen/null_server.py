"""A server that computes nothing, as a process: what a client measures beyond its cadence is the client's own doing.

Every request gets exactly as many tokens as it asks for, the first after `ttft_ms`, the others `tpot_ms` apart. Before
the first goes an SSE comment, `: stamp=<seconds>`: from when the request was read until that token was written, by the
server's own clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from serverlesslora_loadgen.errors import LoadgenError, TargetError
from serverlesslora_loadgen.null_streams import NullOptions, NullServer

LISTENING = "null server on "  # and its address: the first line it prints


async def serve(options: NullOptions, *, with_parent: bool) -> None:
    """Until SIGTERM or SIGINT, or until standard input ends when that is how its parent holds it."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    server = NullServer(options)
    listener = await server.listen(options.host, options.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if with_parent:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    gc.freeze()  # whatever lives by now stays: there is no use in looking at it again and again while serving
    port = listener.sockets[0].getsockname()[1]
    print(f"{LISTENING}http://{options.host}:{port}", flush=True)
    await stop.wait()
    listener.close()
    server.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = NullOptions()
    parser.add_argument("--host", default=default.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=default.port, help="0: any that is free (%(default)s)")
    parser.add_argument("--ttft-ms", type=float, default=default.ttft_ms, help="until the first token (%(default)s)")
    parser.add_argument("--tpot-ms", type=float, default=default.tpot_ms, help="between tokens (%(default)s)")
    parser.add_argument("--models", nargs="+", default=default.models, help="listed; any is answered (%(default)s)")
    parser.add_argument("--with-parent", action="store_true", help="stop at the end of standard input")


def run(arguments: argparse.Namespace) -> None:
    """Raises LoadgenError when the options make no sense or the port is taken."""
    given = {name: getattr(arguments, name) for name in NullOptions.__struct_fields__}
    try:
        options = msgspec.convert(given, NullOptions)
    except msgspec.ValidationError as error:
        raise LoadgenError(f"the null server cannot do that: {error}") from error
    allow_descriptors()
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options, with_parent=arguments.with_parent))


def allow_descriptors() -> None:
    """Every connection is one: as many as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def null_server(*, ttft_ms: float = 0.0, tpot_ms: float = 0.0, models: Sequence[str] = ("null",)) -> Iterator[str]:
    """One in a process of its own, on a free port; yields its address. It ends with this process, however that ends.

    Raises TargetError when it does not start.
    """
    command = [sys.executable, "-m", "serverlesslora_loadgen.null_server", "--with-parent"]
    command += ["--ttft-ms", str(ttft_ms), "--tpot-ms", str(tpot_ms), "--models", *models]
    ours = str(Path(__file__).parent.parent)  # the child must find this package wherever we found it
    paths = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}, text=True
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith(LISTENING):
                raise TargetError("the null server did not start; what it wrote stands above")
            yield line.removeprefix(LISTENING).strip()
        finally:
            process.terminate()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="null-server", description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except LoadgenError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
