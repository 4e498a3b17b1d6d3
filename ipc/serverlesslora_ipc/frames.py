"""Turns lists of messages into frames and back, without touching a socket.

A frame is a five-byte header (body length as little-endian u32, number of file descriptors as u8) and a msgpack list of
tagged messages. Descriptors travel beside the bytes, in order and never later than the frame's own header, so a queue
and the count in the header are enough to give each frame its own, however the kernel cut or merged the bytes.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from serverlesslora_ipc.messages import Message

HEADER = struct.Struct("<IB")
MAX_FRAME_BYTES = 256 << 20  # logprobs of a long prompt are the largest thing anybody sends
MAX_FDS = 4

Received = TypeVar("Received", bound=Message)

_encoder = msgspec.msgpack.Encoder()


class FrameError(Exception):
    """What arrived is not a frame of ours; nothing after it can be trusted."""


class FrameTooLarge(ValueError):
    """What was to be sent is over the limit; nothing of it was sent."""


class Frame(NamedTuple, Generic[Received]):
    messages: list[Received]
    fds: list[int]  # the receiver owns them


def encode(messages: Sequence[Message], *, num_fds: int = 0, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytearray:
    frame = bytearray(HEADER.size)
    _encoder.encode_into(list(messages), frame, HEADER.size)
    size = len(frame) - HEADER.size
    if size > max_frame_bytes or num_fds > MAX_FDS:
        raise FrameTooLarge(
            f"a frame of {size} bytes and {num_fds} descriptors; {max_frame_bytes} and {MAX_FDS} allowed"
        )
    HEADER.pack_into(frame, 0, size, num_fds)
    return frame


class FrameDecoder(Generic[Received]):
    """Collects bytes and descriptors until they make whole frames."""

    def __init__(self, receives: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES, max_fds: int = MAX_FDS) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[Received]] = msgspec.msgpack.Decoder(list[receives])
        self._max_frame_bytes = max_frame_bytes
        self._max_fds = max_fds
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    @property
    def inside_frame(self) -> bool:
        """True where an end of the stream would cut a frame in two."""
        return bool(self._bytes)

    def feed(self, data: bytes | bytearray, fds: Sequence[int] = ()) -> list[Frame[Received]]:
        self._bytes += data
        self._fds.extend(fds)
        frames: list[Frame[Received]] = []
        start = 0
        try:
            while len(self._bytes) - start >= HEADER.size:
                size, num_fds = HEADER.unpack_from(self._bytes, start)
                if size > self._max_frame_bytes or num_fds > self._max_fds:
                    raise FrameError(f"a frame announces {size} bytes and {num_fds} descriptors")
                end = start + HEADER.size + size
                if end > len(self._bytes):
                    break
                if num_fds > len(self._fds):
                    raise FrameError(f"a frame announces {num_fds} descriptors, {len(self._fds)} came with it")
                with memoryview(self._bytes) as view, view[start + HEADER.size : end] as body:
                    messages = self._decoder.decode(body)
                frames.append(Frame(messages, [self._fds.popleft() for _ in range(num_fds)]))
                start = end
            if self._fds and start == len(self._bytes):
                raise FrameError(f"{len(self._fds)} descriptors came that no frame announces")
        except (FrameError, msgspec.MsgspecError) as error:
            close_fds(fd for frame in frames for fd in frame.fds)
            self.close()
            if isinstance(error, FrameError):
                raise
            raise FrameError(f"a frame does not decode: {error}") from error
        del self._bytes[:start]
        return frames

    def close(self) -> None:
        """Closes descriptors that no frame has taken."""
        close_fds(self._fds)
        self._fds.clear()
        self._bytes.clear()


def close_fds(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
