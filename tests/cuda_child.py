"""Processes for the tests of device memory: `python -m tests.cuda_child <role> <driver> <channel fd> <arguments>`.

Roles: `host` publishes a pattern in steps, each announced and waited for; `worker` attaches to what it is sent;
`elastic` holds a range of chunks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import xxhash

from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.cuda.elastic import ElasticRange
from serverlesslora_ipc.cuda.region import Publication, RegionDraft, attach
from serverlesslora_ipc.messages import (
    Attach,
    GatewayToHost,
    HostToGateway,
    Message,
    Progress,
    Published,
    Verified,
    Verify,
)


class Write(Message, frozen=True):
    """Write one byte at this offset of the memory; answered by Verified if the process lives."""

    offset: int


class Chunk(Message, frozen=True):
    """Map, unmap or touch a chunk; answered by Progress(resident bytes, address)."""

    index: int
    action: str


ToChild = GatewayToHost | Published | Write | Chunk
DEADLINE_S = 30.0


class Child:
    """The parent's side: starts the process, talks to it, and sees how it ends."""

    def __init__(self, role: str, kind: str, *numbers: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cuda_child", role, kind, str(theirs.fileno()), *map(str, numbers)],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.channel: Channel[Any] = Channel(ours, HostToGateway)

    def ask(self, message: Any, fds: tuple[int, ...] = ()) -> Any:
        self.channel.send([message], fds)
        return self.answer()

    def answer(self) -> Any:
        assert self.channel.poll(DEADLINE_S), "the child is silent"
        return self.channel.receive().messages[0]

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(DEADLINE_S) == -signal.SIGKILL

    def dies_of(self) -> int:
        with suppress(ChannelClosed):
            raise AssertionError(f"the child answered {self.answer()}")
        return -self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait(DEADLINE_S)


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]  # prime: no page repeats another


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def open_any(kind: str) -> Driver:
    """`stand-in:<library>` is the driver of a GPU over a library that only looks like NVIDIA's."""
    if kind.startswith("stand-in:"):
        from tests import cuda_standin

        cuda_standin.install(Path(kind.partition(":")[2]))
        kind = "cuda"
    return open_driver("cuda" if kind == "cuda" else "emulated")


def read_back(driver: Driver, publication: Publication, buffer_bytes: int = 100_000) -> str:
    found = xxhash.xxh3_128()
    with driver.pinned(buffer_bytes) as buffer:
        offset = 0
        while size := publication.read_into(offset, buffer):
            found.update(buffer.view[:size])
            offset += size
    return found.hexdigest()


def host(driver: Driver, channel: Channel[Any], size: int) -> None:
    data = pattern(size)

    def reached(done_bytes: int) -> None:
        channel.send([Progress(done_bytes=done_bytes, total_bytes=size)])
        assert channel.receive().messages == [Attach()]

    with ExitStack() as open_resources:
        with RegionDraft(driver, size) as draft, driver.pinned(size) as buffer:
            reached(0)
            buffer.view[:] = data
            half = size // 2
            driver.copy_in(draft.address, buffer.address, half)
            reached(half)
            driver.copy_in(draft.address + half, buffer.address + half, size - half)
            publication = open_resources.enter_context(draft.publish())
        reached(size)
        found = Published(
            size_bytes=size,
            layout_digest=publication.reason,
            content_digest=digest(data),
            seconds=0,
            sharing=publication.sharing,
            handle=publication.handle,
        )
        channel.send([found], [] if publication.fd is None else [publication.fd])
        while True:
            match channel.receive().messages:
                case [Verify()]:
                    content_digest = read_back(driver, publication)
                    channel.send([Verified(content_digest=content_digest, intact=content_digest == digest(data))])
                case [Write(offset=offset)]:
                    ctypes.memset(publication.address + offset, 7, 1)
                    channel.send([Verified(content_digest="", intact=False)])
                case _:
                    return


def worker(driver: Driver, channel: Channel[Any]) -> None:
    frame = channel.receive()
    (published,) = frame.messages
    fd = frame.fds[0] if frame.fds else None
    with attach(driver, published.sharing, fd, published.handle, published.size_bytes) as region:
        if fd is not None:
            os.close(fd)
        channel.send([Progress(done_bytes=region.size, total_bytes=region.size)])
        while True:
            match channel.receive().messages:
                case [Verify()]:
                    content_digest = digest(ctypes.string_at(region.address, region.size))
                    intact = content_digest == published.content_digest
                    channel.send([Verified(content_digest=content_digest, intact=intact)])
                case [Write(offset=offset)]:
                    ctypes.memset(region.address + offset, 7, 1)
                    channel.send([Verified(content_digest="", intact=False)])
                case _:
                    return


def elastic(driver: Driver, channel: Channel[Any], num_chunks: int) -> None:
    chunk_bytes = ElasticRange.chunk_size(driver, 1)
    with ElasticRange(driver, num_chunks * chunk_bytes, chunk_bytes) as chunks:
        while True:
            match channel.receive().messages:
                case [Chunk(index=index, action="map")]:
                    chunks.map_chunk(index)
                case [Chunk(index=index, action="unmap")]:
                    chunks.unmap_chunk(index)
                case [Chunk(index=index, action="touch")]:
                    ctypes.memset(chunks.chunk_address(index), 7, chunk_bytes)
                case _:
                    return
            channel.send([Progress(done_bytes=chunks.resident_bytes, total_bytes=chunks.address)])


def main() -> None:
    role, kind, channel_fd, *numbers = sys.argv[1:]
    channel: Channel[Any] = Channel.inherited(int(channel_fd), ToChild)
    driver = open_any(kind)
    driver.start()
    roles: dict[str, Callable[..., None]] = {"host": host, "worker": worker, "elastic": elastic}
    with suppress(ChannelClosed):
        roles[role](driver, channel, *map(int, numbers))
    driver.stop()
    channel.close()


if __name__ == "__main__":
    main()
