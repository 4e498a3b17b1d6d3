"""Where a backbone's bytes go: from pieces into one region, slice by slice, digested on the way.

A region is filled from its start to its end without looking back. On the host a slice is a part of the memory
itself; on a device it is page-locked memory that is copied over while the next slice is being filled.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from serverlesslora_ipc.cuda.driver import Driver, Pinned
from serverlesslora_kernels.cuda.memory import bytes_at

SLICE_BYTES = 32 << 20  # large enough for the full speed of a copy; a multiple of every element's size
_NUM_STAGED = 3  # one is filled, one digested, one copied

Progress = Callable[[int, int], None]  # bytes placed, bytes in all


class Source(Protocol):
    def read_into(self, target: Tensor, start: int) -> None:
        """Fills `target` (uint8) with the bytes from `start` on, as they are to lie in the region."""


class Piece:
    """A tensor's place in the region."""

    def __init__(self, offset: int, size: int, source: Source) -> None:
        self.offset = offset
        self.size = size
        self.source = source

    @property
    def end(self) -> int:
        return self.offset + self.size


class Destination(Protocol):
    @property
    def size(self) -> int: ...

    def next_slice(self) -> Tensor:
        """uint8: memory for the bytes that follow; what lay in it may still show. Empty at the end of the region."""

    def commit(self) -> None:
        """The slice is filled. It is still readable until `next_slice` was called `_NUM_STAGED - 1` times."""

    def finish(self) -> None:
        """Returns when every byte is in its place; no slice may be used any more."""


class HostMemory(Protocol):
    @property
    def map(self) -> mmap.mmap: ...

    @property
    def size(self) -> int: ...


class HostDestination:
    """Sealed memory that is not sealed yet, or memory of this process's own."""

    def __init__(self, memory: HostMemory) -> None:
        self.size = memory.size
        self._region: Tensor | None = torch.frombuffer(memory.map, dtype=torch.uint8)
        self._start = 0

    def next_slice(self) -> Tensor:
        assert self._region is not None
        part = self._region[self._start : self._start + SLICE_BYTES]
        self._start += len(part)
        return part

    def commit(self) -> None:
        pass

    def finish(self) -> None:
        self._region = None  # the map can only be closed once nothing refers to it


class DeviceDestination:
    """Device memory, reached through a ring of page-locked buffers. Each has a stream of its own, so that waiting for
    one does not wait for the others."""

    def __init__(self, driver: Driver, address: int, size: int) -> None:
        self.size = size
        self._driver = driver
        self._address = address
        self._start = self._length = 0
        self._buffers: deque[tuple[Pinned, int]] = deque()
        try:
            for _ in range(_NUM_STAGED):
                self._buffers.append((driver.pinned(min(SLICE_BYTES, size)), driver.create_stream()))
        except BaseException:
            self.close()
            raise

    def next_slice(self) -> Tensor:
        self._start += self._length
        self._length = min(SLICE_BYTES, self.size - self._start)
        self._buffers.rotate(-1)
        buffer, stream = self._buffers[0]
        self._driver.synchronize(stream)
        return bytes_at(buffer.address, buffer.size, torch.device("cpu"))[: self._length]

    def commit(self) -> None:
        buffer, stream = self._buffers[0]
        self._driver.copy_in(self._address + self._start, buffer.address, self._length, stream)

    def finish(self) -> None:
        for _, stream in self._buffers:
            self._driver.synchronize(stream)

    def close(self) -> None:
        """Also after a failure: a copy under way must not read memory that is gone."""
        for buffer, stream in self._buffers:
            self._driver.synchronize(stream)
            self._driver.destroy_stream(stream)
            buffer.close()
        self._buffers.clear()

    def __enter__(self) -> DeviceDestination:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def fill(destination: Destination, pieces: Iterable[Piece], progress: Progress) -> str:
    """Writes the pieces, which are in order, and zeros between them; returns the xxh3_128 of the whole region.

    Each piece is let go as soon as it is written. The digest is computed on a second thread, one slice behind.
    """
    digest = xxhash.xxh3_128()
    waiting = deque(pieces)
    done = 0
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as digester:
        behind: Future[None] | None = None
        while len(part := destination.next_slice()):
            _fill_slice(part, done, waiting)
            destination.commit()
            if behind is not None:
                behind.result()
            behind = digester.submit(digest.update, part.numpy())  # type: ignore[arg-type]
            done += len(part)
            progress(done, destination.size)
        if behind is not None:
            behind.result()
    del part, behind
    destination.finish()
    return digest.hexdigest()


def _fill_slice(part: Tensor, start: int, waiting: deque[Piece]) -> None:
    filled = 0  # of `part`
    while waiting and waiting[0].offset < start + len(part):
        piece = waiting[0]
        first = max(piece.offset - start, 0)
        last = min(piece.end - start, len(part))
        part[filled:first].zero_()
        piece.source.read_into(part[first:last], start + first - piece.offset)
        filled = last
        if start + last < piece.end:
            break
        waiting.popleft()
    part[filled:].zero_()
