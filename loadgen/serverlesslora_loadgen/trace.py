"""The one format of workloads: a request per line, in the order of time.

A superset of Mooncake's trace format (`timestamp`, `input_length`, `output_length`, `hash_ids`), with the adapter that
is asked as `model`. Fields that are not known here are ignored, so traces made for other tools can be read.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from serverlesslora_loadgen.errors import TraceError

Count = Annotated[int, Meta(ge=0)]


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class TraceRequest(msgspec.Struct, frozen=True, omit_defaults=True, rename={"class_": "class"}):
    """One request. What is sent is `messages`, else `prompt`, else a text made up of `input_length` tokens."""

    timestamp: Annotated[float, Meta(ge=0)]  # ms after the start of the trace
    input_length: Count  # tokens
    output_length: Count  # tokens
    model: str = ""  # the adapter; empty: whatever the run is told to ask
    hash_ids: tuple[int, ...] | None = None  # of each block of the prompt: equal leading ids are an equal prefix
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    session: str | None = None
    deadline_ms: float | None = None  # for the first token, after `timestamp`
    class_: str | None = None  # of its adapter: Predictable, Normal, Bursty, or any word to split results by


_decoder = msgspec.json.Decoder(TraceRequest)


def read_trace(path: Path) -> list[TraceRequest]:
    """In the order of time; equal times keep the order of the file. `.gz` is unpacked.

    Raises TraceError naming the file and the line that is no request.
    """
    requests = []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        requests.append(_decoder.decode(line))
                    except msgspec.DecodeError as error:
                        raise TraceError(f"{path}:{number} is not a request of a trace: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error
    return sorted(requests, key=lambda request: request.timestamp)


def encode(requests: Iterable[TraceRequest]) -> Iterator[bytes]:
    """The lines of a trace file. Whole milliseconds are written as integers, so equal traces are equal bytes."""
    encoder = msgspec.json.Encoder()
    for request in requests:
        at = round(request.timestamp, 3)
        yield encoder.encode(msgspec.structs.replace(request, timestamp=int(at) if at == int(at) else at)) + b"\n"


def write_trace(path: Path, requests: Sequence[TraceRequest]) -> None:
    """`.gz` is packed, without the time of day: the same requests are the same file, byte for byte."""
    data = b"".join(encode(requests))
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
            file.write(data)
        data = packed.getvalue()
    path.write_bytes(data)


def digest(requests: Iterable[TraceRequest]) -> str:
    """sha256 of the lines, hexadecimal: the same for a packed file and an unpacked one."""
    sha = hashlib.sha256()
    for line in encode(requests):
        sha.update(line)
    return sha.hexdigest()
