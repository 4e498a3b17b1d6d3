"""Whole runs of client processes against small servers on real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest
import uvloop

from serverlesslora_loadgen.client import frames
from serverlesslora_loadgen.client.drive import Child, Driven, Progress, deal, drive, settle_cold
from serverlesslora_loadgen.client.golden import Asking
from serverlesslora_loadgen.plan import Job, Target
from serverlesslora_loadgen.record import Record
from tests.loadgen_peer import TOKENS, Peer, Server, deafen, outcomes, planned, run, serving


def test_every_request_is_answered_and_has_its_record() -> None:
    told: list[Progress] = []

    async def test() -> tuple[Driven, Server]:
        async with serving(lambda peer: peer.answer("X-Request-Id: r-1")) as server:
            target = Target(url=server.url)
            plan = planned(60, every_s=0.01)
            return await drive(target, plan[::-1], processes=2, on_progress=told.append), server

    driven, server = run(test())
    assert [record.id for record in driven.records] == list(range(60))
    assert outcomes(driven.records) == {"ok": 60} and server.requests == 60
    assert (driven.processes, driven.interrupted) == (2, False)
    assert driven.seconds >= 0.59 and driven.cpu_s > 0
    for record in driven.records:
        assert record.intended_s == pytest.approx(0.01 * record.id)
        stamps = (record.started_s, record.written_s, record.first_byte_s, record.first_token_s, record.done_s)
        assert None not in stamps and list(stamps) == sorted(stamps)
        assert record.lag_s is not None and record.lag_s >= 0
        assert (record.output_tokens, record.request_id) == (TOKENS, "r-1") and record.bytes_in > 100
    assert told[-1][1:] == (60, 60, 60, 60, 0, 0, 0)


def test_answers_that_nobody_can_count_end_the_run_all_the_same() -> None:
    usage = b'{"model":"tea","choices":[],"usage":{"prompt_tokens":2,"completion_tokens":%d}}' % 2**70

    def asked(peer: Peer) -> None:
        if server_requests.pop():
            date = "Mon, 01 Jan 2024 00:00:00"
            peer.refuse("429 Too Many Requests", f"Date: {date} GMT", f"Retry-After: {date} +99999999999999999")
        else:
            peer.begin()
            peer.chunk(b"data: %b\n\ndata: [DONE]\n\n" % usage)
            peer.transport.write(b"0\r\n\r\n")

    server_requests = [True, False]

    async def test() -> Driven:
        async with serving(asked) as server:
            return await asyncio.wait_for(drive(Target(url=server.url), planned(2), concurrency=1), 20)

    assert outcomes(run(test()).records) == {"malformed": 1, "shed": 1}


def test_a_closed_loop_goes_on_after_done() -> None:
    """Each of these answers stays open: with a second for each of them this would take too long."""
    usage = b'data: {"model":"tea","choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\n'

    def asked(peer: Peer) -> None:
        peer.begin()
        for number in range(TOKENS):
            peer.token(number)
        peer.chunk(usage + b"data: [DONE]\n\n")

    async def test() -> Driven:
        async with serving(asked) as server:
            return await asyncio.wait_for(drive(Target(url=server.url), planned(20), concurrency=1), 15)

    assert outcomes(run(test()).records) == {"ok": 20}


def test_connections_are_kept_for_the_next_request() -> None:
    async def test() -> Server:
        async with serving(lambda peer: peer.answer()) as server:
            await drive(Target(url=server.url), planned(20), concurrency=1)
            return server

    assert run(test()).connections == 1


def test_a_server_that_wants_its_connection_closed_gets_that() -> None:
    async def test() -> tuple[Driven, Server]:
        async with serving(lambda peer: peer.answer("Connection: close")) as server:
            return await drive(Target(url=server.url), planned(8), concurrency=1), server

    driven, server = run(test())
    assert outcomes(driven.records) == {"ok": 8} and server.connections == 8


def test_no_request_waits_for_another() -> None:
    """Nobody is answered before all have asked: with any cap on connections this would never end."""
    waiting: list[Peer] = []

    def asked(peer: Peer) -> None:
        waiting.append(peer)
        if len(waiting) == 400:
            for each in waiting:
                each.answer()

    async def test() -> Driven:
        async with serving(asked) as server:
            return await drive(Target(url=server.url, timeout_s=30), planned(400), processes=2)

    assert outcomes(run(test()).records) == {"ok": 400}


def test_a_closed_loop_keeps_its_number_under_way() -> None:
    seen: list[int] = []
    waiting: list[Peer] = []

    def asked(peer: Peer) -> None:
        waiting.append(peer)
        seen.append(len(waiting))
        if len(waiting) == 5 or len(seen) > 30:  # towards the end one process may be done before the other
            while waiting:
                waiting.pop(0).answer()

    async def test() -> Driven:
        async with serving(asked) as server:
            return await drive(Target(url=server.url), planned(40, every_s=1000), processes=2, concurrency=5)

    driven = run(test())
    assert outcomes(driven.records) == {"ok": 40} and max(seen) == 5
    assert driven.seconds < 60
    assert all(record.started_s is not None and record.started_s >= record.intended_s for record in driven.records)


def test_a_process_that_is_killed_leaves_its_requests_unsent() -> None:
    def asked(peer: Peer) -> None:
        if not killed:
            victim = min(clients(), key=lambda process: process.pid)
            killed.append(victim.pid)
            assert os.getsid(victim.pid) != os.getsid(0)  # Ctrl-C must not come to it on its own
            victim.kill()
        peer.answer()

    def clients() -> list[psutil.Process]:
        """Other tests may have left children of theirs."""
        children = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
        return [each for each in children if "serverlesslora_loadgen.client.process" in each.cmdline()]

    killed: list[int] = []

    async def test() -> Driven:
        async with serving(asked) as server:
            return await drive(Target(url=server.url), planned(40, every_s=0.01), processes=2)

    driven = run(test())
    assert [record.id for record in driven.records] == list(range(40))
    lost = [record for record in driven.records if record.outcome == "unsent"]
    assert len(lost) == 20 and all("ended with code -9" in record.detail for record in lost)
    assert outcomes(driven.records)["ok"] == 20 and killed


def test_a_server_that_dies_fails_everything_after() -> None:
    async def test() -> Driven:
        def asked(peer: Peer) -> None:
            if server.requests < 10:
                peer.answer()
            elif server.requests == 10:
                peer.begin()
                peer.token(0)
                dying.append(asyncio.ensure_future(server.stop()))

        dying: list[asyncio.Future[None]] = []
        async with serving(asked) as server:
            driven = await drive(Target(url=server.url), planned(30, every_s=0.01))
            await asyncio.gather(*dying)
            return driven

    records = run(test()).records
    assert [record.outcome for record in records[:9]] == ["ok"] * 9
    assert {record.failure for record in records[9:]} <= {"truncated", "connect"}
    assert records[-1].failure == "connect" and "refused" in records[-1].detail.lower()


def test_nobody_listens() -> None:
    driven = run(drive(Target(url="http://127.0.0.1:9"), planned(5)))
    assert outcomes(driven.records) == {"connect": 5}


def test_a_name_that_nobody_has() -> None:
    driven = run(drive(Target(url="http://no-such-name.invalid:80"), planned(2)))
    assert outcomes(driven.records) == {"connect": 2}


@pytest.mark.parametrize(("times", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGTERM)])
def test_an_interrupt_ends_the_run_with_all_its_records(times: int, number: signal.Signals) -> None:
    """Once: who is under way may end. Twice: everything ends."""
    waiting: list[Peer] = []

    def asked(peer: Peer) -> None:
        waiting.append(peer)
        if len(waiting) == 3:
            os.kill(os.getpid(), number)

    def progress(now: Progress) -> None:
        if now.done >= 7 and times == 1:  # those that will not be sent
            while waiting:
                waiting.pop().answer()
        elif now.done >= 7 and len(waiting) == 3:
            waiting.clear()
            os.kill(os.getpid(), number)

    async def test() -> Driven:
        async with serving(asked) as server:
            plan = [msgspec.structs.replace(p, at_s=0.0 if p.id < 3 else 1000.0) for p in planned(10)]
            return await drive(Target(url=server.url), plan, on_progress=progress)

    def ended(*_: object) -> None:
        raise AssertionError("the signal came to the whole process")

    before = signal.signal(number, ended)
    try:
        driven = run(test())
        assert signal.getsignal(number) is ended
    finally:
        signal.signal(number, before)
    assert driven.interrupted and len(driven.records) == 10
    assert outcomes(driven.records) == ({"ok": 3, "unsent": 7} if times == 1 else {"unsent": 10})
    assert all("interrupted" in record.detail for record in driven.records[3:])
    assert all(record.written_s is not None for record in driven.records[:3])


def test_a_run_that_is_given_up_leaves_no_process() -> None:
    async def test() -> None:
        reached = asyncio.Event()
        async with serving(lambda peer: reached.set()) as server:
            running = asyncio.create_task(drive(Target(url=server.url), planned(2), processes=2))
            await reached.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    run(test())
    assert not [child for child in psutil.Process().children() if "client.process" in " ".join(child.cmdline())]


def stands_in(path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Client processes that do something else."""
    (path / "script.py").write_text(f"import sys; sys.path.insert(0, {str(LOADGEN)!r})\n{script}")
    program = path / "python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {path / 'script.py'}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


