"""What the benches of the control plane measure with: traces, open-loop pacing, the client, and the memory meter."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.meter import Sample, gb_seconds, metered, sample
from bench.replay import (
    Arrival,
    HttpSender,
    Outcome,
    Replay,
    cut,
    find_trace,
    percentile,
    poisson,
    read_trace,
    rename,
    replay,
    scale,
    summary,
)
from tests.server import running, wait_until
from tests.virtual_time import run_in_virtual_time

ROWS = [
    {"timestamp": 61_500, "model": "b", "input_length": 320, "output_length": 64},
    {"timestamp": 500, "model": "a", "input_length": 3, "output_length": 1, "hash_ids": [1]},
]


def test_a_trace_is_read_in_the_order_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "derived").mkdir()
    (tmp_path / "derived" / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setenv("SERVERLESSLORA_TRACES", str(tmp_path))
    wanted = [Arrival(0.5, "a", 3, 1), Arrival(61.5, "b", 320, 64)]
    assert read_trace(find_trace("plain")) == read_trace(find_trace("packed")) == wanted
    with pytest.raises(SystemExit, match="no trace 'other'"):
        find_trace("other")
    (tmp_path / "broken.jsonl").write_text('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"model": "a"}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl:2"):
        read_trace(tmp_path / "broken.jsonl")


def test_windows_scales_and_names() -> None:
    arrivals = [Arrival(0.5, "a", 3, 1), Arrival(60.0, "c", 3200, 640), Arrival(61.5, "b", 320, 64)]
    window = cut(arrivals, 60.0, 120.0)
    assert window == [Arrival(0.0, "c", 3200, 640), Arrival(1.5, "b", 320, 64)]
    assert scale(window, compress=3.0, length=1 / 32) == [Arrival(0.0, "c", 100, 20), Arrival(0.5, "b", 10, 2)]
    assert rename(arrivals, ["f0", "f1", "f2"])[1:] == [Arrival(60.0, "f2", 3200, 640), Arrival(61.5, "f1", 320, 64)]
    with pytest.raises(ValueError, match="3 models and the server 2 functions"):
        rename(arrivals, ["f0", "f1"])


@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10_000), st.integers(1, 10_000)), min_size=1),
    st.floats(0.1, 100),
    st.floats(1e-4, 1),
    st.integers(2, 500),
)
def test_scaling_keeps_every_request_and_the_shape_of_its_arrivals(
    rows: list[tuple[float, int, int]], compress: float, length: float, max_tokens: int
) -> None:
    arrivals = [Arrival(at, "a", prompt, output) for at, prompt, output in sorted(rows)]
    scaled = scale(arrivals, compress=compress, length=length, max_tokens=max_tokens)
    assert len(scaled) == len(arrivals)
    for before, after in zip(arrivals, scaled, strict=True):
        assert after.at_s == pytest.approx(before.at_s / compress)
        assert after.prompt_tokens >= 1
        assert after.output_tokens >= 1
        assert after.prompt_tokens + after.output_tokens <= max_tokens


def test_poisson_arrivals_have_their_rate_and_repeat() -> None:
    arrivals = poisson(20.0, 500.0, ["a", "b"], (7, 3), seed=1)
    assert arrivals == poisson(20.0, 500.0, ["a", "b"], (7, 3), seed=1)
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    assert all(before.at_s <= after.at_s < 500 for before, after in itertools.pairwise(arrivals))
    assert {(each.model, each.prompt_tokens, each.output_tokens) for each in arrivals} == {("a", 7, 3), ("b", 7, 3)}


def test_requests_go_out_at_their_times_however_long_the_answers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = [Arrival(at, "f", 1, 1) for at in (0.0, 0.25, 0.25, 7.0, 7.5)]
    sent: list[tuple[float, float]] = []

    async def send(arrival: Arrival, due: float) -> Outcome:
        sent.append((time.monotonic(), due))
        await asyncio.sleep(100.0 - arrival.at_s)
        return Outcome("f", due, time.monotonic() - due)

    done = run_in_virtual_time(monkeypatch, lambda: replay(arrivals, send))
    assert [due - done.began_at for _, due in sent] == pytest.approx([each.at_s for each in arrivals])
    assert [at for at, _ in sent] == pytest.approx([due for _, due in sent])
    assert done.ended_at - done.began_at == pytest.approx(100.0)
    assert len(done.outcomes) == 5


def test_latency_counts_from_the_intended_time_when_the_client_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer blocks the client: what is due meanwhile is sent at once, and its lateness is told."""
    lags: list[float] = []

    async def send(arrival: Arrival, due: float) -> Outcome:
        lags.append(time.monotonic() - due)
        if arrival.model == "slow":
            loop: Any = asyncio.get_running_loop()
            loop._selector.now += 3.0
        return Outcome(arrival.model, due, lags[-1], 200, time.monotonic() - due, time.monotonic() - due)

    arrivals = [Arrival(0.0, "slow", 1, 1), Arrival(1.0, "f", 1, 1), Arrival(2.0, "f", 1, 1)]
    done = run_in_virtual_time(monkeypatch, lambda: replay(arrivals, send))
    assert lags == pytest.approx([0.0, 2.0, 1.0])
    assert not done.is_valid
    assert summary(done, slo_s=1.5)["slo_attainment"] == pytest.approx(1 / 3, abs=1e-3)


