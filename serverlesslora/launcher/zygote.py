"""The launcher: a process with everything imported and built that is forked for each worker.

Run as `python -m serverlesslora.launcher.zygote --fd N`. It stays single-threaded all its life, because a thread pool
does not survive a fork: the child would wait for threads it does not have. For the same reason it never touches a GPU:
what a child would inherit of a driver is broken there. Its spares do that, each for itself. Workers outlive the
launcher (they follow their own channel) but never the gateway.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import logging
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from serverlesslora import logs
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
    Sharing,
    Shutdown,
    WorkerLimits,
)

if TYPE_CHECKING:
    from serverlesslora.launcher.prepared import BuiltBackbone

    Build = Callable[[str, int | None, int, Sharing, bytes], BuiltBackbone]
    Run = Callable[[socket.socket, Any, Fork], int]
    Rehearse = Callable[[Any, WorkerLimits], BuiltBackbone]


log = logging.getLogger("serverlesslora.launcher")


class Entries(NamedTuple):
    """Each is `module:function`."""

    prepare: str  # maps and builds a backbone, once, in the launcher
    rehearsal: str  # what a spare does before it waits
    worker: str  # a worker's life


ON_CPU = Entries(
    "serverlesslora.launcher.prepared:prepare",
    "serverlesslora.worker.main:rehearse",
    "serverlesslora.worker.main:run",
)
PRIVATELY_ON_CPU = Entries(
    "serverlesslora.launcher.private:prepare",
    "serverlesslora.launcher.private:rehearse",
    "serverlesslora.launcher.private:run",
)
ON_DEVICE = Entries(
    "serverlesslora.launcher.device:prepare",
    "serverlesslora.launcher.device:rehearse",
    "serverlesslora.launcher.device:run",
)

# Read by libraries while they load, so it is set before the first of them is imported; what the gateway set wins.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's copy would start its pool on import
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "20000",  # idle OpenMP threads of one worker must not burn the cores of another
    "HF_HUB_OFFLINE": "1",  # whatever was to be fetched, the backbone host has fetched
}
DEVICE_ENVIRONMENT = {
    "CUDA_MODULE_LOADING": "LAZY",  # only the kernels that run take device memory, in each worker
    "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8",  # 8 MiB in each worker instead of the 32 MiB cuBLAS takes on Hopper
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # memory is not lost in the gaps between fixed segments
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a library that asks whether there is a GPU must not initialise it by that
}
EMULATED_ENVIRONMENT = {"TRITON_INTERPRET": "1"}
UVM_NODE = "nvidia-uvm"  # a process has it open exactly since it initialised CUDA

# A new spare is made a moment after the last was taken: its rehearsal would compete with the first answer of the
# worker that took it.
REFILL_DELAY_S = 1.0


class _Child(NamedTuple):
    worker_id: str
    pid: int


class _Spare(NamedTuple):
    """A forked child without a domain: it has rehearsed and waits for a Fork on its channel."""

    pid: int
    pidfd: int
    channel: Channel[Fork]


class Zygote:
    def __init__(
        self,
        channel: Channel[GatewayToLauncher],
        build: Build,
        run: Run,
        rehearse: Rehearse,
        *,
        libraries_s: float = 0.0,
    ) -> None:
        """`libraries_s`: from the start of this process until everything was imported."""
        self._channel = channel
        self._libraries_s = libraries_s
        self._build = build
        self._run = run
        self._rehearse = rehearse
        self._prepare_message: Prepare | None = None
        self._spares: dict[int, _Spare] = {}  # by pidfd
        self._refill_at = float("inf")
        self._prepared: BuiltBackbone | None = None
        self._children: dict[int, _Child] = {}  # by pidfd, which becomes readable when the child ends
        self._events = select.poll()
        self._events.register(channel, select.POLLIN)

    def main_loop(self) -> int:
        """Returns the exit code after Shutdown or a failed Prepare; raises ChannelClosed when the gateway is gone."""
        while True:
            wait_s = self._refill_at - time.monotonic()
            ready = self._events.poll(None if wait_s == float("inf") else max(0.0, 1000 * wait_s))
            if not ready:
                self._add_spare()
            for fd, _ in ready:
                if fd in self._children or fd in self._spares:
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
            *weights, manifest_fd = fds
            assert len(weights) == (prepare.sharing != "cuda-ipc")
            weights_fd = weights[0] if weights else None
            prepared = self._build(prepare.backbone, weights_fd, manifest_fd, prepare.sharing, prepare.handle)
            self._check_single_threaded()
            self._check_no_gpu()
        except Exception as error:
            log.exception("the backbone cannot be prepared")
            self._channel.send([LauncherFailed(reason=f"{type(error).__name__}: {error}")])
            return False
        self._prepared = prepared
        self._prepare_message = prepare
        gc.collect()
        gc.freeze()  # the collector of a child would otherwise write to, and so copy, every page with objects on it
        gc.enable()
        answer = Prepared(
            seconds=time.monotonic() - started,
            context_length=prepared.context_length,
            vocab_size=prepared.vocab_size,
            kv_bytes_per_token=prepared.kv_bytes_per_token,
            libraries_s=self._libraries_s,
            size_bytes=prepared.size_bytes,
        )
        self._channel.send([answer])
        self._plan_refill(0.0)
        return True

    def _fork(self, fork: Fork, fds: list[int]) -> None:
        assert self._prepared is not None
        assert len(fds) == 1
        try:
            spare = self._give_to_spare(fork, fds[0]) if fork.may_be_spare else None
            pid = spare or self._fork_now(fork, fds[0], self._prepared)
        except OSError as error:
            self._channel.send([LauncherFailed(reason=f"cannot fork: {error}", worker_id=fork.worker_id)])
            return
        finally:
            close_fds(fds)  # the child's copy must be the only one, or its death would not be an end of stream
        self._channel.send([Forked(worker_id=fork.worker_id, pid=pid)])

    def _fork_now(self, fork: Fork, fd: int, prepared: BuiltBackbone) -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(self._child(fork, fd, prepared))
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = _Child(fork.worker_id, pid)
        self._events.register(pidfd, select.POLLIN)
        return pid

    def _give_to_spare(self, fork: Fork, fd: int) -> int | None:
        """The pid of the spare that becomes this worker; None when there is none."""
        while self._spares:
            pidfd, spare = self._spares.popitem()
            self._plan_refill(REFILL_DELAY_S)
            self._children[pidfd] = _Child(fork.worker_id, spare.pid)
            try:
                spare.channel.send([fork], [fd])
                return spare.pid
            except ChannelClosed:  # it died a moment ago; its end will be reported for nobody
                self._children[pidfd] = _Child("", spare.pid)
            finally:
                spare.channel.close()
        return None

    def _plan_refill(self, delay_s: float) -> None:
        wanted = self._prepare_message.num_spares if self._prepare_message else 0
        if len(self._spares) < wanted:
            self._refill_at = time.monotonic() + delay_s

    def _add_spare(self) -> None:
        """Fork a child that rehearses and then waits for its domain: it has none yet, and will have only one."""
        self._refill_at = float("inf")
        message, prepared = self._prepare_message, self._prepared
        assert message is not None
        assert prepared is not None
        assert message.limits is not None
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            self._plan_refill(10 * REFILL_DELAY_S)
            return
        if pid == 0:
            ours.close()
            os._exit(self._spare(Channel(theirs, Fork), message.limits, prepared))
        theirs.close()
        pidfd = os.pidfd_open(pid)
        self._spares[pidfd] = _Spare(pid, pidfd, Channel(ours, Fork))
        self._events.register(pidfd, select.POLLIN)
        self._plan_refill(REFILL_DELAY_S)

    def _spare(self, waiting: Channel[Fork], limits: WorkerLimits, prepared: BuiltBackbone) -> int:
        """A child's life before it is a worker; it ends with the launcher as long as it has no domain."""
        try:
            self._channel.close()
            close_fds(self._children)
            for other in self._spares.values():
                other.channel.close()
            close_fds(self._spares)
            self._children, self._spares = {}, {}
            process.set_name("slora-spare")
            process.set_oom_score(500)  # it may hold a whole model of its own
            process.die_with_parent()  # also in the middle of a rehearsal, which takes seconds on a device
            prepared = self._rehearse(prepared, limits)
            messages, fds = waiting.receive()
            process.outlive_parent()
            waiting.close()
        except ChannelClosed:
            return 0
        except BaseException:
            log.exception("a spare process failed")
            return 1
        return self._child(messages[0], fds[0], prepared)

    def _child(self, fork: Fork, fd: int, prepared: BuiltBackbone) -> int:
        """The worker's life; the return value is its exit code. Nothing of the zygote's may run after it."""
        try:
            self._channel.close()
            close_fds(self._children)
            for spare in self._spares.values():
                spare.channel.close()
            close_fds(self._spares)
            process.set_name("slora-worker")
            logs.belongs_to(fork.domain)
            process.set_oom_score(500)
            process.exit_on_hangup(fd)
            return self._run(socket.socket(fileno=fd), prepared, fork)
        except ChannelClosed:
            return 0
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        except BaseException:
            log.exception("the worker of domain %s failed", fork.domain)
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _reap(self, pidfd: int) -> None:
        spare = self._spares.pop(pidfd, None)
        child = _Child("", spare.pid) if spare else self._children.pop(pidfd)
        self._events.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(child.pid, 0)
        if spare is not None:
            spare.channel.close()
            self._plan_refill(10 * REFILL_DELAY_S)  # not at once: whatever killed it may kill the next
        if not child.worker_id:
            return
        exited = Exited(worker_id=child.worker_id, pid=child.pid, status=os.waitstatus_to_exitcode(status))
        self._channel.send([exited])

    @staticmethod
    def _check_single_threaded() -> None:
        if process.num_threads() > 1:
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            raise RuntimeError(f"a library started threads in the launcher, which must be forked: {names}")

    @staticmethod
    def _check_no_gpu() -> None:
        with os.scandir("/proc/self/fd") as entries:
            links = [os.readlink(entry.path) for entry in entries]
        if any(os.path.basename(link).split(" ")[0] == UVM_NODE for link in links):
            raise RuntimeError("a library initialised CUDA in the launcher, whose forked children could not use it")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serverlesslora.launcher.zygote")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "emulated"])
    parser.add_argument("--private", action="store_true", help="each worker copies the weights into its own memory")
    parser.add_argument("--lease-fd", type=int, help="what workers of this device lock for a turn")
    parser.add_argument("--spawned-at", type=float, help="of CLOCK_MONOTONIC; not given: now")
    parser.add_argument("--worker", help="module:function that is a worker's life")
    parser.add_argument("--rehearsal", help="module:function that a spare does before it waits")
    parser.add_argument("--prepare", help="module:function that maps and builds a backbone")
    options = parser.parse_args(argv)
    spawned_at = time.monotonic() if options.spawned_at is None else options.spawned_at
    cores = os.sched_getaffinity(0)  # before OpenMP pins this thread, and so what it starts, to one of them
    process.die_with_parent()
    process.leave_signals_to_the_gateway()
    process.set_name("slora-launcher")
    logs.set_up_child()
    for name, value in _environment(options.device).items():
        os.environ.setdefault(name, value)
    channel: Channel[GatewayToLauncher] = Channel.inherited(options.fd, GatewayToLauncher)
    gc.disable()  # until all is imported and built, which makes no garbage: looking for it takes a fifth of the time
    try:
        entries = (PRIVATELY_ON_CPU if options.private else ON_CPU) if options.device == "cpu" else ON_DEVICE
        build = _resolve(options.prepare or entries.prepare)
        if options.device != "cpu" and not options.prepare:
            build = functools.partial(build, kind=options.device)
        run, rehearse = _resolve(options.worker or entries.worker), _lazy(options.rehearsal or entries.rehearsal)
        if options.lease_fd is not None:
            run = functools.partial(run, lease_fd=options.lease_fd, cores=cores)
            rehearse = functools.partial(rehearse, lease_fd=options.lease_fd)
            if options.private:
                rehearse = functools.partial(rehearse, cores=cores)
        zygote = Zygote(channel, build, run, rehearse, libraries_s=time.monotonic() - spawned_at)
        return zygote.main_loop()
    except ChannelClosed:
        return 0
    except Exception as error:
        log.exception("the launcher failed")
        channel.send([LauncherFailed(reason=f"{type(error).__name__}: {error}")])
        return 1


def _environment(device: str) -> dict[str, str]:
    on_device = DEVICE_ENVIRONMENT if device != "cpu" else {}
    return ENVIRONMENT | on_device | (EMULATED_ENVIRONMENT if device == "emulated" else {})


def _lazy(entry: str) -> Callable[..., Any]:
    """Imported when it is called first, which a launcher without spares never does."""
    return lambda *arguments, **options: _resolve(entry)(*arguments, **options)


def _resolve(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
