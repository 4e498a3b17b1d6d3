"""Servers that are fast and wrong: each must be noticed, named for what it does, and never get a green verdict."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Collection, Iterator, Sequence

import msgspec
import pytest

from serverlesslora_loadgen.analysis.build import Run, make_result
from serverlesslora_loadgen.client.drive import Driven, drive
from serverlesslora_loadgen.client.prompts import plan
from serverlesslora_loadgen.environment import environment
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.record import Failure, Record
from serverlesslora_loadgen.result import Limits, Result, Setup, TraceFacts
from serverlesslora_loadgen.trace import TraceRequest
from tests.loadgen_servers import FAULTS, HONEST, SHEDS, STALL_S, hanging_up_server, misbehaving_server, right_answer

TOKENS = 6
GENEROUS = Limits(ttft_s=30.0, tpot_s=30.0, e2e_s=60.0)  # no server here is slow; what it says is what counts


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with misbehaving_server() as url:
        yield url


def target_of(url: str) -> Target:
    return Target(url=url, stall_s=STALL_S / 2, timeout_s=2.0)


def requests_to(models: Sequence[str], each: int) -> list[TraceRequest]:
    return [
        TraceRequest(timestamp=2.0 * number, input_length=5, output_length=TOKENS, model=model)
        for number, model in enumerate(models[i % len(models)] for i in range(each * len(models)))
    ]


def with_right_answer(planned: Planned) -> Planned:
    return msgspec.structs.replace(planned, golden=right_answer(json.loads(planned.body)))


def ask(url: str, requests: Sequence[TraceRequest], *, verify: Collection[str] = ()) -> Driven:
    """The answers of the models to `verify` are held against the right ones."""
    target = target_of(url)
    planned = plan(requests, target)
    return asyncio.run(drive(target, [with_right_answer(each) if each.model in verify else each for each in planned]))


# --- what each fault is called


@pytest.fixture(scope="module")
def records(url: str) -> dict[str, list[Record]]:
    """Of all faults, asked at the same time: two requests each."""
    models = [HONEST, *FAULTS, *SHEDS]
    found: dict[str, list[Record]] = {model: [] for model in models}
    for record in ask(url, requests_to(models, 2), verify=(HONEST, "wrong-adapter")).records:
        found[record.model].append(record)
    return found


@pytest.mark.parametrize(("fault", "failure"), FAULTS.items())
def test_a_fault_is_called_by_its_name(records: dict[str, list[Record]], fault: str, failure: Failure) -> None:
    assert [(record.outcome, record.failure) for record in records[fault]] == [("failed", failure)] * 2
    assert all(record.detail for record in records[fault])


def test_an_honest_answer_among_them_is_right(records: dict[str, list[Record]]) -> None:
    assert [(record.outcome, record.failure, record.detail) for record in records[HONEST]] == [("ok", None, "")] * 2


def test_shedding_is_no_failure_and_its_manners_are_kept(records: dict[str, list[Record]]) -> None:
    polite, rude = (records[model] for model in SHEDS)
    assert [(record.outcome, record.status, record.retry_after_s) for record in polite] == [("shed", 429, 2.0)] * 2
    assert [(record.outcome, record.status, record.retry_after_s) for record in rude] == [("shed", 503, None)] * 2


def test_without_the_right_answer_a_wrong_adapter_looks_right(url: str) -> None:
    """Why people should record golden answers."""
    driven = ask(url, requests_to(["wrong-adapter"], 2))
    assert [record.outcome for record in driven.records] == ["ok", "ok"]


def test_who_hangs_up_fails_every_request() -> None:
    with hanging_up_server() as url:
        driven = ask(url, requests_to([HONEST], 3))
    assert [(record.outcome, record.failure) for record in driven.records] == [("failed", "connect")] * 3


def test_nobody_there_is_a_failure_of_every_request() -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        driven = ask(f"http://127.0.0.1:{closed.getsockname()[1]}", requests_to([HONEST], 3))
    assert [(record.outcome, record.failure) for record in driven.records] == [("failed", "connect")] * 3


# --- the verdict


def judge(url: str, model: str, count: int = 40, *, verify: bool = False) -> Result:
    requests = requests_to([model], count)
    driven = ask(url, requests, verify=[model] if verify else ())
    assert len(driven.records) == count
    facts = TraceFacts(name="faults", sha256="", requests=count, adapters=1, seconds=driven.seconds)
    return make_result(
        Run(
            title="faults",
            mode="open",
            setup=Setup(
                trace=facts,
                target={"url": url},
                command=[],
                environment=environment(),
                limits=GENEROUS,
                started_at="2026-01-01T00:00:00+00:00",
                verified=verify,
            ),
            requests=requests,
            # What is judged here is the server; how late this machine was, while other tests run, is another matter.
            records=[on_time(record) for record in driven.records],
            seconds=driven.seconds,
            processes=driven.processes,
            cpu_s=driven.cpu_s,
            late_sockets=driven.late_sockets,
            limits=GENEROUS,
        )
    )


def on_time(record: Record) -> Record:
    return msgspec.structs.replace(record, intended_s=record.written_s or record.intended_s)


def test_an_honest_server_passes(url: str) -> None:
    result = judge(url, HONEST, verify=True)
    assert result.verdict.reasons == []
    assert result.verdict.valid and result.verdict.passed
    assert result.whole.attainment.value == 1.0


def test_the_wrong_adapter_fails_even_once_in_ten_times(url: str) -> None:
    result = judge(url, "wrong-adapter/10", verify=True)
    assert result.whole.counts.failures == {"wrong-answer": 4}
    assert result.verdict.valid and not result.verdict.passed
    assert result.whole.attainment.value == pytest.approx(0.9)
    assert result.verdict.reasons


def test_a_dropped_last_chunk_fails(url: str) -> None:
    result = judge(url, "drops-last-chunk/10")
    assert result.whole.counts.failures == {"no-finish-reason": 4}
    assert result.verdict.valid and not result.verdict.passed


def test_a_missing_end_fails(url: str) -> None:
    result = judge(url, "no-done/10")
    assert result.whole.counts.failures == {"truncated": 4}
    assert result.verdict.valid and not result.verdict.passed


def test_who_sheds_nine_of_ten_fails_however_fast_the_tenth_is(url: str) -> None:
    result = judge(url, "sheds-most")
    assert (result.whole.counts.shed, result.whole.counts.ok, result.whole.counts.failed) == (36, 4, 0)
    assert result.verdict.valid and not result.verdict.passed
    assert result.whole.attainment.value == pytest.approx(0.1)


def test_usage_that_lies_fails(url: str) -> None:
    result = judge(url, "usage-one-more/10")
    assert result.whole.counts.failures == {"usage-mismatch": 4}
    assert not result.verdict.passed
