"""Frames: any cut of the byte stream gives the same messages, and each frame gets its own descriptors."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from serverlesslora_ipc.frames import HEADER, MAX_FDS, FrameDecoder, FrameError, FrameTooLarge, encode
from serverlesslora_ipc.messages import (
    Abort,
    Attach,
    GatewayToHost,
    GatewayToWorker,
    Generate,
    SamplingParams,
    TextPrompt,
)


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Descriptors whose numbers tell them apart; whatever is still open afterwards is closed."""
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]
    yield opened
    for fd in opened:
        try:
            os.close(fd)
        except OSError:
            continue


def request(name: str) -> Generate:
    return Generate(request_id=name, adapter=None, prompt=TextPrompt(text="ä" * 50), sampling=SamplingParams(seed=7))


def test_one_frame_carries_many_messages() -> None:
    decoder: FrameDecoder[GatewayToWorker] = FrameDecoder(GatewayToWorker)
    sent = [request("a"), Abort(request_id="b")]
    (frame,) = decoder.feed(encode(sent))
    assert frame.messages == sent
    assert frame.fds == []
    assert not decoder.inside_frame


@pytest.mark.parametrize("seed", range(5))
def test_any_cut_gives_the_same_messages(seed: int) -> None:
    rng = random.Random(seed)
    sent = [[request(f"{i}-{j}") for j in range(rng.randrange(4))] for i in range(30)]
    stream = b"".join(encode(messages) for messages in sent)
    decoder: FrameDecoder[GatewayToWorker] = FrameDecoder(GatewayToWorker)
    received = []
    while stream:
        cut = rng.choice([1, 3, 100, 5000])
        received += [frame.messages for frame in decoder.feed(stream[:cut])]
        stream = stream[cut:]
    assert received == sent
    assert not decoder.inside_frame


def test_descriptors_follow_their_frame_when_reads_are_merged(fds: list[int]) -> None:
    decoder: FrameDecoder[GatewayToHost] = FrameDecoder(GatewayToHost)
    stream = encode([Attach()], num_fds=2) + encode([Attach()]) + encode([Attach()], num_fds=1)
    frames = decoder.feed(stream, fds[:3])
    assert [frame.fds for frame in frames] == [fds[:2], [], fds[2:3]]


def test_descriptors_may_come_with_the_first_byte(fds: list[int]) -> None:
    decoder: FrameDecoder[GatewayToHost] = FrameDecoder(GatewayToHost)
    stream = encode([Attach()], num_fds=1)
    assert decoder.feed(stream[:1], fds[:1]) == []
    assert decoder.inside_frame
    assert decoder.feed(stream[1:])[0].fds == fds[:1]


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (HEADER.pack(0xFFFFFFFF, 0), "announces 4294967295 bytes"),
        (HEADER.pack(1, MAX_FDS + 1), f"{MAX_FDS + 1} descriptors"),
        (HEADER.pack(3, 0) + b"\xc1\xc1\xc1", "does not decode"),
        (HEADER.pack(1, 0) + b"\x80", "does not decode"),  # valid msgpack, not a list of messages
        (encode([Abort(request_id="r")]), "does not decode"),  # a message, but not one a host may receive
        (encode([Attach()], num_fds=1), "0 came with it"),
        (b"GET / HTTP/1.1\r\n\r\n", "announces"),
    ],
)
def test_garbage_is_an_error(stream: bytes, reason: str) -> None:
    decoder: FrameDecoder[GatewayToHost] = FrameDecoder(GatewayToHost)
    with pytest.raises(FrameError, match=reason):
        decoder.feed(stream)


def test_descriptors_nobody_announced_are_an_error_and_closed(fds: list[int]) -> None:
    decoder: FrameDecoder[GatewayToHost] = FrameDecoder(GatewayToHost)
    with pytest.raises(FrameError, match="no frame announces"):
        decoder.feed(encode([Attach()]), fds[:1])
    with pytest.raises(OSError):
        os.fstat(fds[0])


def test_descriptors_of_frames_before_the_error_are_closed(fds: list[int]) -> None:
    decoder: FrameDecoder[GatewayToHost] = FrameDecoder(GatewayToHost)
    with pytest.raises(FrameError):
        decoder.feed(encode([Attach()], num_fds=1) + HEADER.pack(1, 0) + b"\xc1", fds[:1])
    with pytest.raises(OSError):
        os.fstat(fds[0])


def test_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(FrameTooLarge, match="100 and"):
        encode([request("r")], max_frame_bytes=100)
    with pytest.raises(FrameTooLarge):
        encode([Attach()], num_fds=MAX_FDS + 1)
