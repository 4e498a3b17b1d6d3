"""Single requests of the client, in this process, to servers on real sockets that do as they like."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from serverlesslora_loadgen.client import connection, frames, stream
from serverlesslora_loadgen.client.address import address_of
from serverlesslora_loadgen.client.connection import Client, Connection, Exchange
from serverlesslora_loadgen.client.drive import drive
from serverlesslora_loadgen.client.golden import Asking
from serverlesslora_loadgen.client.process import Outbox, Work
from serverlesslora_loadgen.client.stream import Reading
from serverlesslora_loadgen.errors import LoadgenError, TargetError
from serverlesslora_loadgen.plan import Job, Target
from serverlesslora_loadgen.record import Record
from tests.loadgen_peer import TOKENS, Peer, deafen, outcomes, planned, run, serving
from tests.loadgen_runs import answered, result


def refusing(status: str, *headers: str) -> Callable[[Peer], None]:
    return lambda peer: peer.refuse(status, *headers)


def silent_after(tokens: int) -> Callable[[Peer], None]:
    def asked(peer: Peer) -> None:
        peer.begin()
        for number in range(tokens):
            peer.token(number)

    return asked


USAGE = b'data: {"model":"tea","choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\n'


def open_after_done(peer: Peer) -> None:
    peer.begin()
    for number in range(TOKENS):
        peer.token(number)
    peer.chunk(USAGE + b"data: [DONE]\n\n")  # and then nothing: the answer stays open


def until_closed(peer: Peer) -> None:
    peer.transport.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    peer.chunk = peer.transport.write  # type: ignore[method-assign]
    for number in range(TOKENS):
        peer.token(number)
    peer.chunk(USAGE + b"data: [DONE]\n\n")
    peer.transport.close()


def continued(peer: Peer) -> None:
    peer.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    peer.answer()


def garbage(peer: Peer) -> None:
    peer.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def too_much(peer: Peer) -> None:
    peer.answer()
    peer.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (refusing("429 Too Many Requests", "Retry-After: 3"), "shed"),
        (refusing("500 Oh"), "status"),
        (refusing("307 Elsewhere", "Location: /b"), "status"),
        (lambda peer: peer.transport.abort(), "connect"),
        (garbage, "malformed"),
        (silent_after(0), "timeout"),
        (silent_after(2), "stall"),
        (open_after_done, "ok"),
        (until_closed, "ok"),
        (continued, "ok"),
        (too_much, "ok"),
    ],
)
def test_servers_that_do_as_they_like(asked: Callable[[Peer], None], expected: str) -> None:
    async def test() -> list[Record]:
        async with serving(asked) as server, Asking(Target(url=server.url, timeout_s=0.8, stall_s=0.2)) as asking:
            return [(await asking.ask(each))[0] for each in planned(2)]

    records = run(test())
    assert outcomes(records) == {expected: 2}
    if expected == "shed":
        assert {(record.status, record.retry_after_s) for record in records} == {(429, 3.0)}


def test_written_is_when_the_last_byte_left() -> None:
    """A body that does not fit into the socket leaves when the server has read most of it."""
    held: list[float] = []

    async def test() -> Record:
        nonlocal held
        async with serving(lambda peer: peer.answer()) as server:
            held = await deafen(server, 0.3)
            large = json.dumps({"model": "tea", "max_tokens": TOKENS, "prompt": "x" * (32 << 20)}).encode()
            async with Asking(Target(url=server.url)) as asking:
                record, _ = await asking.ask(planned(1, body=large)[0])
                began = asking._client.start_at
            held[0] -= began
            return record

    record = run(test())
    assert record.outcome == "ok" and record.written_s is not None
    assert record.written_s >= held[0]


def test_too_few_files_are_not_the_servers_fault() -> None:
    async def test() -> list[Record]:
        records: list[Record] = []
        async with serving(lambda peer: None) as server:
            client = Client(Target(url=server.url), lambda record, _: records.append(record))
            most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, most[1]))
            try:
                for each in planned(30):
                    client.send(each, 0.0)
                while not records:
                    await asyncio.sleep(0.01)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, most)
                client.close()
            await asyncio.sleep(0.01)
        return records

    records = run(test())
    assert len(records) == 30 and outcomes(records) == {"unsent": 30}
    assert any("open files" in record.detail for record in records)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://a:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(TargetError, match=url.replace(".", r"\.")):
        run(drive(Target(url=url), planned(1)))


def test_what_is_no_header_or_no_number() -> None:
    with pytest.raises(TargetError, match="no header"):
        run(drive(Target(url="http://a", headers={"x": "a\r\nb: c"}), planned(1)))
    with pytest.raises(LoadgenError, match="at least 1"):
        run(drive(Target(url="http://a"), planned(1), concurrency=0))


@pytest.mark.parametrize("more", ["?api-version=3&key=secret", "#part"])
def test_what_would_be_left_out_of_an_address_is_refused(more: str) -> None:
    with pytest.raises(TargetError, match=r"http://a:1/b is followed by a \?query") as refused:
        address_of(Target(url="http://a:1/b" + more))
    assert "secret" not in str(refused.value)


def test_addresses() -> None:
    assert address_of(Target(url="https://a.example/v1/"))[1:] == (443, True, "a.example", "/v1/completions")
    assert address_of(Target(url="http://[::1]:80"))[:4] == ("::1", 80, False, "[::1]:80")


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_what_counts_as_written_has_left_the_process(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads: from some size on the last bytes stay here, also when they are too few to bother a transport."""
    left: list[tuple[bool, bool]] = []
    write = Connection.write

    def watched(connection: Connection, data: bytes) -> None:
        write(connection, data)
        assert connection.exchange is not None
        is_written = connection.exchange.reading.written is not None
        left.append((is_written, connection.transport.get_write_buffer_size() == 0))
        connection.transport.abort()

    async def test() -> None:
        async with Asking(Target(url=f"http://127.0.0.1:{listener.getsockname()[1]}")) as asking:
            for size in range(1000, 16 << 20, 48 << 10):
                assert (await asking.ask(planned(1, body=b"x" * size)[0]))[0].failure == "connect"
                if len(left) > 2 and not any(is_empty for _, is_empty in left[-2:]):
                    break

    monkeypatch.setattr(Connection, "write", watched)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        run(test(), new_loop=new_loop)
    assert {is_empty for _, is_empty in left} == {True, False}
    assert all(is_written == is_empty for is_written, is_empty in left)


