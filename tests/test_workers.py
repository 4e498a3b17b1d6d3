"""The table of workers and the link to one, against a worker played by the test over a real socketpair."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from serverlesslora.errors import AdapterInvalid, Unavailable, WorkerLost
from serverlesslora.gateway.backbone_facts import BackboneFacts
from serverlesslora.gateway.backbone_service import BackboneStatus
from serverlesslora.gateway.worker_link import RemoteError, Stream, WorkerLink
from serverlesslora.gateway.worker_state import WorkerState
from serverlesslora.gateway.workers import Workers
from serverlesslora_ipc.channel import AsyncChannel
from serverlesslora_ipc.messages import (
    Abort,
    Aborted,
    Delta,
    Failed,
    Finished,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Loaded,
    Ready,
    Refused,
    SamplingParams,
    Shutdown,
    Spent,
    Started,
    TextPrompt,
    UnloadAdapter,
    WireError,
    WorkerToGateway,
)

BACKBONE_BYTES = 1 << 30
LOADED_BYTES = 100


class PlayedWorker:
    """The far end of a link: says what the test tells it to, remembers what it was told."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel: AsyncChannel[GatewayToWorker] = AsyncChannel(sock, GatewayToWorker)
        self.heard: list[GatewayToWorker] = []

    async def hears(self, kind: type[Any]) -> Any:
        while True:
            for message in self.heard:
                if isinstance(message, kind):
                    self.heard.remove(message)
                    return message
            self.heard += (await anext(self.channel)).messages

    def says(self, *messages: WorkerToGateway) -> None:
        self.channel.send(messages)


class PlayedService:
    """Stands where the backbone's processes would be."""

    name = "base"
    context_length = 100
    takes_requests = True
    identity: str | None = None
    size_bytes = BACKBONE_BYTES

    def __init__(self) -> None:
        self.facts = BackboneFacts()
        self.workers: list[PlayedWorker] = []
        self.forked = asyncio.Event()
        self.is_ready = True
        self.killed: list[str] = []

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        while not self.is_ready:
            await asyncio.sleep(0)

    def rest(self, unused_for_s: float = 0.0) -> bool:
        return False

    def status(self) -> BackboneStatus:
        return BackboneStatus(
            name=self.name,
            state="ready",
            sharing="memfd",
            size_bytes=BACKBONE_BYTES,
            content_digest=None,
            host_pid=None,
            launcher_pid=None,
            context_length=self.context_length,
            restarts=0,
        )

    def fork(self, domain: str, *, may_be_spare: bool = True) -> WorkerLink:
        ours, theirs = socket.socketpair()
        self.workers.append(PlayedWorker(theirs))
        self.forked.set()
        channel: AsyncChannel[WorkerToGateway] = AsyncChannel(ours, WorkerToGateway)
        worker_id = f"w{len(self.workers)}"
        return WorkerLink(
            worker_id,
            domain,
            channel,
            adapter_bytes=2 * LOADED_BYTES,
            end_process=lambda: self.killed.append(worker_id),
        )


def play(scene: Callable[[Workers, Any], Coroutine[Any, Any, None]], **settings: float) -> None:
    async def run() -> None:
        workers = Workers(**{"idle_timeout": lambda domain: 10.0, "cold_timeout_s": 5.0, **settings})  # type: ignore[arg-type]
        service = PlayedService()
        try:
            async with asyncio.timeout(10):
                await scene(workers, service)
        finally:
            for worker in service.workers:
                worker.channel.close()
            await workers.shutdown()

    asyncio.run(run())


async def ready(service: Any, count: int = 1) -> PlayedWorker:
    await service.forked.wait()
    worker: PlayedWorker = service.workers[count - 1]
    worker.says(Ready(pid=1, attach_s=0.0))
    return worker


def generate(request_id: str = "r", adapter: str | None = None) -> Generate:
    return Generate(request_id, adapter, TextPrompt("x"), SamplingParams())


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0)


def test_many_callers_one_start() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        callers = [asyncio.ensure_future(workers.place("d", service)) for _ in range(100)]
        await ready(service)
        links = {(await caller).link.worker_id for caller in callers}
        assert links == {"w1"}
        assert len(service.workers) == 1
        assert (await workers.place("d", service)).worker_s == 0.0

    play(scene)


def test_a_caller_that_leaves_does_not_stop_the_start() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        first, second = (asyncio.ensure_future(workers.place("d", service)) for _ in range(2))
        await service.forked.wait()
        first.cancel()
        await asyncio.sleep(0)
        await ready(service)
        assert (await second).link.state is WorkerState.SERVING

    play(scene)


