"""Channels over real socket pairs: order, descriptors, ends of streams, a sender faster than its receiver."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from serverlesslora_ipc.channel import AsyncChannel, Channel, ChannelClosed
from serverlesslora_ipc.frames import HEADER, FrameError
from serverlesslora_ipc.messages import (
    Abort,
    Attach,
    GatewayToHost,
    GatewayToWorker,
    Generate,
    SamplingParams,
    Shutdown,
    TextPrompt,
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    # The pair of the test itself may still be open: fixtures end in reverse order.
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def request(name: str, size: int = 10) -> Generate:
    return Generate(request_id=name, adapter=None, prompt=TextPrompt(text="x" * size), sampling=SamplingParams())


def memory(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def content(fd: int) -> bytes:
    data = os.pread(fd, 100, 0)
    os.close(fd)
    return data


def test_messages_arrive_in_order_both_ways(pair: Pair) -> None:
    left: Channel[GatewayToWorker] = Channel(pair[0], GatewayToWorker)
    right: Channel[GatewayToWorker] = Channel(pair[1], GatewayToWorker)
    for i in range(100):
        left.send([request(f"{i}"), Abort(request_id=f"{i}")])
    right.send([Shutdown()])
    for i in range(100):
        assert right.receive().messages == [request(f"{i}"), Abort(request_id=f"{i}")]
    assert left.receive().messages == [Shutdown()]


def test_descriptors_stay_with_their_frame(pair: Pair) -> None:
    left: Channel[GatewayToHost] = Channel(pair[0], GatewayToHost)
    right: Channel[GatewayToHost] = Channel(pair[1], GatewayToHost)
    for i in range(20):  # all written before anything is read, with frames without descriptors between
        fds = [memory(b"%d-%d" % (i, j)) for j in range(i % 3)]
        left.send([Attach()], fds)
        for fd in fds:
            os.close(fd)
    for i in range(20):
        assert [content(fd) for fd in right.receive().fds] == [b"%d-%d" % (i, j) for j in range(i % 3)]


def test_received_descriptors_are_not_inherited(pair: Pair) -> None:
    left: Channel[GatewayToHost] = Channel(pair[0], GatewayToHost)
    right: Channel[GatewayToHost] = Channel(pair[1], GatewayToHost)
    fd = memory(b"")
    left.send([Attach()], [fd])
    os.close(fd)
    (received,) = right.receive().fds
    assert not os.get_inheritable(received)
    os.close(received)


def test_poll_is_true_for_whole_frames_only(pair: Pair) -> None:
    left: Channel[GatewayToWorker] = Channel(pair[0], GatewayToWorker)
    assert not left.poll()
    pair[1].send(HEADER.pack(1, 0))
    assert not left.poll(0.01)
    pair[1].send(b"\x90")
    assert left.poll()
    assert left.receive().messages == []
    pair[1].close()
    assert left.poll(), "the end of the stream is something to receive"


def test_end_of_stream(pair: Pair) -> None:
    left: Channel[GatewayToWorker] = Channel(pair[0], GatewayToWorker)
    right: Channel[GatewayToWorker] = Channel(pair[1], GatewayToWorker)
    left.send([Shutdown()])
    left.close()
    assert right.receive().messages == [Shutdown()], "what was sent before the end is still received"
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            right.receive()
    with pytest.raises(ChannelClosed):
        right.send([Shutdown()])


def test_a_frame_cut_by_the_end_is_the_end(pair: Pair) -> None:
    right: Channel[GatewayToWorker] = Channel(pair[1], GatewayToWorker)
    pair[0].send(HEADER.pack(1000, 0) + b"abc")
    pair[0].close()
    with pytest.raises(ChannelClosed):
        right.receive()


def test_garbage(pair: Pair) -> None:
    right: Channel[GatewayToWorker] = Channel(pair[1], GatewayToWorker)
    pair[0].send(b"\xff" * 100)
    with pytest.raises(FrameError):
        right.receive()


def test_more_descriptors_than_allowed(pair: Pair) -> None:
    right: Channel[GatewayToHost] = Channel(pair[1], GatewayToHost, max_fds=0)
    socket.send_fds(pair[0], [HEADER.pack(1, 1) + b"\x90"], [0])
    with pytest.raises(FrameError, match="more descriptors"):
        right.receive()


def test_threads_share_a_sender(pair: Pair) -> None:
    left: Channel[GatewayToWorker] = Channel(pair[0], GatewayToWorker)
    right: Channel[GatewayToWorker] = Channel(pair[1], GatewayToWorker)
    large = 300_000  # several times what the kernel takes at once

    def send(name: str) -> None:
        for _ in range(5):
            left.send([request(name, large)])

    threads = [threading.Thread(target=send, args=(f"{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    received = [right.receive().messages[0] for _ in range(20)]
    for thread in threads:
        thread.join()
    assert sorted(m.request_id for m in received if isinstance(m, Generate)) == sorted("0123" * 5)


# --- the event loop's twin ---------------------------------------------------------------------------------------


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    factory = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run


Run = Callable[[Awaitable[None]], None]


def test_async_both_ways(pair: Pair, run: Run) -> None:
    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker)
        right: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[1], GatewayToWorker)
        for i in range(2000):
            left.send([request(f"{i}")])
        frames: AsyncIterator[Any] = aiter(right)
        for i in range(2000):
            assert (await anext(frames)).messages == [request(f"{i}")]
        right.send([Shutdown()])
        assert (await anext(left)).messages == [Shutdown()]
        left.close()
        assert [frame async for frame in right] == []
        assert right.closed
        with pytest.raises(ChannelClosed):
            right.send([Shutdown()])
        right.close()
        right.close()

    run(main())


def test_async_send_never_waits_and_loses_nothing(pair: Pair, run: Run) -> None:
    received: list[str] = []

    def receive() -> None:
        right: Channel[GatewayToHost | Generate] = Channel(pair[1], GatewayToHost | Generate)
        for _ in range(60):
            messages, fds = right.receive()
            for message in messages:
                assert isinstance(message, Generate)
                assert [content(fd).decode() for fd in fds] == [message.request_id]
                received.append(message.request_id)
        right.close()

    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker)
        for i in range(60):  # nobody reads yet: 12 MB have to wait, each frame with its descriptor
            fd = memory(b"%d" % i)
            left.send([request(f"{i}", 200_000)], [fd])
            os.close(fd)
        assert left.unsent_bytes > 10_000_000
        thread = threading.Thread(target=receive)
        thread.start()
        assert [frame async for frame in left] == []  # ends when the thread has everything and closes
        thread.join()
        left.close()

    run(main())
    assert received == [f"{i}" for i in range(60)]


def test_async_gives_up_on_a_peer_that_never_reads(pair: Pair, run: Run) -> None:
    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker, max_unsent_bytes=1_000_000)
        while left.unsent_bytes < 850_000:
            left.send([request("r", 100_000)])
        with pytest.raises(ChannelClosed, match="unread"):
            left.send([request("r", 200_000)])
        assert [frame async for frame in left] == []
        left.close()

    run(main())


def test_async_reads_no_further_than_it_is_iterated(pair: Pair, run: Run) -> None:
    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker)
        right: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[1], GatewayToWorker)
        for i in range(3000):
            left.send([request(f"{i}", 2000)])
        await anext(right)
        for _ in range(100):  # the loop turns, but nobody iterates
            await asyncio.sleep(0)
        assert left.unsent_bytes > 0
        assert [(await anext(right)).messages for _ in range(2999)][-1] == [request("2999", 2000)]
        left.close()
        right.close()

    run(main())


def test_async_garbage_and_descriptors(pair: Pair, run: Run) -> None:
    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker)
        socket.send_fds(pair[1], [HEADER.pack(1, 1) + b"\x90"], [0])
        with pytest.raises(FrameError, match="more descriptors"):
            await anext(left)
        assert left.closed
        left.close()

    run(main())


def test_async_messages_sent_before_the_peer_died_are_received(pair: Pair, run: Run) -> None:
    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker)
        right: Channel[GatewayToWorker] = Channel(pair[1], GatewayToWorker)
        right.send([Abort(request_id="last words")])
        right.close()
        left.send([Shutdown()])  # the loop has not been told of the end yet
        assert [frame.messages async for frame in left] == [[Abort(request_id="last words")]]
        left.close()

    run(main())


def test_closing_wakes_the_iterating_task(pair: Pair, run: Run) -> None:
    async def main() -> None:
        left: AsyncChannel[GatewayToWorker] = AsyncChannel(pair[0], GatewayToWorker)

        async def iterate() -> int:
            return len([frame async for frame in left])

        task = asyncio.create_task(iterate())
        await asyncio.sleep(0)
        left.close()
        assert await task == 0

    run(main())
