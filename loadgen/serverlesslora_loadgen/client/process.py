"""One client process: `python -m serverlesslora_loadgen.client.process`, a job on stdin, frames on stdout.

An interrupt (SIGINT, SIGTERM) stops the sending: what has not left is reported as unsent, what is under way has
`GRACE_S` to end. A second one, or the end of stdin, ends everything at once. The report comes in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import time

import uvloop

from serverlesslora_loadgen.client import frames
from serverlesslora_loadgen.client.alarm import Alarm
from serverlesslora_loadgen.client.connection import Client
from serverlesslora_loadgen.client.pacing import ClosedLoop, OpenLoop, Pacer
from serverlesslora_loadgen.client.stream import spoilt
from serverlesslora_loadgen.client.verdict import Ending
from serverlesslora_loadgen.plan import Job, Planned
from serverlesslora_loadgen.record import Record

COUNT_EVERY_S = 0.5
GRACE_S = 5.0
AFTER_DONE_S = 0.05  # in a closed loop, where nobody else is asked before the answer is over
FLUSH_BYTES = 1 << 16


class Outbox:
    """Frames to the process that started this one. Writing never waits: records are encoded as they come, one by one,
    so that there is no moment at which many are."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._buffer = bytearray()

    def put(self, frame: frames.Frame, *, flush: bool = False) -> None:
        self._buffer += frames.encode(frame)
        if flush or len(self._buffer) >= FLUSH_BYTES:
            self._transport.write(bytes(self._buffer))
            self._buffer.clear()


class Work:
    """A job being done: from the start that is told to the last record."""

    def __init__(self, job: Job, outbox: Outbox) -> None:
        self._job, self._outbox = job, outbox
        after_done_s = None if job.concurrency is None else AFTER_DONE_S
        self._client = Client(job.target, self._ended, after_done_s=after_done_s)
        self._alarm = Alarm(self._wake)
        self._left = len(job.requests)
        self._start_at = 0.0
        self._sent = 0
        self._by_outcome = {"ok": 0, "shed": 0, "failed": 0, "unsent": 0}
        self._pacer: Pacer | None = None
        self._over = asyncio.Event()
        self._interrupts = 0
        self.started = asyncio.Event()

    async def startup(self) -> None:
        await self._client.resolve()

    def start(self, start_at: float) -> None:
        self._start_at = self._client.start_at = start_at
        requests, now = self._job.requests, self._client.now
        if self._interrupts:
            self._unsent(range(len(requests)))
        elif self._job.concurrency is None:
            times = [start_at + request.at_s for request in requests]
            self._pacer = OpenLoop(times, self._send, now=now, wake_at=self._alarm.set)
        else:
            self._pacer = ClosedLoop(
                len(requests),
                self._send,
                concurrency=self._job.concurrency,
                start_at=start_at,
                now=now,
                wake_at=self._alarm.set,
            )
        if self._pacer is not None:
            self._pacer.start()
        if self._left == 0:
            self._over.set()
        self.started.set()

    async def main_loop(self) -> None:
        """Until every request has its record."""
        target = self._job.target
        sweep_s = max(0.05, min(1.0, target.timeout_s / 10, target.stall_s / 10))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._sweep(sweep_s)), group.create_task(self._count())]
            await self._over.wait()
            for task in tasks:
                task.cancel()

    def shutdown(self) -> None:
        self._client.close()
        self._alarm.close()

    def interrupt(self) -> None:
        self._interrupts += 1
        if self._pacer is not None:
            self._unsent(self._pacer.stop())
        if self._interrupts > 1:
            self._client.interrupt()
        else:
            asyncio.get_running_loop().call_later(GRACE_S, self._client.interrupt)

    def abandon(self) -> None:
        self.interrupt()
        self._client.interrupt()

    def count(self) -> None:
        counts = frames.Count(sent=self._sent, in_flight=self._client.in_flight, **self._by_outcome)
        self._outbox.put(counts, flush=True)

    @property
    def was_interrupted(self) -> bool:
        return self._interrupts > 0

    @property
    def late_sockets(self) -> int:
        return self._client.late_sockets

    # --- one request

    def _wake(self) -> None:
        assert self._pacer is not None
        self._pacer.wake()

    def _send(self, index: int, intended: float) -> None:
        self._sent += 1
        self._client.send(self._job.requests[index], intended)

    def _ended(self, record: Record, _: str) -> None:
        try:
            self._outbox.put(frames.Done(record))
        except Exception as error:  # a record that cannot be told would be waited for without end
            record = spoilt(
                record,
                error,
                intended_s=record.intended_s,
                started_s=record.started_s,
                connected_s=record.connected_s,
                written_s=record.written_s,
                done_s=record.done_s,
            )
            self._outbox.put(frames.Done(record))
        self._by_outcome[record.outcome] += 1
        self._left -= 1
        if self._left == 0:
            self._over.set()
        elif self._pacer is not None:
            self._pacer.done()

    def _unsent(self, indices: range) -> None:
        for index in indices:
            self._ended(unsent(self._job.requests[index], Ending.INTERRUPTED.value), "")

    # --- every now and then

    async def _sweep(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            self._client.sweep()

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            self.count()


def unsent(planned: Planned, why: str) -> Record:
    return Record(
        id=planned.id,
        model=planned.model,
        class_=planned.class_,
        intended_s=planned.at_s,
        outcome="unsent",
        detail=why,
        input_tokens=planned.input_tokens,
        deadline_s=planned.deadline_s,
    )


class Orders(asyncio.Protocol):
    """stdin: the time to start at, and then nothing until whoever gave the job goes away."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) >= frames.START.size and not self._work.started.is_set():
            self._work.start(frames.START.unpack_from(self._data)[0])

    def connection_lost(self, _: Exception | None) -> None:
        if not self._work.started.is_set():
            self._work.start(time.monotonic())
        self._work.abandon()


class Flushed(asyncio.Protocol):
    """Tells when everything written has left, or cannot any more."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    def connection_lost(self, _: Exception | None) -> None:
        self.closed.set()


async def run(job: Job, stdout: int) -> None:
    loop = asyncio.get_running_loop()
    transport, flushed = await loop.connect_write_pipe(Flushed, os.fdopen(stdout, "wb", buffering=0))
    outbox = Outbox(transport)
    work = Work(job, outbox)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.interrupt)
    await work.startup()
    # The collector stops everything for longer than a request may be late. Whatever lives by now is no garbage, and
    # a run leaves no cycles behind.
    gc.collect()
    gc.freeze()
    gc.disable()
    outbox.put(frames.Ready(), flush=True)
    orders, _ = await loop.connect_read_pipe(lambda: Orders(work), os.fdopen(0, "rb", buffering=0, closefd=False))
    await work.started.wait()
    cpu_before = time.process_time()
    try:
        await work.main_loop()
    finally:
        ended_at = time.monotonic()
        work.shutdown()
    work.count()
    report = frames.Report(
        ended_at=ended_at,
        cpu_s=time.process_time() - cpu_before,
        late_sockets=work.late_sockets,
        interrupted=work.was_interrupted,
    )
    outbox.put(report, flush=True)
    transport.close()
    await flushed.closed.wait()
    orders.close()


def main() -> None:
    stdout = os.dup(1)
    os.dup2(2, 1)  # nothing else may get between the frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until there is somebody to report to
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request may need a connection of its own
    try:
        job = frames.read_job(0)
    except EOFError:
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(job, stdout))


if __name__ == "__main__":
    main()
