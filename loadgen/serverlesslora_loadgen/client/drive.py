"""Sending a whole plan: client processes started together, watched, and their records put in order.

Every planned request is in the result exactly once. What a process did not report because it died, or had to be
killed, is `unsent` with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

import serverlesslora_loadgen
from serverlesslora_loadgen.client import frames
from serverlesslora_loadgen.client.address import head_of, header_lines
from serverlesslora_loadgen.client.process import unsent
from serverlesslora_loadgen.client.stream import shorten
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.plan import Job, Planned, Target
from serverlesslora_loadgen.record import UNKNOWN, WARM, Record

READY_S = 120.0  # for a process to have read its requests
SILENCE_S = 60.0  # without any frame; counts come twice a second
MARGIN_S = 0.05  # from telling all processes the time of the start to the start
STDERR_LINES = 5
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
STDERR_BYTES = 1 << 12  # kept of the end of what a process complains about


class Progress(NamedTuple):
    """So far; `sent` are those that left, `done` those that have ended, in whatever way."""

    elapsed_s: float
    total: int
    sent: int
    done: int
    ok: int
    shed: int
    failed: int
    in_flight: int


class Driven(NamedTuple):
    records: list[Record]  # in the order of their ids
    began_at: float  # time.monotonic: where the stamps of the records count from
    began_unix: float
    seconds: float  # until the last answer ended
    cpu_s: float  # of all client processes, from start to end
    processes: int
    late_sockets: int
    interrupted: bool = False


async def drive(
    target: Target,
    planned: Sequence[Planned],
    *,
    processes: int = 1,
    concurrency: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Driven:
    """`concurrency`: closed loop, that many at a time, times ignored. An interrupt (Ctrl-C, SIGTERM) ends the
    run early.

    Raises TargetError when the target is no address, or a header none. A server that cannot be reached shows in the
    records.
    """
    if concurrency is not None and concurrency < 1:
        raise LoadgenError(f"{concurrency} requests at a time are none; a closed loop needs at least 1")
    head_of(target)  # what is wrong with the address or a header is said before anything is started
    for request in planned:
        header_lines(request.headers)
    ordered = sorted(planned, key=lambda request: request.at_s)
    count = max(1, min(processes, len(ordered), concurrency or processes))
    children = [
        Child(number, Job(target=target, requests=requests, concurrency=share))
        for number, (requests, share) in enumerate(deal(ordered, concurrency, count))
    ]
    try:
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(child.startup())
        with interrupts(children):
            began_at = time.monotonic() + MARGIN_S
            began_unix = time.time() + MARGIN_S
            meter = Meter(len(ordered), began_at, children, on_progress)
            async with asyncio.TaskGroup() as group:
                for child in children:
                    group.create_task(child.main_loop(began_at, meter))
        meter()
    finally:
        for child in children:
            child.kill("was ended")  # all of them first, whatever happens while they are waited for
        await asyncio.gather(*(child.shutdown() for child in children))
    records = settle_cold([record for child in children for record in child.complete()])
    ended_at = max((child.report.ended_at for child in children if child.report), default=time.monotonic())
    reports = [child.report for child in children if child.report]
    return Driven(
        records=sorted(records, key=lambda record: record.id),
        began_at=began_at,
        began_unix=began_unix,
        seconds=max(0.0, ended_at - began_at),
        cpu_s=sum(report.cpu_s for report in reports),
        processes=count,
        late_sockets=sum(report.late_sockets for report in reports),
        interrupted=any(report.interrupted for report in reports),
    )


def deal(
    ordered: Sequence[Planned], concurrency: int | None, count: int
) -> list[tuple[tuple[Planned, ...], int | None]]:
    """Requests round robin. In a closed loop who may have more at a time gets more, so that all end together."""
    if concurrency is None:
        return [(tuple(ordered[number::count]), None) for number in range(count)]
    hands = [concurrency // count + (number < concurrency % count) for number in range(count)]
    dealt: list[list[Planned]] = [[] for _ in hands]
    for position, request in enumerate(ordered):
        dealt[position % concurrency % count].append(request)
    return [(tuple(requests), hand) for requests, hand in zip(dealt, hands, strict=True)]


def settle_cold(records: Sequence[Record]) -> list[Record]:
    """A server that tells of cold starts at all means by silence that there was none."""
    if all(record.cold == UNKNOWN for record in records):
        return list(records)
    return [
        msgspec.structs.replace(record, cold=WARM) if record.cold == UNKNOWN and record.status == 200 else record
        for record in records
    ]


class Child:
    """A client process as seen from here."""

    def __init__(self, number: int, job: Job) -> None:
        self.number = number
        self.count = frames.Count()
        self.report: frames.Report | None = None
        self._job = job
        self._records: dict[int, Record] = {}
        self._splitter = frames.Splitter()
        self._stderr = b""
        self._listening: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready = False
        self._why = ""
        self._on_count: Callable[[], None] = lambda: None

    async def startup(self) -> None:
        """Until it is ready, or is not going to be."""
        package = Path(serverlesslora_loadgen.__file__).parent.parent
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # what lies in the folder somebody happens to be in must not be imported
            "-m",
            "serverlesslora_loadgen.client.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C comes to one process, which passes it on
        )
        assert self._process.stdin is not None and self._process.stderr is not None
        self._listening = asyncio.create_task(self._listen(self._process.stderr))
        try:
            async with asyncio.timeout(READY_S):
                self._process.stdin.write(frames.encode(self._job))
                with contextlib.suppress(ConnectionError):
                    await self._process.stdin.drain()
                while not self._ready and await self._read():
                    pass
        except TimeoutError:
            self.kill(f"was not ready after {READY_S:g} s")

    async def main_loop(self, start_at: float, on_count: Callable[[], None]) -> None:
        """Until it has reported, or will not any more."""
        self._on_count = on_count
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(frames.START.pack(start_at))
            await self._process.stdin.drain()
        try:
            while True:
                silence_s = SILENCE_S + max(0.0, start_at - time.monotonic())
                async with asyncio.timeout(silence_s):
                    if not await self._read():
                        break
        except TimeoutError:
            self.kill(f"said nothing for {SILENCE_S:g} s")
        self._process.stdin.close()
        code = await self._end()
        if self.report is None and not self._why:
            lines = self._stderr.decode(errors="replace").splitlines()[-STDERR_LINES:]
            self._why = "; ".join([f"ended with code {code}", *(shorten(line) for line in lines)])

    def interrupt(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)

    async def shutdown(self) -> None:
        """Nothing is left running, also when this is left by an exception."""
        self.kill("was ended")
        if self._process is not None:
            await self._end()

    def kill(self, why: str) -> None:
        if self._process is not None and self._process.returncode is None:
            self._why = self._why or why
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def complete(self) -> list[Record]:
        why = f"client process {self.number} {self._why or 'did not report it'}"
        return [self._records.get(planned.id) or unsent(planned, why) for planned in self._job.requests]

    async def _read(self) -> bool:
        assert self._process is not None and self._process.stdout is not None
        data = await self._process.stdout.read(1 << 18)
        for frame in self._splitter.feed(data):
            match frames.decode(frame):
                case frames.Done(record):
                    self._records[record.id] = record
                case frames.Count() as count:
                    self.count = count
                    self._on_count()
                case frames.Report() as report:
                    self.report = report
                case frames.Ready():
                    self._ready = True
        return bool(data)

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        while data := await stderr.read(1 << 16):
            self._stderr = (self._stderr + data)[-STDERR_BYTES:]

    async def _end(self) -> int:
        """Its exit code. A process counts as ended when its pipes are, too, and those end when somebody reads them."""
        assert self._process is not None and self._process.stdout is not None and self._listening is not None
        while await self._process.stdout.read(1 << 18):
            pass
        await asyncio.wait([self._listening])  # who gives up on this must not end it
        return await self._process.wait()


class Meter:
    """Counts of all processes together, told whenever one has told its own."""

    def __init__(
        self, total: int, began_at: float, children: Sequence[Child], on_progress: Callable[[Progress], None]
    ) -> None:
        self._total, self._began_at = total, began_at
        self._children, self._on_progress = children, on_progress

    def __call__(self) -> None:
        counts = [child.count for child in self._children]
        progress = Progress(
            elapsed_s=max(0.0, time.monotonic() - self._began_at),
            total=self._total,
            sent=sum(count.sent for count in counts),
            done=sum(count.ok + count.shed + count.failed + count.unsent for count in counts),
            ok=sum(count.ok for count in counts),
            shed=sum(count.shed for count in counts),
            failed=sum(count.failed for count in counts),
            in_flight=sum(count.in_flight for count in counts),
        )
        self._on_progress(progress)


@contextlib.contextmanager
def interrupts(children: Sequence[Child]) -> Iterator[None]:
    """Ctrl-C, and SIGTERM as sent by what gives up on a job, go to the client processes, which then report.

    Only the main thread can be asked to."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in INTERRUPTS}

    def interrupt() -> None:
        for child in children:
            child.interrupt()

    try:
        for number in INTERRUPTS:
            loop.add_signal_handler(number, interrupt)
    except (ValueError, RuntimeError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