def test_a_summary_counts_everything_once() -> None:
    outcomes = [
        Outcome("f", 0.0, 0.0, 200, 0.2, 1.0, 10, 5, "hot"),
        Outcome("f", 0.0, 0.0, 200, 3.0, 4.0, 10, 5, "worker"),
        Outcome("f", 0.0, 0.0, 200, 0.1, 4.0, 10, 5, "hot", error="the worker ended"),
        Outcome("f", 0.0, 0.0, 503, e2e_s=0.1, retry_after="4", error="busy"),
        Outcome("f", 0.0, 0.0, error="refused"),
    ]
    numbers = summary(Replay(0.0, 5.0, outcomes), slo_s=1.0)
    assert (numbers["sent"], numbers["answered"], numbers["shed"], numbers["failed"]) == (5, 2, 1, 2)
    assert numbers["slo_attainment"] == 0.2
    assert numbers["first_token_within_s"]["5"] == 0.4
    assert numbers["ttft_s"] == {"mean": 1.6, "p50": 0.2, "p90": 3.0, "p99": 3.0}
    assert numbers["rungs"] == {"hot": 1, "worker": 1}
    assert numbers["output_tokens"] == 10
    assert numbers["valid"]
    assert not Replay(0.0, 1.0, []).is_valid


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert sum(each <= found for each in values) >= len(values) * percent / 100
    assert sum(each < found for each in values) < len(values) * percent / 100
    assert math.isnan(percentile([], percent))


# --- the client, against a server that plays one


async def completions(request: Request) -> Response:
    body = await request.json()
    if body["model"] == "busy":
        return JSONResponse({"error": {"message": "no"}}, 503, {"Retry-After": "7"})
    assert request.headers["x-slo-ttft-ms"] == "2500"
    assert (body["min_tokens"], body["ignore_eos"], len(body["prompt"])) == (body["max_tokens"], True, 6)
    choices = [{"prompt_token_ids": body["prompt"], "token_ids": [], "text": ""}]
    choices += [{"token_ids": [1], "text": ""} for _ in range(body["max_tokens"])]
    events = [json.dumps({"choices": [choice], "usage": None}) for choice in choices]
    if body["model"] == "breaks":
        events = [*events[:2], json.dumps({"error": {"message": "the worker ended"}})]
    else:
        count = 1 if body["model"] == "short" else body["max_tokens"]
        events.append(json.dumps({"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": count}}))

    async def stream() -> object:
        for event in [*events, "[DONE]"]:
            yield f"data: {event}\n\n"

    headers = {} if body["model"] == "hot" else {"x-serverlesslora-cold": "worker;dur=16.4, adapter;dur=4.3"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)  # type: ignore[arg-type]


def test_the_client_reads_tokens_rungs_and_refusals() -> None:
    models = ["hot", "cold", "short", "breaks", "busy"]

    async def run(url: str) -> dict[str, Outcome]:
        async with HttpSender(url, slo_s=2.5) as send:
            done = await replay([Arrival(0.0, model, 6, 3) for model in models], send)
        return {each.function: each for each in done.outcomes}

    with running(Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])) as url:
        seen = asyncio.run(run(url))
    assert {name for name, each in seen.items() if each.is_answered} == {"hot", "cold"}
    assert (seen["hot"].tokens, seen["hot"].prompt_tokens, seen["hot"].rung) == (3, 6, "hot")
    assert seen["cold"].rung == "worker"
    hot = seen["hot"]
    assert hot.ttft_s is not None and hot.e2e_s is not None and 0 < hot.ttft_s <= hot.e2e_s
    assert "1 tokens came, 3 were asked for" in seen["short"].error
    assert "the worker ended" in seen["breaks"].error
    assert (seen["busy"].status, seen["busy"].retry_after, seen["busy"].is_shed) == (503, "7", True)


def test_a_server_that_is_not_there_is_a_failure_and_no_exception() -> None:
    async def run() -> Outcome:
        async with HttpSender("http://127.0.0.1:1") as send:
            return (await replay([Arrival(0.0, "f", 1, 1)], send)).outcomes[0]

    outcome = asyncio.run(run())
    assert outcome.status == 0
    assert outcome.error
    assert not outcome.is_shed


# --- the meter


def held(*points: tuple[float, int]) -> list[Sample]:
    return [Sample(at, size, 0, 0, 1, 0.0) for at, size in points]


def test_memory_is_integrated_over_the_asked_time_only() -> None:
    samples = held((10.0, 2 * 10**9), (20.0, 4 * 10**9), (30.0, 4 * 10**9))
    assert gb_seconds(samples, 10.0, 20.0) == pytest.approx(30.0)
    assert gb_seconds(samples, 15.0, 25.0) == pytest.approx(5 * 3.5 + 5 * 4.0)
    assert gb_seconds(samples, 0.0, 40.0) == pytest.approx(20.0 + 30.0 + 40.0 + 40.0)
    assert gb_seconds(samples, 12.0, 13.0) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="no sample"):
        gb_seconds([], 0.0, 1.0)


MIB = 1 << 20
HOLDER = """
import mmap, os, sys
fd = os.memfd_create("weights")
os.ftruncate(fd, 64 << 20)
shared = mmap.mmap(fd, 64 << 20)
shared[:] = bytes(64 << 20)
private = bytearray(b"x") * (32 << 20)
if sys.argv[1] == "mapped": os.close(fd)
if sys.argv[1] == "open": shared.close()
if os.fork() == 0: sys.stdin.read(); os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["mapped", "open", "both"])
def test_shared_memory_counts_once_and_private_memory_by_its_share(way: str) -> None:
    """Two processes that share 64 MiB by descriptor and, since a fork, 32 MiB of private pages."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        with metered(process.pid, 0.01) as meter:
            wait_until(lambda: len(meter.samples()) >= 2)
            seen = meter.samples()[-1]
        assert seen.processes == 2
        assert seen.shared == 64 * MIB
        assert 32 * MIB < seen.private < 60 * MIB
        assert seen.held == seen.private + seen.files + seen.shared
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
    wait_until(lambda: sample(process.pid).processes == 0)
