"""The life of one worker: read what the gateway asks, step the engine under the device lease, send what came out.

The main thread computes; a second thread only reads the channel, so that an abort or the gateway's death is seen
while a step runs, and a third compiles grammars. When the channel ends the process ends: a worker never outlives its
gateway.

A turn on the device is one step, whatever is in it: a worker that only decodes and one with a long prompt take turns
like for like. While others want the device a step takes few prompt tokens, so that all of them come round soon.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec
import torch

from serverlesslora.engine.adapters import AdapterRead
from serverlesslora.engine.engine import FORGET_AFTER_S, Engine
from serverlesslora.launcher.prepared import PreparedBackbone, warm_up
from serverlesslora.worker.compiling import Compiling, GrammarRead
from serverlesslora.worker.lease import DeviceLease
from serverlesslora_ipc import sealed
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.messages import (
    Abort,
    Aborted,
    Fork,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Ready,
    Shutdown,
    Stats,
    UnloadAdapter,
    WorkerLimits,
    WorkerToGateway,
)

log = logging.getLogger("serverlesslora.worker")

STATS_INTERVAL_S = 0.25
REST_AFTER_S = 1.0  # a pause shorter than this is part of a conversation: its memory will be wanted again
STARVED_PAUSE_S = 0.02  # between two attempts to get memory that other workers hold
# Of one step while others wait for the device: few enough that their next tokens come soon, enough to be computed by
# blocked matrix products (more than the native kernels take), or a short step is no shorter than a long one.
CONTENDED_STEP_TOKENS = 96
LEASE_VARIABLE = "SERVERLESSLORA_LEASE"  # "off": no turns, to measure what they are worth (bench/lease.py)


Arrival = GatewayToWorker | AdapterRead | GrammarRead


class Worker:
    def __init__(
        self, channel: Channel[GatewayToWorker], engine: Engine, lease: DeviceLease, clock: Callable[[], float]
    ) -> None:
        self._channel = channel
        self._engine = engine
        self._lease = lease
        self._clock = clock
        self._inbox: queue.SimpleQueue[Sequence[Arrival]] = queue.SimpleQueue()
        self._arrived: deque[Arrival] = deque()
        self._loading: queue.SimpleQueue[LoadAdapter] = queue.SimpleQueue()
        self._compiling = Compiling(lambda read: self._inbox.put([read]))
        self._uncompiled: dict[str, Generate] = {}  # requests whose grammars are being compiled
        self._unloads: list[UnloadAdapter] = []  # that came after them
        self._stats_sent_at = float("-inf")
        self._last_stats: Stats | None = None
        self._lease_wait_s = 0.0
        self._leaving = False

    def main_loop(self) -> None:
        while not self._leaving:
            self._receive()
            if said := self._engine.drain():  # nobody waits for a turn to hear of a refusal
                self._channel.send(said)
            if self._engine.has_work:
                self._step()
            self._report()

    def _step(self) -> None:
        with self._lease.turn() as waited_s:
            self._lease_wait_s += waited_s
            # Who came while the turn was waited for takes part; but reading an adapter may take long.
            self._handle_arrived(until=LoadAdapter)
            max_tokens = CONTENDED_STEP_TOKENS if self._lease.is_contended() else None
            out = self._engine.step(max_tokens)
        if out:
            self._channel.send(out)

    def read(self) -> None:
        """The reader thread: it ends with the process."""
        try:
            while True:
                self._inbox.put(self._channel.receive().messages)
        except ChannelClosed:
            # The gateway is gone: nobody wants what the running step computes.
            os._exit(0)
        except BaseException:
            # A worker that no longer hears would keep its requests waiting for ever.
            log.exception("a message could not be read")
            os._exit(1)

    def load(self) -> None:
        """The loader thread, where the device allows one: it reads adapters while steps run. Ends with the process."""
        try:
            with torch.inference_mode():
                while True:
                    self._inbox.put([self._engine.read_adapter(self._loading.get())])
        except BaseException:
            log.exception("an adapter could not be read")
            os._exit(1)

    def compile(self) -> None:
        """The compiler thread. Ends with the process."""
        self._compiling.loop()

    def _receive(self) -> None:
        """Take everything that has arrived; wait for something only when there is nothing to compute."""
        if not self._engine.has_work:
            self._report(final=True)
            if not self._arrived:
                self._arrived.extend(self._rest())
        elif self._engine.is_starved:
            with contextlib.suppress(queue.Empty):
                self._arrived.extend(self._inbox.get(timeout=STARVED_PAUSE_S))
        self._handle_arrived()

    def _rest(self) -> Sequence[Arrival]:
        """What arrives next; while nothing does, memory goes back to the device step by step."""
        idle_s = 0.0
        for pause_s in (REST_AFTER_S, FORGET_AFTER_S - REST_AFTER_S):
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=pause_s)
            idle_s += pause_s
            self._engine.rest(idle_s)
            self._report(final=True)
        return self._inbox.get()

    def _handle_arrived(self, *, until: type[LoadAdapter] | None = None) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._arrived.extend(self._inbox.get_nowait())
        while self._arrived and (until is None or not isinstance(self._arrived[0], until)):
            match message := self._arrived.popleft():
                case Generate():
                    self._submit(message)
                case GrammarRead():
                    self._go_on(message)
                case Abort() if message.request_id in self._uncompiled:
                    del self._uncompiled[message.request_id]
                    self._send(Aborted(message.request_id))
                case Abort():
                    self._engine.abort(message.request_id)
                case LoadAdapter() if self._engine.loads_aside and self._engine.has_work:
                    self._loading.put(message)
                case LoadAdapter():
                    self._send(self._engine.load_adapter(message))
                case AdapterRead():
                    self._send(self._engine.admit(message))
                case UnloadAdapter() if self._uncompiled:
                    self._unloads.append(message)
                case UnloadAdapter():
                    self._engine.unload_adapter(message.digest)
                case Shutdown():
                    self._leaving = True

    def _submit(self, message: Generate) -> None:
        grammar, text = message.sampling.grammar, self._engine.codec_of(message.adapter)
        if grammar is None or text is None:
            self._engine.submit(message)
            return
        self._uncompiled[message.request_id] = message
        self._compiling.put(message, functools.partial(self._engine.grammars.compile, grammar, text))

    def _go_on(self, read: GrammarRead) -> None:
        """The request with its grammar, unless it was aborted while it had none."""
        if self._uncompiled.pop(read.message.request_id, None) is not None:
            self._engine.submit(read.message, read.grammar)
        if not self._uncompiled:
            for message in self._unloads:
                self._engine.unload_adapter(message.digest)
            self._unloads.clear()

    def _send(self, message: WorkerToGateway) -> None:
        self._channel.send([message])

    def _report(self, *, final: bool = False) -> None:
        """Send Stats when they changed: at once before falling idle, else at most every STATS_INTERVAL_S."""
        now = self._clock()
        if not final and now - self._stats_sent_at < STATS_INTERVAL_S:
            return
        stats = msgspec.structs.replace(self._engine.stats(), lease_wait_s=self._lease_wait_s)
        if stats != self._last_stats:
            self._send(stats)
            self._last_stats, self._stats_sent_at = stats, now


def open_lease(fd: int | None) -> DeviceLease:
    return DeviceLease(None if os.environ.get(LEASE_VARIABLE) == "off" else fd)


def rehearse(prepared: PreparedBackbone, limits: WorkerLimits, *, lease_fd: int | None = None) -> PreparedBackbone:
    """What a spare does before it has a domain: its thread pool, its page tables and one answer nobody hears."""
    torch.set_num_threads(limits.threads)
    assert prepared.weights is not None
    sealed.populate(prepared.weights)
    lease = open_lease(lease_fd)
    with lease.turn():
        warm_up(prepared, threads=limits.threads)
    lease.close()
    return dataclasses.replace(prepared, is_rehearsed=True)


@contextlib.contextmanager
def _on(cores: Collection[int]) -> Iterator[None]:
    """Threads started inside may run on all `cores`, not only where OpenMP has pinned their creator."""
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or pinned)
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


def run(
    connection: socket.socket,
    prepared: PreparedBackbone,
    fork: Fork,
    *,
    lease_fd: int | None = None,
    cores: Collection[int] = (),
    started: float | None = None,
) -> int:
    """Entry point of a freshly forked worker; returns the exit code of the process.

    `started`: when it began to attach, if that was before this call.
    """
    started = time.monotonic() if started is None else started
    torch.set_num_threads(fork.limits.threads)
    channel: Channel[GatewayToWorker] = Channel(connection, GatewayToWorker)
    engine = prepared.engine_for(fork.limits)
    engine.start_counting()
    ready = Ready(
        pid=os.getpid(),
        attach_s=time.monotonic() - started,
        libraries_s=prepared.libraries_s,
        load_s=prepared.load_s,
        copy_s=prepared.copy_s,
        was_spare=prepared.is_rehearsed,
        device=prepared.device_name,
        graphs="" if prepared.device.kind == "cpu" else engine.graphs_state,
    )
    channel.send([ready])
    worker = Worker(channel, engine, open_lease(lease_fd), time.monotonic)
    with _on(cores):
        threading.Thread(target=worker.read, name="reader", daemon=True).start()
        threading.Thread(target=worker.compile, name="compiler", daemon=True).start()
        if engine.loads_aside:
            threading.Thread(target=worker.load, name="loader", daemon=True).start()
        if prepared.weights is not None and not prepared.is_rehearsed:
            # Page tables are not inherited for shared file mappings: fill them while the first request is on its way.
            threading.Thread(target=sealed.populate, args=(prepared.weights,), name="populate", daemon=True).start()
    try:
        with torch.inference_mode():
            worker.main_loop()
    except ChannelClosed:
        return 0
    except Exception:
        log.exception("worker of domain %s failed", fork.domain)
        return 1
    return 0