FLOOD = """
import os
from serverlesslora_loadgen.client import frames
frames.read_job(0)
os.write(1, frames.encode(frames.Ready()))
os.read(0, frames.START.size)
while True:
    os.write(1, 1000 * frames.encode(frames.Count()))
"""


def test_processes_that_nobody_listens_to_any_more_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their pipes full: a process whose output is not read to its end is waited for without end."""

    def broken(_: Progress) -> None:
        raise LookupError("no place to show it")

    stands_in(tmp_path, monkeypatch, FLOOD)
    with pytest.raises(ExceptionGroup) as raised:
        run(asyncio.wait_for(drive(Target(url="http://127.0.0.1:9"), planned(4), processes=2, on_progress=broken), 20))
    assert raised.group_contains(LookupError)
    assert not [child for child in psutil.Process().children() if "script.py" in " ".join(child.cmdline())]


def test_a_process_whose_pipe_is_full_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(tmp_path, monkeypatch, FLOOD.replace("os.read(0, frames.START.size)", ""))

    async def test() -> None:
        child = Child(0, Job(target=Target(url="http://127.0.0.1:9"), requests=tuple(planned(1))))
        await child.startup()
        process: Any = child._process
        while not process.stdout._paused:
            await asyncio.sleep(0)
        await asyncio.wait_for(child.shutdown(), 10)
        assert process.returncode == -signal.SIGKILL

    run(test())


def test_a_long_complaint_costs_no_other_process_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(tmp_path, monkeypatch, "sys.stderr.write('x' * 200_000 + '\\nno memory\\n'); sys.exit(3)")
    driven = run(drive(Target(url="http://127.0.0.1:9"), planned(2)))
    assert outcomes(driven.records) == {"unsent": 2}
    assert all("code 3; x" in r.detail and r.detail.endswith("; no memory") for r in driven.records)
    assert all(len(record.detail) < 1000 for record in driven.records)


def test_a_process_whose_starter_is_gone_ends() -> None:
    async def test() -> int:
        async with serving(lambda peer: started.set()) as server:
            child = await asyncio.create_subprocess_exec(
                *CHILD, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT
            )
            assert child.stdin is not None and child.stdout is not None
            job = Job(target=Target(url=server.url), requests=tuple(planned(1)))
            child.stdin.write(frames.encode(job) + frames.START.pack(time.monotonic()))
            await started.wait()
            child.stdin.close()
            await child.stdout.read()
            return await child.wait()

    started = asyncio.Event()
    assert run(test()) == 0


LOADGEN = Path(__file__).parents[1] / "loadgen"
CHILD = (sys.executable, "-m", "serverlesslora_loadgen.client.process")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(LOADGEN)}


def test_silence_about_cold_starts_means_warm_only_where_there_is_a_word_for_them() -> None:
    def asked(peer: Peer) -> None:
        peer.answer(*(["X-ServerlessLoRA-Cold: worker;dur=16.4, adapter;dur=4"] if server_says() else []))

    count = iter(range(100))

    def server_says() -> bool:
        return next(count) == 0

    async def test() -> Driven:
        async with serving(asked) as server:
            return await drive(Target(url=server.url), planned(3, every_s=0.02))

    records = run(test()).records
    assert [record.cold for record in records] == ["worker", "warm", "warm"]
    assert records[0].cold_ms == {"worker": 16.4, "adapter": 4.0}
    said_nothing = [msgspec.structs.replace(record, cold="unknown") for record in records]
    assert settle_cold(said_nothing) == said_nothing
    failed = msgspec.structs.replace(said_nothing[0], status=0, outcome="failed")
    assert settle_cold([records[0], failed])[1].cold == "unknown"  # it never got as far


def test_what_is_sent() -> None:
    peers: list[tuple[str, dict[str, str], bytes]] = []

    def asked(peer: Peer) -> None:
        peers.append((peer.path, peer.headers, peer.body))
        peer.answer()

    async def test() -> None:
        async with serving(asked) as server:
            target = Target(url=server.url + "/some/v1", endpoint="chat", headers={"Authorization": "Bearer k"})
            await drive(target, planned(1, headers={"x-slo-ttft-ms": "250"}))
            assert peers[0][1]["host"] == server.url.removeprefix("http://")

    run(test())
    path, headers, body = peers[0]
    assert path == "/some/v1/chat/completions" and json.loads(body)["model"] == "tea"
    assert headers["authorization"] == "Bearer k" and headers["x-slo-ttft-ms"] == "250"
    assert (headers["accept-encoding"], headers["content-type"]) == ("identity", "application/json")
    assert headers["content-length"] == str(len(body)) and "transfer-encoding" not in headers


class Tls(NamedTuple):
    context: ssl.SSLContext  # of a server
    certificate: Path


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return Tls(context, certificate)


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_written_under_tls(
    tls: Tls, monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """A server that reads nothing of a large body, until it does."""
    went_on: list[float] = []

    async def test() -> Record:
        nonlocal went_on
        async with serving(lambda peer: peer.answer(), tls.context) as server:
            went_on = await deafen(server, 0.3, tls.context)
            large = json.dumps({"model": "tea", "max_tokens": TOKENS, "prompt": "x" * (24 << 20)}).encode()
            async with Asking(Target(url=server.url)) as asking:
                record, _ = await asking.ask(planned(1, body=large)[0])
                went_on[0] -= asking._client.start_at
                return record

    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    record = run(test(), new_loop=new_loop)
    assert record.outcome == "ok" and record.written_s is not None and record.first_byte_s is not None
    assert went_on[0] <= record.written_s <= record.first_byte_s


def test_tls(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    async def on_one_connection() -> list[Record]:
        async with serving(lambda peer: peer.answer(), tls.context) as server, Asking(Target(url=server.url)) as asking:
            return [(await asking.ask(each))[0] for each in planned(3)]

    async def test() -> Driven:
        async with serving(lambda peer: peer.answer(), tls.context) as server:
            return await drive(Target(url=server.url), planned(6, every_s=0.01))

    assert outcomes(run(test()).records) == {"connect": 6}  # who is that?
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    records = run(test()).records
    assert outcomes(records) == {"ok": 6} and records[0].connect_s is not None
    for loop in (uvloop.new_event_loop, asyncio.new_event_loop):
        kept = run(on_one_connection(), new_loop=loop)
        assert [record.connect_s is None for record in kept] == [False, True, True]
        assert all(record.written_s is not None for record in kept)


def test_a_run_outside_the_main_thread() -> None:
    found: list[Counter[str]] = []

    async def test() -> Driven:
        async with serving(lambda peer: peer.answer()) as server:
            return await drive(Target(url=server.url), planned(3))

    thread = threading.Thread(target=lambda: found.append(outcomes(run(test()).records)))
    thread.start()
    thread.join(60)
    assert found == [{"ok": 3}]


def test_an_empty_plan() -> None:
    assert run(drive(Target(url="http://127.0.0.1:9"), [], processes=4)).records == []


@pytest.mark.parametrize(("concurrency", "count"), [(None, 3), (7, 3), (3, 3), (1, 1), (5, 2)])
def test_requests_and_places_are_shared_out(concurrency: int | None, count: int) -> None:
    plan = planned(70)
    hands = deal(plan, concurrency, count)
    assert len(hands) == count
    assert sorted(each.id for requests, _ in hands for each in requests) == list(range(70))
    if concurrency is None:
        assert {len(requests) for requests, _ in hands} <= {23, 24}
    else:
        assert sum(places or 0 for _, places in hands) == concurrency
        assert all(abs(len(requests) / 70 - (places or 0) / concurrency) < 0.05 for requests, places in hands)


def test_a_job_says_no_time_as_that_comes_when_all_are_ready() -> None:
    assert "start_at" not in Job.__struct_fields__


def test_frames_in_any_pieces() -> None:
    sent: list[frames.Frame] = [frames.Ready(), frames.Count(sent=3), frames.Report(1.0, 2.0, 3, False)]
    data = b"".join(frames.encode(frame) for frame in sent)
    for size in (1, 7, len(data)):
        splitter = frames.Splitter()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert [frames.decode(frame) for piece in pieces for frame in splitter.feed(piece)] == sent
