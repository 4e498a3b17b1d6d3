"""Two ends of a connection between processes: `Channel` blocks, `AsyncChannel` belongs to an event loop.

Both speak frames over one end of a `socket.socketpair()`. The other end is inherited by a child as a number, so there
is no file on disk to guard or to clean up, and the death of either side is an end of stream for the other.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, NamedTuple

from serverlesslora_ipc.frames import (
    MAX_FDS,
    MAX_FRAME_BYTES,
    Frame,
    FrameDecoder,
    FrameError,
    Received,
    close_fds,
    encode,
)
from serverlesslora_ipc.messages import Message

_READ_BYTES = 256 << 10
_PAUSE_AT_FRAMES = 256  # an event loop that is behind stops reading, which in the end stops the sender


class ChannelClosed(Exception):
    """The other side is gone, or this side was closed."""


def _read(sock: socket.socket, max_fds: int) -> tuple[bytes, list[int]] | None:
    """What can be read now: None if nothing, empty bytes at the end of the stream."""
    room = socket.CMSG_SPACE(max_fds * 4) if max_fds else 0
    try:
        data, ancillary, flags, _ = sock.recvmsg(_READ_BYTES, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    except ConnectionResetError:  # the peer died with unread bytes in its own buffer
        return b"", []
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_fds(fds)
        raise FrameError(f"more descriptors in one write than the {max_fds} allowed")
    return data, list(fds)


def _ancillary(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


class Channel(Generic[Received]):
    """For a process without an event loop. Any thread may send; one thread receives."""

    def __init__(
        self, sock: socket.socket, receives: Any, *, max_fds: int = MAX_FDS, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._max_fds = max_fds
        self._max_frame_bytes = max_frame_bytes
        self._decoder: FrameDecoder[Received] = FrameDecoder(receives, max_frame_bytes=max_frame_bytes, max_fds=max_fds)
        self._frames: deque[Frame[Received]] = deque()
        self._ended = False
        self._sending = threading.Lock()
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    @classmethod
    def inherited(cls, fd: int, receives: Any, *, max_fds: int = MAX_FDS) -> Channel[Received]:
        """Takes over the descriptor this process was started with; its own children will not inherit it."""
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd), receives, max_fds=max_fds)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, messages: Sequence[Message], fds: Sequence[int] = ()) -> None:
        """Returns when the kernel has taken everything; the caller keeps its descriptors."""
        frame = encode(messages, num_fds=len(fds), max_frame_bytes=self._max_frame_bytes)
        with self._sending, memoryview(frame) as view:
            try:
                sent = self._socket.sendmsg([view], _ancillary(fds))
                if sent < len(frame):
                    self._socket.sendall(view[sent:])
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ChannelClosed("the other side is gone") from error

    def receive(self) -> Frame[Received]:
        """The next frame; waits for it. Raises ChannelClosed at the end of the stream."""
        self._wait(None)
        if self._frames:
            return self._frames.popleft()
        raise ChannelClosed("the other side is gone")

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Waits at most so long; True when `receive` would not wait (a whole frame is here, or the end is)."""
        return self._wait(timeout_s)

    def _wait(self, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._frames and not self._ended:
            left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not self._readable.poll(left_ms):
                return False
            got = _read(self._socket, self._max_fds)
            if got is None:
                continue
            data, fds = got
            if data:
                self._frames.extend(self._decoder.feed(data, fds))
            else:
                self._ended = True
        return True

    def close(self) -> None:
        self._ended = True
        self._decoder.close()
        for frame in self._frames:
            close_fds(frame.fds)
        self._frames.clear()
        self._socket.close()


class _Outgoing(NamedTuple):
    data: memoryview
    fds: list[int]  # our own duplicates


class AsyncChannel(Generic[Received]):
    """For the gateway. `send` never waits; `async for frame in channel` ends with the stream.

    Works on asyncio's and uvloop's loops alike because it only asks for readable/writable callbacks. By default it
    accepts no descriptors: a worker must not be able to fill the gateway's table.
    """

    def __init__(
        self,
        sock: socket.socket,
        receives: Any,
        *,
        max_fds: int = 0,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_unsent_bytes: int = 2 * MAX_FRAME_BYTES,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._max_fds = max_fds
        self._max_frame_bytes = max_frame_bytes
        self._max_unsent_bytes = max_unsent_bytes
        self._decoder: FrameDecoder[Received] = FrameDecoder(receives, max_frame_bytes=max_frame_bytes, max_fds=max_fds)
        self._frames: deque[Frame[Received]] = deque()
        self._outgoing: deque[_Outgoing] = deque()
        self._unsent_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._reading = False
        self._ended = False
        self._closed = False
        self._error: FrameError | None = None
        self._resume()

    @property
    def closed(self) -> bool:
        """True once nothing can be sent any more; frames that arrived before may still be iterated."""
        return self._closed or self._ended

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def send(self, messages: Sequence[Message], fds: Sequence[int] = ()) -> None:
        """Hands over what the kernel takes now and keeps the rest. The caller keeps its descriptors."""
        if self.closed:
            raise ChannelClosed("the other side is gone")
        frame = encode(messages, num_fds=len(fds), max_frame_bytes=self._max_frame_bytes)
        if self._unsent_bytes + len(frame) > self._max_unsent_bytes:
            self._end()
            raise ChannelClosed(f"the other side has left {self._unsent_bytes} bytes unread")
        self._outgoing.append(_Outgoing(memoryview(frame), [os.dup(fd) for fd in fds]))
        self._unsent_bytes += len(frame)
        if len(self._outgoing) == 1:
            self._flush()
            if self._outgoing and not self.closed:
                self._loop.add_writer(self._fd, self._on_writable)

    def __aiter__(self) -> AsyncIterator[Frame[Received]]:
        return self

    async def __anext__(self) -> Frame[Received]:
        while not self._frames:
            if self._error is not None:
                raise self._error
            if self.closed:
                raise StopAsyncIteration
            self._resume()
            assert self._waiter is None, "one task iterates a channel"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._frames.popleft()

    def close(self) -> None:
        """Drops what is unsent and unread. Safe to call twice."""
        if self._closed:
            return
        self._end()
        self._closed = True
        for frame in self._frames:
            close_fds(frame.fds)
        self._frames.clear()
        self._socket.close()

    def _resume(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._fd, self._on_readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        try:
            got = _read(self._socket, self._max_fds)
            if got is None:
                return
            data, fds = got
            if data:
                self._frames.extend(self._decoder.feed(data, fds))
            else:
                self._end()
        except FrameError as error:
            self._error = error
            self._end()
        if len(self._frames) >= _PAUSE_AT_FRAMES:
            self._pause()
        if self._waiter is not None and not self._waiter.done() and (self._frames or self.closed):
            self._waiter.set_result(None)

    def _on_writable(self) -> None:
        self._flush()
        if not self._outgoing:
            self._loop.remove_writer(self._fd)

    def _flush(self) -> None:
        while self._outgoing:
            data, fds = self._outgoing[0]
            try:
                sent = self._socket.sendmsg([data], _ancillary(fds))
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._drop_outgoing()  # the reader sees the end of the stream, after what is still to be read
                return
            close_fds(fds)
            self._unsent_bytes -= sent
            if sent < len(data):
                self._outgoing[0] = _Outgoing(data[sent:], [])
            else:
                self._outgoing.popleft()

    def _drop_outgoing(self) -> None:
        for data, fds in self._outgoing:
            data.release()
            close_fds(fds)
        self._outgoing.clear()
        self._unsent_bytes = 0

    def _end(self) -> None:
        """Nothing more is read or written; what was read stays."""
        if self._ended or self._closed:
            return
        self._ended = True
        self._pause()
        self._loop.remove_writer(self._fd)
        self._drop_outgoing()
        self._decoder.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
