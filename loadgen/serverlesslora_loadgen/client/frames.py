"""What client processes and the one that started them say to each other, on pipes.

To a process: a `Job`, then the time to start at; the end of the pipe means that nobody listens any more. From it:
`Ready`, then records and counts as they come, `Report` as the last.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import msgspec

from serverlesslora_loadgen.plan import Job
from serverlesslora_loadgen.record import Record

LENGTH = struct.Struct(">Q")
START = struct.Struct(">d")  # time.monotonic, one clock for all processes of a machine


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Everything is in place to start."""


class Done(msgspec.Struct, frozen=True, tag=True):
    record: Record


class Count(msgspec.Struct, frozen=True, tag=True):
    """So far."""

    sent: int = 0
    ok: int = 0
    shed: int = 0
    failed: int = 0
    unsent: int = 0
    in_flight: int = 0


class Report(msgspec.Struct, frozen=True, tag=True):
    ended_at: float  # time.monotonic
    cpu_s: float  # from the start of the run to its end
    late_sockets: int
    interrupted: bool


Frame = Ready | Done | Count | Report
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
_jobs = msgspec.msgpack.Decoder(Job)


def encode(frame: Frame | Job) -> bytes:
    data = _encoder.encode(frame)
    return LENGTH.pack(len(data)) + data


def decode(data: bytes) -> Frame:
    """Raises msgspec.DecodeError."""
    return _decoder.decode(data)


def read_job(fd: int) -> Job:
    """Takes nothing of what follows it. Raises EOFError when whoever writes it goes away."""
    return _jobs.decode(_exactly(fd, LENGTH.unpack(_exactly(fd, LENGTH.size))[0]))


def _exactly(fd: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError(f"{len(data)} of {size} bytes came")
        data += piece
    return data


class Splitter:
    """Frames out of whatever pieces they come in, not decoded."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= LENGTH.size:
            end = at + LENGTH.size + LENGTH.unpack_from(self._buffer, at)[0]
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[at + LENGTH.size : end])
            at = end
        del self._buffer[:at]