def test_requests_leave_nothing_for_the_collector() -> None:
    """It is off while a run goes on."""

    def alive() -> Counter[str]:
        kinds = (Connection, Exchange, Reading)
        return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)

    async def test() -> None:
        answers = itertools.cycle([("Connection: close",), ()])
        async with serving(lambda peer: peer.answer(*next(answers))) as server:
            async with Asking(Target(url=server.url)) as asking:
                gc.collect()
                gc.disable()
                for each in planned(20):
                    assert (await asking.ask(each))[0].outcome == "ok"
                assert alive()["Connection"] <= 2 and alive()["Exchange"] + alive()["Reading"] <= 2
            await server.stop()
            async with Asking(Target(url=server.url)) as asking:
                for each in planned(20):
                    assert (await asking.ask(each))[0].failure == "connect"
                assert alive()["Exchange"] + alive()["Reading"] <= 2

    try:
        run(test(), new_loop=uvloop.new_event_loop)
    finally:
        gc.enable()


def test_trailers_are_no_headers_of_the_next_answer() -> None:
    def asked(peer: Peer) -> None:
        if peer.transport.is_closing():
            return
        peer.begin(*([] if server_asked else ["Trailer: x-request-id"]))
        server_asked.append(peer)
        for number in range(TOKENS):
            peer.token(number)
        peer.chunk(USAGE + b"data: [DONE]\n\n")
        peer.transport.write(b"0\r\nX-Request-Id: late\r\n\r\n")

    server_asked: list[Peer] = []

    async def test() -> list[Record]:
        async with serving(asked) as server, Asking(Target(url=server.url)) as asking:
            return [(await asking.ask(each))[0] for each in planned(2)]

    assert [(record.outcome, record.request_id) for record in run(test())] == [("ok", ""), ("ok", "")]