def test_a_start_that_takes_too_long_is_unavailable_with_a_time_to_retry() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        service.is_ready = False
        with pytest.raises(Unavailable) as error:
            await workers.place("d", service)
        assert error.value.retry_after_s is not None
        assert 1 <= error.value.retry_after_s <= 60

    play(scene, cold_timeout_s=0.05)


def test_a_start_that_is_late_is_not_taken_for_ready() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        await service.forked.wait()
        link = workers.find("d")
        assert link is not None
        link.started_at = time.monotonic() + 60  # as if the backbone had taken all the time there was
        with pytest.raises(Unavailable):
            await caller
        # The worker had hardly begun: the next caller waits for it instead of getting it unready or starting another.
        caller = asyncio.ensure_future(workers.place("d", service))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not caller.done()
        await ready(service)
        assert (await caller).link.state is WorkerState.SERVING
        assert len(service.workers) == 1

    play(scene, cold_timeout_s=0.05)


def test_a_worker_stuck_in_its_start_is_killed_and_replaced() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        with pytest.raises(Unavailable):
            await workers.place("d", service)
        assert service.killed == ["w1"]
        assert workers.find("d") is None
        caller = asyncio.ensure_future(workers.place("d", service))
        await until(lambda: len(service.workers) == 2)
        await ready(service, 2)
        assert (await caller).link.worker_id == "w2"

    play(scene, cold_timeout_s=0.05)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_worker_for_one_job_does_not_stay_when_nobody_waits_for_it(leaves: bool) -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.start_alone("d", service))
        await service.forked.wait()
        if leaves:
            caller.cancel()
        with pytest.raises(asyncio.CancelledError if leaves else Unavailable):
            await caller
        await until(lambda: not list(workers))
        assert service.killed == ["w1"]

    play(scene, cold_timeout_s=5.0 if leaves else 0.05)


def test_a_worker_that_does_not_leave_is_killed() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        await ready(service)
        link = (await caller).link
        workers.retire(link)
        await until(lambda: link.state is WorkerState.GONE)
        assert service.killed == ["w1"]

    play(scene, leave_timeout_s=0.01)


def test_shutdown_leaves_no_worker_behind() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        links = []
        for count, domain in enumerate(("leaves", "stuck", "busy"), 1):
            caller = asyncio.ensure_future(workers.place(domain, service))
            await until(lambda count=count: len(service.workers) == count)  # type: ignore[misc]
            await ready(service, count)
            links.append((await caller).link)
        cut = Stream()
        links[2].submit(generate(), cut)
        stopping = asyncio.ensure_future(workers.shutdown())
        await service.workers[0].hears(Shutdown)
        service.workers[0].channel.close()
        await stopping
        assert sorted(service.killed) == ["w2", "w3"]
        assert all(link.state is WorkerState.GONE for link in links)
        with pytest.raises(WorkerLost):
            await cut.next()

    play(scene, leave_timeout_s=0.05)


def test_a_worker_that_dies_before_it_is_ready() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        await service.forked.wait()
        service.workers[0].channel.close()
        with pytest.raises(WorkerLost):
            await caller
        assert workers.find("d") is None
        # The next request simply starts another.
        caller = asyncio.ensure_future(workers.place("d", service))
        await until(lambda: len(service.workers) == 2)
        await ready(service, 2)
        assert (await caller).link.worker_id == "w2"

    play(scene)


def test_retired_workers_are_forgotten_before_they_are_told() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        workers.retire(link)
        assert workers.find("d") is None
        assert link.state is WorkerState.LEAVING
        await played.hears(Shutdown)
        played.channel.close()
        await until(lambda: link.state is WorkerState.GONE)
        assert list(workers) == []

    play(scene)


def test_only_idle_workers_are_retired() -> None:
    now = 0.0

    async def scene(workers: Workers, service: Any) -> None:
        nonlocal now
        caller = asyncio.ensure_future(workers.place("d", service))
        await ready(service)
        link = (await caller).link
        link.last_used = now
        link.submit(generate(), Stream())
        link.last_used = now
        now = 100.0
        assert workers.retire_idle() == []
        link.abort("r")
        link.last_used = 95.0
        assert workers.retire_idle() == []
        now = 106.0
        assert workers.retire_idle() == ["d"]

    play(scene, clock=lambda: now)  # type: ignore[arg-type]


def test_events_reach_their_stream_and_death_fails_it() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        done, cut = Stream(), Stream()
        link.submit(generate("done"), done)
        link.submit(generate("cut"), cut)
        played.says(Started("done", 3), Delta("done", 0, "hi"), Finished("done", 3, 1), Started("cut", 3))
        assert [type(await done.next()) for _ in range(3)] == [Started, Delta, Finished]
        assert isinstance(await cut.next(), Started)
        played.channel.close()
        with pytest.raises(WorkerLost):
            await cut.next()
        assert cut.has_started
        assert link.num_open == 0

    play(scene)


