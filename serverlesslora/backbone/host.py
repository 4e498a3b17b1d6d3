"""The backbone host's first life: load, seal, publish, then become the small process that holds the memory.

Run as `python -m serverlesslora.backbone.host --fd N --model PATH`. A restarted host that only has to adopt memory
the gateway still has starts as `serverlesslora.backbone.hold` directly.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from serverlesslora import logs
from serverlesslora_ipc import process
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.messages import BackboneFailed, GatewayToHost, Progress, Published

log = logging.getLogger("serverlesslora.backbone")

_PROGRESS_STEPS = 100


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serverlesslora.backbone.host")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--revision")
    parser.add_argument("--allow-pickle", action="store_true")
    options = parser.parse_args(argv)
    process.die_with_parent()
    process.leave_signals_to_the_gateway()
    process.set_name("slora-backbone")
    logs.set_up_child()
    channel: Channel[GatewayToHost] = Channel.inherited(options.fd, GatewayToHost)
    process.exit_on_hangup(options.fd)
    try:
        _load_and_hold(channel, options)
    except ChannelClosed:
        return 0
    except BaseException as error:
        channel.send([BackboneFailed(reason=failure_reason(error))])
        return 1


def _load_and_hold(channel: Channel[GatewayToHost], options: argparse.Namespace) -> NoReturn:
    started = time.monotonic()
    gc.disable()  # importing makes many objects and no garbage: looking for it takes a fifth of the time
    from serverlesslora.backbone import loader  # imports torch; the command line and the process state come first

    gc.freeze()
    gc.enable()
    libraries_s = time.monotonic() - started

    weights_fd, manifest_fd, manifest = loader.load(
        options.model,
        dtype=options.dtype,
        revision=options.revision,
        allow_pickle=options.allow_pickle,
        progress=progress_reporter(channel),
    )
    seconds = time.monotonic() - started
    published = Published(
        size_bytes=manifest.total_bytes,
        layout_digest=manifest.layout_digest,
        content_digest=manifest.content_digest,
        seconds=seconds,
        libraries_s=libraries_s,
    )
    channel.send([published], fds=[weights_fd, manifest_fd])
    for fd in (channel.fileno(), weights_fd, manifest_fd):
        os.set_inheritable(fd, True)
    module = [sys.executable, "-m", "serverlesslora.backbone.hold", "--fd", str(channel.fileno())]
    took = ["--seconds", repr(seconds), "--libraries-seconds", repr(libraries_s)]
    os.execv(sys.executable, [*module, "--held", str(weights_fd), str(manifest_fd), *took])


def progress_reporter(channel: Channel[GatewayToHost]) -> Callable[[int, int], None]:
    """Tells the gateway of every hundredth."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if done - reported >= total / _PROGRESS_STEPS or done == total:
            reported = done
            channel.send([Progress(done_bytes=done, total_bytes=total)])

    return report


def failure_reason(error: BaseException) -> str:
    from serverlesslora.backbone.loader import BackboneInvalid

    if isinstance(error, BackboneInvalid):
        return str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"not enough memory to load the backbone: {error}"
    log.error("loading failed", exc_info=error)
    return f"loading failed: {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
