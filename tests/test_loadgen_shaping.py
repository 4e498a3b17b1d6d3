"""From a trace to what is replayed of it: never thinned, and everything that was done is told."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from serverlesslora_loadgen.classes import adapter_facts
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.workload import Workload, generate, parse_classes
from serverlesslora_loadgen.shaping import Shape, read_map, select, shape
from serverlesslora_loadgen.trace import Message, TraceRequest


def request(at_s: float, model: str = "a", prompt: int = 10, answer: int = 4, **more: Any) -> TraceRequest:
    return TraceRequest(timestamp=1000 * at_s, input_length=prompt, output_length=answer, model=model, **more)


def made(**more: Any) -> list[TraceRequest]:
    return generate(Workload(**{"adapters": 12, "rate_rps": 1, "duration_s": 1800, **more}))


def test_nothing_asked_for_changes_nothing_but_the_missing_class() -> None:
    requests = made()
    shaped = shape(requests, Shape())
    assert shaped.requests == requests
    assert shaped.notes == []
    bare = [request(at, "a") for at in range(20)] + [request(20, "rare")]
    assert [each.class_ for each in shape(bare, Shape()).requests] == ["Predictable"] * 20 + [None]


def test_a_window_holds_its_beginning_and_not_its_end() -> None:
    shaped = shape([request(at) for at in (0, 9.999, 10, 15, 19.999, 20, 30)], Shape(start_s=10, duration_s=10))
    assert [each.timestamp for each in shaped.requests] == pytest.approx([0, 5000, 9999])
    assert shaped.notes == ["window from 10 s to 20 s: 3 of 7 requests"]
    assert [each.timestamp for each in shape([request(5), request(7)], Shape(start_s=6)).requests] == [1000]


@pytest.mark.parametrize("by", [Shape(start_s=31), Shape(duration_s=1, start_s=11)])
def test_a_window_without_requests_is_told(by: Shape) -> None:
    with pytest.raises(WorkloadError, match="it has 2, the last at 30 s"):
        shape([request(0), request(30)], by)
    with pytest.raises(WorkloadError, match="it has 0"):
        shape([], by)


def test_compression_keeps_every_gap_ratio_and_class() -> None:
    requests = made(classes=parse_classes("mixed"))
    shaped = shape(requests, Shape(speedup=2.5))
    assert [each.timestamp for each in shaped.requests] == pytest.approx([each.timestamp / 2.5 for each in requests])
    for before, after in zip(adapter_facts(requests), adapter_facts(shaped.requests), strict=True):
        assert (before.model, before.n, before.class_) == (after.model, after.n, after.class_)
        assert before.cv == pytest.approx(after.cv)
    assert len(shaped.notes) == 1 and "timer of the server has to be divided by it" in shaped.notes[0]


def test_the_end_is_cut_off_and_nothing_else() -> None:
    requests = made()
    shaped = shape(requests, Shape(max_requests=100))
    assert [each.timestamp for each in shaped.requests] == [each.timestamp for each in requests[:100]]
    assert shaped.notes[0] == "cut off after the first 100 of 1800 requests"
    assert shape(requests, Shape(max_requests=1800)).notes == []


# --- which adapters


def whole(requests: list[TraceRequest], chosen: list[TraceRequest]) -> bool:
    """Each adapter is there with all of its requests, or not at all."""
    before, after = (Counter(each.model for each in some) for some in (requests, chosen))
    return all(after[model] in (0, n) for model, n in before.items())


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
def test_a_rate_is_met_by_whole_adapters(rate: float) -> None:
    requests = made(adapters=40)
    shaped = shape(requests, Shape(duration_s=1800, rate_by_selection=rate))
    assert whole(requests, shaped.requests)
    assert len(shaped.requests) / 1800 == pytest.approx(rate, rel=0.01)
    assert any(f"{rate:g} requests per second asked for by selection" in note for note in shaped.notes)


def test_the_rate_of_a_selection_is_that_of_the_replay() -> None:
    requests = made(adapters=40)
    shaped = shape(requests, Shape(duration_s=1800, rate_by_selection=1.2, speedup=4))
    assert len(shaped.requests) / (1800 / 4) == pytest.approx(1.2, rel=0.01)


def test_a_window_longer_than_the_trace_makes_its_rate_no_lower() -> None:
    requests = made(adapters=40)
    asked = Shape(rate_by_selection=0.3)
    long = shape(requests, replace(asked, duration_s=36_000))
    assert long.requests == shape(requests, asked).requests
    assert len(long.requests) / 1800 == pytest.approx(0.3, rel=0.02)
    assert "0.3 requests per second asked for by selection, 0.3 found" in long.notes
    silent = [*(request(at) for at in range(10)), *(request(100 + at, "b") for at in range(10))]
    part = shape(silent, Shape(duration_s=50, rate_by_selection=0.2))  # the trace goes on: silence counts
    assert "0.2 requests per second asked for by selection, 0.2 found" in part.notes


def test_a_rate_beyond_the_trace_takes_all_of_it_and_says_what_was_found() -> None:
    requests = made()
    shaped = shape(requests, Shape(duration_s=1800, rate_by_selection=50))
    assert len(shaped.requests) == len(requests)
    assert "50 requests per second asked for by selection, 1 found" in shaped.notes


def test_so_many_adapters_by_seed() -> None:
    requests = made()
    chosen = [shape(requests, Shape(functions=4, seed=seed)).requests for seed in (1, 1, 2, 3)]
    names = [{each.model for each in some} for some in chosen]
    assert names[0] == names[1] and len({frozenset(each) for each in names}) > 1
    assert all(len(each) == 4 for each in names)
    assert all(whole(requests, each) for each in chosen)
    both = shape(requests, Shape(functions=4, rate_by_selection=0.5, duration_s=1800)).requests
    assert len({each.model for each in both}) == 4
    assert len(both) / 1800 == pytest.approx(0.5, rel=0.05)
    with pytest.raises(WorkloadError, match="13 adapters are asked for and the trace has 12"):
        shape(requests, Shape(functions=13))


@settings(max_examples=150)
@given(
    numbers=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    total=st.integers(1, 120),
    seed=st.integers(0, 20),
    data=st.data(),
)
def test_no_single_step_comes_nearer(numbers: list[int], total: int, seed: int, data: st.DataObject) -> None:
    functions = data.draw(st.none() | st.integers(1, len(numbers)))
    chosen = select(np.array(numbers), functions=functions, total=total, seed=seed)
    assert chosen == sorted(set(chosen)) and chosen
    assert functions is None or len(chosen) == functions
    off = abs(sum(numbers[i] for i in chosen) - total)
    others = [i for i in range(len(numbers)) if i not in chosen]
    steps = [set(chosen) - {i} | {j} for i, j in itertools.product(chosen, others)]
    if functions is None:
        steps += [set(chosen) | {j} for j in others] + [set(chosen) - {i} for i in chosen if len(chosen) > 1]
    assert all(abs(sum(numbers[i] for i in step) - total) >= off for step in steps)


# --- classes


def test_the_class_is_that_of_what_is_replayed() -> None:
    """Steady in the first minute, two heaps with a long silence afterwards."""
    steady = [request(3 * i) for i in range(20)]
    heaps = [request(100 + at) for at in (*np.arange(0, 1, 0.02), *np.arange(5000, 5001, 0.02))]
    requests = steady + heaps
    assert {each.class_ for each in shape(requests, Shape(duration_s=60)).requests} == {"Predictable"}
    assert {each.class_ for each in shape(requests, Shape()).requests} == {"Bursty"}


def test_words_of_the_trace_are_kept_and_contradictions_told() -> None:
    told = [request(i, "a", class_="Bursty") for i in range(20)]
    shaped = shape(told, Shape())
    assert {each.class_ for each in shaped.requests} == {"Bursty"}
    assert shaped.notes == ["1 adapters are of another class in what is replayed than the trace says; its word is kept"]
    free = shape([request(i, "a", class_="gold") for i in range(20)], Shape())
    assert {each.class_ for each in free.requests} == {"gold"} and free.notes == []


# --- names


def test_a_name_for_requests_that_have_none() -> None:
    requests = [request(0, ""), request(1, "a"), request(2, "")]
    assert [each.model for each in shape(requests, Shape(model="base")).requests] == ["base", "a", "base"]
    both = shape(requests, Shape(model="base", models={"a": "x", "base": "y"})).requests
    assert [each.model for each in both] == ["y", "x", "y"]


def test_names_by_a_map_or_in_order() -> None:
    requests = [request(0, "b"), request(1, "a"), request(2, "b")]
    by_map = shape(requests, Shape(models={"a": "x", "b": "y", "c": "z"}))
    assert [each.model for each in by_map.requests] == ["y", "x", "y"]
    in_order = shape(requests, Shape(models=("one", "two", "three")))
    assert [each.model for each in in_order.requests] == ["two", "one", "two"]
    assert shape([request(0, "")], Shape(models=("only",))).requests[0].model == "only"
    with pytest.raises(WorkloadError, match="says nothing of 'a', 1 of the trace's 2 adapters"):
        shape(requests, Shape(models={"b": "y"}))
    with pytest.raises(WorkloadError, match=r"2 adapters and 1 are served.*functions = 1"):
        shape(requests, Shape(models=("one",)))


def test_adapters_that_become_one_are_told() -> None:
    shaped = shape([request(0, "a"), request(1, "b")], Shape(models={"a": "x", "b": "x"}))
    assert len(shaped.notes) == 1 and "gives 1 adapters the name of another" in shaped.notes[0]


def test_adapters_that_become_one_have_the_class_they_have_together() -> None:
    """Six take turns of a minute and a half: each alone is Bursty, all together are as even as can be."""
    at = [(lap, i, n) for lap in range(3) for i in range(6) for n in range(30)]
    heaps = [request(100 * (6 * lap + i) + 3 * n, f"m{i}") for lap, i, n in at]
    alone, together = shape(heaps, Shape()), shape(heaps, Shape(models={f"m{i}": "one" for i in range(6)}))
    facts = adapter_facts(together.requests)
    assert {each.class_ for each in together.requests} == {facts[0].class_} == {"Predictable"}
    assert {each.class_ for each in alone.requests} == {"Bursty"}
    told = [replace(each, class_="Predictable") for each in heaps]
    merged = shape(told, Shape(models={"m0": "one", "m1": "one"} | {f"m{i}": f"m{i}" for i in range(2, 6)})).requests
    classes = {each.model: each.class_ for each in merged}
    assert classes["m3"] == "Predictable"  # the trace's word, as nothing became of it
    assert classes["one"] == next(each.class_ for each in adapter_facts(merged) if each.model == "one") != "Predictable"
    free = [replace(each, class_="gold") for each in heaps]
    assert {each.class_ for each in shape(free, Shape(models={f"m{i}": "one" for i in range(6)})).requests} == {"gold"}


@pytest.mark.parametrize(
    ("name", "text", "models"),
    [
        ("a.json", '{"a": "x"}', {"a": "x"}),
        ("a.json", '["x", "y"]', ("x", "y")),
        ("a.json", '{"models": ["x"]}', ("x",)),
        ("a.toml", 'a = "x"\n"b c" = "y"', {"a": "x", "b c": "y"}),
        ("a.toml", 'models = ["x", "y"]', ("x", "y")),
    ],
)
def test_maps_are_read(tmp_path: Path, name: str, text: str, models: object) -> None:
    (tmp_path / name).write_text(text)
    assert read_map(tmp_path / name) == models


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("a.json", '{"a": 1}'), ("a.toml", "a ="), ("a.json", "3")]
)
def test_maps_that_are_none(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(WorkloadError, match="maps no adapters"):
        read_map(tmp_path / name)
    with pytest.raises(WorkloadError, match="cannot read the map"):
        read_map(tmp_path / "none")


# --- lengths


def test_both_lengths_are_scaled_to_at_least_a_token() -> None:
    shaped = shape([request(0, prompt=1000, answer=100), request(1, prompt=8, answer=0)], Shape(length_scale=1 / 32))
    assert [(each.input_length, each.output_length) for each in shaped.requests] == [(31, 3), (1, 1)]
    assert "lengths times 0.03125, at least one token" in shaped.notes


def test_what_is_too_long_is_cut_from_the_prompt_first() -> None:
    requests = [request(0, prompt=90, answer=20), request(1, prompt=50, answer=300), request(2, prompt=60, answer=40)]
    shaped = shape(requests, Shape(max_tokens=100))
    assert [(each.input_length, each.output_length) for each in shaped.requests] == [(80, 20), (1, 99), (60, 40)]
    assert shaped.notes == ["2 requests shortened to 100 tokens, prompt and answer together"]


def test_given_prompts_stay_as_they_are() -> None:
    requests = [
        TraceRequest(timestamp=0, input_length=64, output_length=64, prompt="hello"),
        TraceRequest(timestamp=1, input_length=64, output_length=64, messages=(Message("user", "hello"),)),
    ]
    shaped = shape(requests, Shape(length_scale=0.5, max_tokens=80))
    assert [(each.input_length, each.output_length) for each in shaped.requests] == [(64, 16), (64, 16)]
    assert "2 requests bring their own prompt; only the length of their answers was scaled" in shaped.notes


def test_shortened_prompts_keep_whole_blocks_of_the_same_length() -> None:
    blocks = tuple(range(10))
    shaped = shape([request(0, prompt=5120, answer=20, hash_ids=blocks)], Shape(max_tokens=3000)).requests[0]
    assert shaped.hash_ids == blocks[:5]
    assert shaped.input_length / len(shaped.hash_ids) == 512
    tiny = shape([request(0, prompt=5120, answer=20, hash_ids=blocks)], Shape(max_tokens=300)).requests[0]
    assert (tiny.hash_ids, tiny.input_length) == ((0,), 280)
    scaled = shape([request(0, prompt=5120, hash_ids=blocks)], Shape(length_scale=1 / 64)).requests[0]
    assert (scaled.hash_ids, scaled.input_length) == (blocks, 80)


@pytest.mark.parametrize(
    "by",
    [
        Shape(start_s=-1),
        Shape(start_s=float("nan")),
        Shape(duration_s=0),
        Shape(speedup=0),
        Shape(speedup=float("inf")),
        Shape(length_scale=-1),
        Shape(rate_by_selection=0),
        Shape(functions=0),
        Shape(max_requests=0),
        Shape(max_tokens=1),
    ],
    ids=str,
)
def test_shapes_that_make_no_sense_name_the_field_and_the_value(by: Shape) -> None:
    field, value = next(
        (name, getattr(by, name)) for name in by.__struct_fields__ if getattr(by, name) != getattr(Shape(), name)
    )
    with pytest.raises(WorkloadError, match=f"{field} is {value}; give"):
        shape([request(0)], by)