def test_what_arrived_before_a_failure_is_still_read() -> None:
    async def scene() -> None:
        stream = Stream()
        stream.put(Started("r", 1))
        stream.fail(WorkerLost("gone"))
        assert isinstance(await stream.next(), Started)
        with pytest.raises(WorkerLost):
            await stream.next()

    asyncio.run(scene())


def test_adapters_load_once_and_the_least_recently_used_leave() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link

        async def load(digest: str) -> None:
            loading = link.load(digest, "/p")
            assert link.load(digest, "/p") is loading
            assert not link.has(digest)
            assert (await played.hears(LoadAdapter)).digest == digest
            played.says(Loaded(digest, 0.1, LOADED_BYTES))
            await loading
            assert link.has(digest)

        await load("a")
        await load("b")
        link.load("a", "/p")  # used again: b is now the oldest
        link.submit(generate("busy", adapter="a"), Stream())
        await load("c")
        assert (await played.hears(UnloadAdapter)).digest == "b"
        assert link.adapters == ("a", "c")

    play(scene)


def test_an_unload_does_not_forget_who_waits_for_the_load() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        loading = link.load("a", "/p")
        link.unload("a")
        await played.hears(LoadAdapter)
        played.says(Loaded("a", 0.1, LOADED_BYTES))
        assert (await loading).digest == "a"
        assert (await played.hears(UnloadAdapter)).digest == "a"
        assert link.adapters == ()

    play(scene)


def test_a_refused_adapter_is_an_error_for_who_asked_and_can_be_tried_again() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        loading: Awaitable[Loaded] = link.load("a", "/p")
        await played.hears(LoadAdapter)
        played.says(Refused("a", "rank 0"))
        with pytest.raises(AdapterInvalid, match="rank 0"):
            await loading
        assert link.adapters == ()

    play(scene)


def test_an_abort_is_told_once_and_later_events_are_dropped() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        stream = Stream()
        link.submit(generate(), stream)
        link.abort("r")
        link.abort("r")
        assert (await played.hears(Abort)).request_id == "r"
        assert not any(isinstance(message, Abort) for message in played.heard)
        played.says(Delta("r", 0, "late"))
        assert link.num_open == 0

    play(scene)


def test_every_end_says_what_the_request_has_cost() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        streams = {name: Stream() for name in ("finished", "failed", "aborted", "unread")}
        for name, stream in streams.items():
            link.submit(generate(name), stream)
        told: list[tuple[str, Spent]] = []
        assert link.abort("aborted", lambda spent: told.append(("aborted", spent)))
        cost = Spent(
            prompt_tokens=3, completion_tokens=2, cached_tokens=1, queue_s=0.5, device_s=0.25, first_token_s=1.0
        )
        played.says(
            Aborted("aborted", cost),
            Failed("failed", WireError(500, "broken"), cost),
            Finished("finished", 3, 2, 1, 0.5, 0.25, 1.0),
            Finished("unread", 3, 2, 1, 0.5, 0.25, 1.0),
        )
        end = await streams["finished"].next()
        assert isinstance(end, Finished)
        assert end.spent == streams["finished"].spent == cost
        with pytest.raises(RemoteError) as failure:
            await streams["failed"].next()
        assert failure.value.spent == streams["failed"].spent == cost
        assert told == [("aborted", cost)]
        # A client that left before it had read the end: there is nothing to abort, and its cost is known.
        assert not link.abort("unread", lambda spent: told.append(("unread", spent)))
        assert streams["unread"].spent == cost
        assert len(told) == 1

    play(scene)


@pytest.mark.parametrize("end", [Finished("r", 3, 2, device_s=0.25), Failed("r", WireError(500, ""), Spent(3, 2))])
def test_an_end_that_crosses_its_abort_tells_the_cost(end: Finished | Failed) -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        link.submit(generate(), Stream())
        told: list[Spent] = []
        played.says(Started("r", 3), end)
        assert link.abort("r", told.append)
        await until(lambda: bool(told))
        played.channel.close()
        await until(lambda: link.state is WorkerState.GONE)
        assert told == [end.spent], "once"

    play(scene)


def test_a_worker_that_dies_owes_the_cost_of_what_was_aborted() -> None:
    async def scene(workers: Workers, service: Any) -> None:
        caller = asyncio.ensure_future(workers.place("d", service))
        played = await ready(service)
        link = (await caller).link
        cut = Stream()
        link.submit(generate("aborted"), Stream())
        link.submit(generate("cut"), cut)
        told: list[Spent] = []
        link.abort("aborted", told.append)
        played.channel.close()
        with pytest.raises(WorkerLost):
            await cut.next()
        assert told == [Spent()]
        assert cut.spent is None, "nobody knows"

    play(scene)
