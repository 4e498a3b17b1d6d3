"""Golden answers: taken from a server that nobody else asks, held against those it gives under load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serverlesslora_loadgen.client.drive import drive
from serverlesslora_loadgen.client.golden import (
    Golden,
    choose,
    read_goldens,
    record_goldens,
    write_goldens,
)
from serverlesslora_loadgen.client.prompts import plan
from serverlesslora_loadgen.errors import TargetError, TraceError, WorkloadError
from serverlesslora_loadgen.plan import Target
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.trace import Message, TraceRequest
from tests.loadgen_peer import Peer, run, serving

REQUESTS = [
    TraceRequest(timestamp=10 * i, input_length=4, output_length=3, model=model, prompt=prompt)
    for i, (model, prompt) in enumerate([("tea", "a"), ("coffee", "a"), ("tea", "a"), ("tea", "b"), ("coffee", None)])
]


def mixed_up(peer: Peer) -> None:
    """Says whose answer it is, and gives another adapter's."""
    body = json.loads(peer.body)
    asked = body["model"]
    body["model"] = "coffee" if asked == "tea" else "tea"
    peer.body = json.dumps(body).encode()
    chunk = peer.chunk
    peer.chunk = lambda data: chunk(data.replace(body["model"].encode(), asked.encode()))  # type: ignore[method-assign]
    peer.answer()
    del peer.chunk


@pytest.mark.parametrize("style", ["ids", "text"])
def test_the_wrong_adapter_is_found_out(tmp_path: Path, style: str) -> None:
    async def test() -> tuple[list[Record], list[Record], list[Golden]]:
        async with serving(lambda peer: peer.answer()) as right, serving(mixed_up) as wrong:
            target = Target(url=right.url, prompt=style)  # type: ignore[arg-type]
            goldens = await record_goldens(target, plan(REQUESTS, target, seed=3))
            write_goldens(tmp_path / "golden.jsonl", goldens)
            found = read_goldens(tmp_path / "golden.jsonl")
            planned = plan(REQUESTS, target, seed=3, goldens=found)
            assert all(each.golden is not None for each in planned)
            good = await drive(target, planned)
            bad = await drive(msgspec.structs.replace(target, url=wrong.url), planned)
            return good.records, bad.records, goldens

    good, bad, goldens = run(test())
    assert [record.outcome for record in good] == ["ok"] * 5
    assert [record.failure for record in bad] == ["wrong-answer"] * 5
    assert "'t0t1t2' was expected, 'c0c1c2' came" in bad[0].detail
    assert [(each.model, each.text) for each in goldens] == [
        ("tea", "t0t1t2"), ("coffee", "c0c1c2"), ("tea", "t0t1t2"), ("coffee", "c0c1c2"),
    ]  # fmt: skip


def test_conversations(tmp_path: Path) -> None:
    asked = TraceRequest(timestamp=0, input_length=4, output_length=3, model="tea", messages=(Message("user", "a"),))

    async def test() -> Any:
        async with serving(lambda peer: peer.answer()) as server:
            target = Target(url=server.url, endpoint="chat")
            write_goldens(tmp_path / "golden.jsonl", await record_goldens(target, plan([asked], target)))
            return plan([asked], target, goldens=read_goldens(tmp_path / "golden.jsonl"))

    assert [each.golden for each in run(test())] == ["t0t1t2"]
    assert json.loads((tmp_path / "golden.jsonl").read_text()) == {
        "model": "tea", "max_tokens": 3, "text": "t0t1t2", "messages": [{"role": "user", "content": "a"}],
    }  # fmt: skip


def test_a_few_of_each_adapter_are_enough() -> None:
    planned = plan(REQUESTS, Target(url="http://127.0.0.1:1"))
    assert [each.id for each in choose(planned, per_adapter=1)] == [0, 1]
    assert [each.id for each in choose(planned, per_adapter=None)] == [0, 1, 3, 4]


def test_what_is_unsound_is_no_measure_for_others() -> None:
    async def test(target: Target) -> None:
        async with serving(lambda peer: peer.refuse("503 Busy")) as server:
            target = msgspec.structs.replace(target, url=server.url)
            await record_goldens(target, plan(REQUESTS, target))

    with pytest.raises(TargetError, match=r"request 0 \(shed\)"):
        run(test(Target(url="")))
    with pytest.raises(WorkloadError, match="temperature"):
        run(test(Target(url="", temperature=0.5)))


@pytest.mark.parametrize("line", ["{", '{"model":"a"}', '{"model":"a","max_tokens":1,"text":"x"}'])
def test_what_is_no_golden_answer(tmp_path: Path, line: str) -> None:
    path = tmp_path / "golden.jsonl"
    path.write_text('{"model":"a","max_tokens":1,"text":"x","prompt":[1,2]}\n\n' + line + "\n")
    with pytest.raises(TraceError, match="jsonl:3"):
        read_goldens(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_goldens(tmp_path / "none.jsonl")


def test_golden_answers_by_adapter_prompt_and_length(tmp_path: Path) -> None:
    path = tmp_path / "golden.jsonl"
    write_goldens(path, [Golden(model="a", prompt=(1, 2), max_tokens=1, text="x")])
    goldens = read_goldens(path)
    assert len(goldens) == 1 and goldens.text("a", (1, 2), 1) == "x"
    assert goldens.text("b", (1, 2), 1) is goldens.text("a", (1, 3), 1) is goldens.text("a", (1, 2), 2) is None
