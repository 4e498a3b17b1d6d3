"""A worker without a launcher: a fresh process that imports its libraries, gets its backbone, and is the worker.

Run as `python -m serverlesslora.launcher.alone --fd N`, once per worker, where nothing may be there before a request
needs it. It maps the backbone it is sent, or loads its own copy where `--model` says from what. It speaks the
launcher's protocol for as long as it lives, so that it ends with its gateway whatever it is busy with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serverlesslora import logs
from serverlesslora.launcher.zygote import ENVIRONMENT
from serverlesslora_ipc import process
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.messages import Fork, Forked, GatewayToLauncher, LauncherFailed, Prepare, Prepared

if TYPE_CHECKING:
    from serverlesslora.launcher.prepared import PreparedBackbone


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serverlesslora.launcher.alone")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lease-fd", type=int, help="what workers of this device lock for a turn")
    parser.add_argument("--spawned-at", type=float, help="of CLOCK_MONOTONIC; not given: now")
    parser.add_argument("--model", help="load a copy of this; not given: the backbone comes as shared memory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--allow-pickle", action="store_true")
    options = parser.parse_args(argv)
    spawned_at = time.monotonic() if options.spawned_at is None else options.spawned_at
    cores = os.sched_getaffinity(0)  # before OpenMP pins this thread, and so what it starts, to one of them
    process.die_with_parent()
    process.leave_signals_to_the_gateway()
    process.set_name("slora-worker")
    logs.set_up_child()
    process.set_oom_score(500)
    for name, value in _environment(fetches=options.model is not None).items():
        os.environ.setdefault(name, value)
    channel: Channel[GatewayToLauncher] = Channel.inherited(options.fd, GatewayToLauncher)
    process.exit_on_hangup(channel.fileno())
    try:
        import torch

        from serverlesslora.backbone import loader  # these import torch and transformers
        from serverlesslora.launcher import prepared as preparing
        from serverlesslora.worker import main as worker

        libraries_s = time.monotonic() - spawned_at
        prepare, fork, memory_fds, connection = _wait_for_work(channel)
        logs.belongs_to(fork.domain)
        started = time.monotonic()
        if options.model is not None:
            torch.set_num_threads(fork.limits.threads)
            loaded = loader.load_private(options.model, dtype=options.dtype, allow_pickle=options.allow_pickle)
            load_s = time.monotonic() - started
            prepared = preparing.build(prepare.backbone, loaded.weights, loaded.manifest)
        else:
            load_s = 0.0
            weights_fd, manifest_fd = memory_fds
            prepared = preparing.map_shared(prepare.backbone, weights_fd, manifest_fd)
        prepared = dataclasses.replace(prepared, libraries_s=libraries_s, load_s=load_s)
        channel.send([_told(prepared, time.monotonic() - started), Forked(worker_id=fork.worker_id, pid=os.getpid())])
        return worker.run(connection, prepared, fork, lease_fd=options.lease_fd, cores=cores, started=started + load_s)
    except ChannelClosed:
        return 0
    except Exception as error:
        with contextlib.suppress(ChannelClosed):
            channel.send([LauncherFailed(reason=_reason(error))])
        return 1


def _environment(*, fetches: bool) -> dict[str, str]:
    """As in the launcher, but that no host has fetched before what this process is to load."""
    return {name: value for name, value in ENVIRONMENT.items() if not (fetches and name == "HF_HUB_OFFLINE")}


def _wait_for_work(channel: Channel[GatewayToLauncher]) -> tuple[Prepare, Fork, list[int], socket.socket]:
    messages, fds = channel.receive()
    prepare, fork = messages
    assert isinstance(prepare, Prepare)
    assert isinstance(fork, Fork)
    *memory_fds, connection_fd = fds
    process.exit_on_hangup(connection_fd)
    return prepare, fork, memory_fds, socket.socket(fileno=connection_fd)


def _told(prepared: PreparedBackbone, seconds: float) -> Prepared:
    return Prepared(
        seconds=seconds,
        context_length=prepared.context_length,
        vocab_size=prepared.vocab_size,
        kv_bytes_per_token=prepared.kv_bytes_per_token,
        libraries_s=prepared.libraries_s,
        size_bytes=prepared.size_bytes,
    )


def _reason(error: Exception) -> str:
    from serverlesslora.backbone.host import failure_reason
    from serverlesslora.launcher.prepared import PrepareError

    return str(error) if isinstance(error, PrepareError) else failure_reason(error)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as a forked worker: what libraries would tidy up goes with the process