def test_an_answer_that_breaks_the_client_has_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*_: object) -> None:
        raise OverflowError("too much")

    async def test() -> list[Record]:
        async with serving(lambda peer: peer.answer()) as server, Asking(Target(url=server.url)) as asking:
            return [(await asyncio.wait_for(asking.ask(each), 10))[0] for each in planned(2)]

    monkeypatch.setattr(stream, "judge", judge)
    records = run(test())
    assert [(record.id, record.failure, record.input_tokens) for record in records] == [
        (0, "malformed", 0),
        (1, "malformed", 0),
    ]
    assert all("too much" in record.detail and None not in (record.written_s, record.done_s) for record in records)


def test_a_record_that_cannot_be_told_is_told_as_such() -> None:
    told = bytearray()

    class Pipe(asyncio.WriteTransport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            told.extend(data)

    async def test() -> None:
        work = Work(Job(target=Target(url="http://127.0.0.1:9"), requests=tuple(planned(1))), Outbox(Pipe()))
        record = Record(id=0, model="tea", intended_s=1.0, written_s=1.5, outcome="ok", input_tokens=2**70)
        work._ended(record, "")
        work.count()
        await asyncio.wait_for(work._over.wait(), 10)
        work.shutdown()

    run(test())
    done, count = [frames.decode(frame) for frame in frames.Splitter().feed(bytes(told))]
    assert isinstance(done, frames.Done) and isinstance(count, frames.Count)
    assert (done.record.id, done.record.failure, done.record.written_s) == (0, "malformed", 1.5)
    assert (count.ok, count.failed) == (0, 1)


def test_what_it_took_to_connect_is_not_the_client_being_late() -> None:
    async def test() -> list[Record]:
        async with serving(lambda peer: peer.answer()) as server, Asking(Target(url=server.url)) as asking:
            loop = asyncio.get_running_loop()
            connect = loop.create_connection

            async def slowly(*args: Any, **more: Any) -> Any:
                await asyncio.sleep(0.2)
                return await connect(*args, **more)

            loop.create_connection = slowly  # type: ignore[method-assign]
            return [(await asking.ask(each))[0] for each in planned(2)]

    first, second = run(test())
    assert first.connect_s is not None and first.connect_s >= 0.19
    assert first.written_s is not None and first.lag_s == pytest.approx(first.written_s - first.connect_s)
    assert second.outcome == "ok" and second.connected_s is None


def test_a_run_with_new_connections_only_is_valid() -> None:
    far = [answered(i, written_s=i + 0.031, connected_s=i + 0.03) for i in range(300)]
    found = result(far)
    assert found.verdict.valid and found.client.lag is not None
    assert found.client.lag.percentiles["p99"].value == pytest.approx(0.001)
    late = [answered(i, started_s=i + 0.03, written_s=i + 0.061, connected_s=i + 0.06) for i in range(300)]
    assert not result(late).verdict.valid


def test_an_address_where_packets_vanish_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> str:
        async with serving(lambda peer: None) as server:
            port = int(server.url.rpartition(":")[2])
            loop = asyncio.get_running_loop()
            connect = loop.create_connection

            async def getaddrinfo(*_: object, **__: object) -> Any:
                return [(socket.AF_INET, 1, 6, "", (address, port)) for address in ("192.0.2.1", "127.0.0.1")]

            async def create_connection(factory: Any, host: str, port: int) -> Any:
                if host == "192.0.2.1":
                    await asyncio.Event().wait()
                return await connect(factory, host, port)

            loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
            loop.create_connection = create_connection  # type: ignore[method-assign,assignment]
            client = Client(Target(url=f"http://two.example:{port}"), lambda *_: None)
            await asyncio.wait_for(client.resolve(), 10)
            return client._ip

    monkeypatch.setattr(connection, "RESOLVE_S", 0.05)
    assert run(test()) == "127.0.0.1"
