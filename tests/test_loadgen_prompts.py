"""What is sent for each request of a trace, before anything is."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen.client.golden import Golden, Goldens
from serverlesslora_loadgen.client.prompts import plan
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.trace import Message, TraceRequest

TARGET = Target(url="http://127.0.0.1:1")


def body(planned: Planned) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(planned.body)
    return found


def one(target: Target = TARGET, **fields: Any) -> Planned:
    request = TraceRequest(timestamp=1500, input_length=5, output_length=3, model="tea")
    return plan([msgspec.structs.replace(request, **fields)], target)[0]


def test_token_ids_of_exactly_the_asked_length() -> None:
    planned = one(class_="Bursty", deadline_ms=250)
    sent = body(planned)
    ids = sent.pop("prompt")
    assert sent == {
        "model": "tea", "max_tokens": 3, "min_tokens": 3, "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0.0, "seed": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    assert len(ids) == 5 and all(300 <= each < 4000 for each in ids)
    assert (planned.id, planned.at_s, planned.class_, planned.deadline_s) == (0, 1.5, "Bursty", 0.25)
    assert planned.headers == {} and planned.golden is None


def test_what_other_servers_do_not_know_is_left_out() -> None:
    target = msgspec.structs.replace(TARGET, ignore_eos=False, token_counts=False, prompt="text")
    assert body(one(target)).keys() == {
        "model", "prompt", "max_tokens", "stream", "stream_options", "temperature", "seed",
    }  # fmt: skip


def test_deadlines_are_told_in_the_header_that_was_named() -> None:
    target = msgspec.structs.replace(TARGET, deadline_header="x-slo-ttft-ms")
    assert one(target, deadline_ms=250.4).headers == {"x-slo-ttft-ms": "250"}
    assert one(target).headers == {}


def test_words_of_the_trace_are_sent_as_they_are() -> None:
    assert body(one(prompt="Say tea"))["prompt"] == "Say tea"
    messages = (Message("system", "Be brief"), Message("user", "Tea?"))
    chat = msgspec.structs.replace(TARGET, endpoint="chat")
    assert body(one(chat, messages=messages))["messages"] == [
        {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Tea?"},
    ]  # fmt: skip
    assert body(one(chat, prompt="Tea?"))["messages"] == [{"role": "user", "content": "Tea?"}]
    with pytest.raises(WorkloadError, match=r"request 0 .* conversation"):
        one(messages=messages)


def test_made_up_text_has_as_many_words_as_are_worth_the_tokens() -> None:
    target = msgspec.structs.replace(TARGET, prompt="text", tokens_per_word=2.5)
    assert len(body(one(target, input_length=100))["prompt"].split()) == 40
    chat = msgspec.structs.replace(target, endpoint="chat")
    assert len(body(one(chat, input_length=100))["messages"][0]["content"].split()) == 40


@pytest.mark.parametrize(("field", "value"), [("input_length", 0), ("output_length", 0)])
def test_nothing_is_asked_that_servers_refuse(field: str, value: int) -> None:
    planned = one(TARGET, **{field: value})
    assert planned.input_tokens >= 1 and planned.output_tokens >= 1
    assert len(body(planned)["prompt"]) >= 1 and body(planned)["max_tokens"] >= 1


lengths = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 50)), min_size=1, max_size=8)


@given(lengths, st.integers(0, 3))
def test_the_same_seed_gives_the_same_bytes(shapes: list[tuple[int, int]], seed: int) -> None:
    requests = [
        TraceRequest(timestamp=i, input_length=a, output_length=b, model="tea") for i, (a, b) in enumerate(shapes)
    ]
    first, again, other = (plan(requests, TARGET, seed=s) for s in (seed, seed, seed + 1))
    assert first == again
    assert [len(body(planned)["prompt"]) for planned in first] == [a for a, _ in shapes]
    assert [p.body for p in first] != [p.body for p in other]
    prompts = [tuple(body(planned)["prompt"]) for planned in first if planned.input_tokens > 3]
    assert len(set(prompts)) == len(prompts)  # nothing is shared that the trace does not say is


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-5, 5), min_size=1, max_size=6), st.integers(1, 512)), min_size=2, max_size=6
    ),
    st.sampled_from([1.0, 1 / 32, 0.01, 2.5]),
    st.sampled_from(["ids", "text"]),
)  # fmt: skip
def test_equal_leading_blocks_are_equal_prefixes(
    shapes: list[tuple[list[int], int]], scale: float, style: str
) -> None:  # fmt: skip
    """As in Mooncake's traces: 512 tokens per id, the last block not full; lengths scaled afterwards."""
    full = [(list(range(100, 104)), 512)]  # one whose blocks are all full tells how long a block is
    requests = [
        TraceRequest(
            timestamp=0,
            input_length=max(1, round(scale * (512 * (len(ids) - 1) + last))),
            output_length=1,
            model="tea",
            hash_ids=tuple(ids),
        )
        for ids, last in full + shapes
    ]
    target = msgspec.structs.replace(TARGET, prompt=style)
    prompts = []
    for request, planned in zip(requests, plan(requests, target, seed=1), strict=True):
        prompt = body(planned)["prompt"]
        prompts.append((request, prompt.split() if style == "text" else prompt))
        assert len(prompts[-1][1]) == request.input_length
    block = requests[0].input_length / 4
    for one_request, one_prompt in prompts:
        for other_request, other_prompt in prompts:
            shared = 0
            for a, b in zip(one_request.hash_ids or (), other_request.hash_ids or (), strict=False):
                if a != b:
                    break
                shared += 1
            length = min(round(shared * block), len(one_prompt), len(other_prompt))
            assert one_prompt[:length] == other_prompt[:length]


def test_golden_answers_are_held_against_what_was_asked() -> None:
    requests = [
        TraceRequest(timestamp=0, input_length=2, output_length=length, model=model, prompt=prompt)
        for model, prompt, length in [("tea", "a", 3), ("coffee", "a", 3), ("tea", "b", 3), ("tea", "a", 4)]
    ]
    goldens = Goldens([Golden(model="tea", prompt="a", max_tokens=3, text="leaf")])
    assert [planned.golden for planned in plan(requests, TARGET, goldens=goldens)] == ["leaf", None, None, None]
    with pytest.raises(WorkloadError, match=r"0\.7 .* temperature 0"):
        plan(requests, msgspec.structs.replace(TARGET, temperature=0.7), goldens=goldens)


def test_a_request_that_names_nobody() -> None:
    with pytest.raises(WorkloadError, match=r"request 0 .* no adapter"):
        one(model="")


@pytest.mark.parametrize(
    "fields", [{"token_ids": (5, 5)}, *({"tokens_per_word": value} for value in (0.0, -1.0, math.nan, math.inf))]
)
def test_targets_that_leave_nothing_to_draw_from(fields: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError):
        one(msgspec.structs.replace(TARGET, prompt="text", **fields))
