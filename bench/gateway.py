"""What the gateway itself costs: processor time per streamed chunk and per request, with workers that compute nothing.

    python bench/gateway.py [--streams 200] [--functions 8] [--tokens-per-s 10] [--seconds 10] [--rounds 5]

Each round has two windows, one after the other: *long*, in which `--streams` streams run and none begins or ends, gives
the cost of a chunk; *short*, in which as many clients ask for four tokens, one request after the other on a kept
connection, gives the cost of a request, after its chunks are paid for at that price. Time is the gateway process's own
(all threads, from the kernel); the client and the workers are other processes. A last part measures when the first
chunk of a stream comes whose second token is a second away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import uvloop
from harness import report, spread
from idle import cpu_ns

END = b"data: [DONE]\n\n"
SETTLE_S = 2.0
LONG = 1_000_000  # tokens: longer than any window
SHORT = 4


class Counts:
    def __init__(self) -> None:
        self.chunks = 0
        self.requests = 0


class StreamClient(asyncio.Protocol):
    """One connection that asks again as soon as its answer is complete; counts events and answers."""

    def __init__(self, function: str, max_tokens: int, counts: Counts) -> None:
        body = json.dumps(
            {
                "model": function,
                "max_tokens": max_tokens,
                "stream": True,
                "messages": [{"role": "user", "content": "What does the gateway cost?"}],
            }
        ).encode()
        self._request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self._counts = counts
        self._tail = b""
        self.first_at = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.first_at and b'"content":" ' in data:
            self.first_at = time.monotonic()
        self._counts.chunks += data.count(b"\ndata: ")  # of a chunked body every event follows the size of its chunk
        self._tail = (self._tail + data)[-64:]
        if END in self._tail and self._tail.endswith(b"0\r\n\r\n"):
            self._tail = b""
            self._counts.requests += 1
            assert self.transport is not None
            self.transport.write(self._request)


@contextlib.contextmanager
def gateway(functions: int, tokens_per_s: float) -> Iterator[tuple[int, int]]:
    """(process, port)."""
    command = [sys.executable, str(Path(__file__).with_name("null_worker.py")), "serve"]
    options = ["--functions", str(functions), "--tokens-per-s", str(tokens_per_s)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("the gateway did not start")
        yield process.pid, int(address.rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()


class Window:
    """What went through the gateway in it, and the processor time that took."""

    def __init__(self, seconds: float, chunks: int, requests: int, cpu_s: float) -> None:
        self.seconds, self.chunks, self.requests, self.cpu_s = seconds, chunks, requests, cpu_s


async def measure(pid: int, port: int, *, streams: int, functions: int, max_tokens: int, seconds: float) -> Window:
    counts = Counts()
    loop = asyncio.get_running_loop()
    clients = []
    for number in range(streams):
        client = StreamClient(f"f{number % functions}", max_tokens, counts)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
        clients.append(client)
    await asyncio.sleep(SETTLE_S)
    cpu, chunks, requests, started = cpu_ns(pid), counts.chunks, counts.requests, time.monotonic()
    await asyncio.sleep(seconds)
    window = Window(
        time.monotonic() - started, counts.chunks - chunks, counts.requests - requests, (cpu_ns(pid) - cpu) / 1e9
    )
    for client in clients:
        assert client.transport is not None
        client.transport.abort()
    await asyncio.sleep(0.5)  # the gateway notices that they are gone
    return window


async def first_chunk_s(port: int) -> float:
    counts, loop, started = Counts(), asyncio.get_running_loop(), time.monotonic()
    client = StreamClient("f0", 2, counts)
    await loop.create_connection(lambda: client, "127.0.0.1", port)
    while not client.first_at:
        await asyncio.sleep(0.0005)
    assert client.transport is not None
    client.transport.abort()
    return client.first_at - started


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="at once [200]")
    parser.add_argument("--functions", type=int, default=8, help="each with a worker of its own [8]")
    parser.add_argument("--tokens-per-s", type=float, default=10.0, help="of every stream [10]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one window [10]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    arguments = parser.parse_args()
    same = {"streams": arguments.streams, "functions": arguments.functions, "seconds": arguments.seconds}
    per_chunk_ms, per_request_ms, rates = [], [], []
    with gateway(arguments.functions, arguments.tokens_per_s) as (pid, port):
        for _ in range(arguments.rounds):
            long = await measure(pid, port, max_tokens=LONG, **same)
            short = await measure(pid, port, max_tokens=SHORT, **same)
            chunk_s = long.cpu_s / long.chunks
            per_chunk_ms.append(chunk_s * 1000)
            per_request_ms.append((short.cpu_s - short.requests * SHORT * chunk_s) / short.requests * 1000)
            rates.append({"chunks_per_s": long.chunks / long.seconds, "requests_per_s": short.requests / short.seconds})
    with gateway(1, 1.0) as (_, port):
        await first_chunk_s(port)  # its worker has to start
        first = [await first_chunk_s(port) * 1000 for _ in range(10)]
    report(
        "gateway",
        cpu_ms_per_chunk=spread(per_chunk_ms),
        cpu_ms_per_request=spread(per_request_ms),
        first_chunk_ms_when_the_second_token_is_1000_ms_away=spread(first),
        rounds=rates,
        options=vars(arguments),
    )


if __name__ == "__main__":
    uvloop.run(main())
