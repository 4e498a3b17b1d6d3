"""The launcher on CPU: a process with everything imported and built that is forked for each worker.

Run as `python -m serverlesslora.launcher.zygote --fd N`. It stays single-threaded all its life, because a thread pool
does not survive a fork: the child would wait for threads it does not have. Workers outlive it (they follow their own
channel) but never the gateway.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from serverlesslora_ipc import process
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import (
    Exited,
    Fork,
    Forked,
    GatewayToLauncher,
    LauncherFailed,
    Prepare,
    Prepared,
    Shutdown,
)

if TYPE_CHECKING:
    from serverlesslora.launcher.prepared import PreparedBackbone

    Build = Callable[[str, int, int], PreparedBackbone]
    Run = Callable[[socket.socket, PreparedBackbone, Fork], int]

WORKER = "serverlesslora.worker.main:run"
PREPARE = "serverlesslora.launcher.prepared:prepare"

# Read by libraries while they load, so it is set before the first of them is imported; what the gateway set wins.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's copy would start its pool on import
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "20000",  # idle OpenMP threads of one worker must not burn the cores of another
    "HF_HUB_OFFLINE": "1",  # whatever was to be fetched, the backbone host has fetched
}


class _Child(NamedTuple):
    worker_id: str
    pid: int


class Zygote:
    def __init__(self, channel: Channel[GatewayToLauncher], build: Build, run: Run) -> None:
        self._channel = channel
        self._build = build
        self._run = run
        self._prepared: PreparedBackbone | None = None
        self._children: dict[int, _Child] = {}  # by pidfd, which becomes readable when the child ends
        self._events = select.poll()
        self._events.register(channel, select.POLLIN)

    def main_loop(self) -> int:
        """Returns the exit code after Shutdown or a failed Prepare; raises ChannelClosed when the gateway is gone."""
        while True:
            for fd, _ in self._events.poll():
                if fd in self._children:
                    self._reap(fd)
                    continue
                while self._channel.poll():
                    messages, fds = self._channel.receive()
                    for message in messages:
                        match message:
                            case Shutdown():
                                return 0
                            case Prepare():
                                if not self._prepare(message, fds):
                                    return 1
                            case Fork():
                                self._fork(message, fds)

    def _prepare(self, prepare: Prepare, fds: list[int]) -> bool:
        started = time.monotonic()
        try:
            assert self._prepared is None
            assert len(fds) == 2
            prepared = self._build(prepare.backbone, fds[0], fds[1])
            self._check_single_threaded()
        except Exception as error:
            traceback.print_exc()
            self._channel.send([LauncherFailed(reason=f"{type(error).__name__}: {error}")])
            return False
        self._prepared = prepared
        gc.collect()
        gc.freeze()  # the collector of a child would otherwise write to, and so copy, every page with objects on it
        answer = Prepared(
            seconds=time.monotonic() - started,
            context_length=prepared.context_length,
            vocab_size=prepared.vocab_size,
            kv_bytes_per_token=prepared.kv_bytes_per_token,
        )
        self._channel.send([answer])
        return True

    def _fork(self, fork: Fork, fds: list[int]) -> None:
        assert self._prepared is not None
        assert len(fds) == 1
        try:
            pid = os.fork()
        except OSError as error:
            close_fds(fds)
            self._channel.send([LauncherFailed(reason=f"cannot fork: {error}", worker_id=fork.worker_id)])
            return
        if pid == 0:
            os._exit(self._child(fork, fds[0], self._prepared))
        close_fds(fds)  # the child's copy must be the only one, or its death would not be an end of stream
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = _Child(fork.worker_id, pid)
        self._events.register(pidfd, select.POLLIN)
        self._channel.send([Forked(worker_id=fork.worker_id, pid=pid)])

    def _child(self, fork: Fork, fd: int, prepared: PreparedBackbone) -> int:
        """The worker's life; the return value is its exit code. Nothing of the zygote's may run after it."""
        try:
            self._channel.close()
            close_fds(self._children)
            process.set_name("slora-worker")
            process.set_oom_score(500)
            process.exit_on_hangup(fd)
            return self._run(socket.socket(fileno=fd), prepared, fork)
        except ChannelClosed:
            return 0
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _reap(self, pidfd: int) -> None:
        child = self._children.pop(pidfd)
        self._events.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(child.pid, 0)
        exited = Exited(worker_id=child.worker_id, pid=child.pid, status=os.waitstatus_to_exitcode(status))
        self._channel.send([exited])

    @staticmethod
    def _check_single_threaded() -> None:
        if process.num_threads() > 1:
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            raise RuntimeError(f"a library started threads in the launcher, which must be forked: {names}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serverlesslora.launcher.zygote")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lease-fd", type=int, help="what workers of this device lock for a turn")
    parser.add_argument("--worker", default=WORKER, help="module:function that is a worker's life")
    parser.add_argument("--prepare", default=PREPARE, help="module:function that maps and builds a backbone")
    options = parser.parse_args(argv)
    process.die_with_parent()
    process.leave_signals_to_the_gateway()
    process.set_name("slora-launcher")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    channel: Channel[GatewayToLauncher] = Channel.inherited(options.fd, GatewayToLauncher)
    try:
        run = _resolve(options.worker)
        if options.lease_fd is not None:
            run = functools.partial(run, lease_fd=options.lease_fd)
        zygote = Zygote(channel, _resolve(options.prepare), run)
        return zygote.main_loop()
    except ChannelClosed:
        return 0
    except Exception as error:
        traceback.print_exc()
        channel.send([LauncherFailed(reason=f"{type(error).__name__}: {error}")])
        return 1


def _resolve(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
