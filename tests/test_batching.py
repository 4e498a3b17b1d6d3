"""The formulas of batching against their definition, and what must follow from them."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serverlesslora.scheduler.batching import Batching
from serverlesslora.scheduler.latency import LatencyModel

batching = Batching()
models = st.builds(LatencyModel, st.floats(1e-3, 1), st.floats(0, 1e-2))
slos = st.one_of(st.floats(0.01, 100), st.just(math.inf))
tokens = st.integers(1, 5000)
numbers = st.integers(1, 20)


def test_the_formulas_by_hand() -> None:
    model = LatencyModel(0.4, 0.0005)  # T(b) = 0.4 + 0.05·b for prompts of 100 tokens
    assert batching.largest_batch(model, 2.0, 100, num_batches=1, slots=64) == 32
    assert batching.largest_batch(model, 2.0, 100, num_batches=2, slots=64) == 12
    assert batching.largest_batch(model, 2.0, 100, num_batches=2, slots=8) == 8
    assert batching.largest_batch(model, 0.3, 100, num_batches=1, slots=64) == 1  # too late anyway
    assert batching.margin(model, 2.0, 0.25, 100, num_batches=3) == pytest.approx(2.0 - (0.25 + 3 * 0.45))
    # d_f = 2 - 2·(0.4 + 0.05·12) = 0, and with 8 at most 2 - 2·0.8 = 0.4, which is more than anybody may wait
    assert batching.fill_window(model, 2.0, 100, num_batches=2, slots=64) == pytest.approx(0)
    assert batching.fill_window(model, 2.0, 100, num_batches=2, slots=8) == 0.1
    assert Batching(max_window_s=0.3).fill_window(model, 2.0, 100, num_batches=2, slots=8) == 0.3
    assert Batching(max_window_s=9).fill_window(model, 2.0, 100, num_batches=2, slots=8) == pytest.approx(0.4)


def test_without_an_slo() -> None:
    model = LatencyModel(0.4, 0.0005)
    assert batching.largest_batch(model, math.inf, 100, num_batches=9, slots=8) == 8
    assert batching.fill_window(model, math.inf, 100, num_batches=2, slots=8) == 0.1
    assert batching.margin(model, math.inf, 5, 100, num_batches=2) == math.inf


@given(models, slos, tokens, numbers, numbers)
def test_the_largest_batch_is_the_largest_in_time(
    model: LatencyModel, slo_s: float, n: int, num_batches: int, slots: int
) -> None:
    def slack_s(size: int) -> float:
        return slo_s - num_batches * (model.base_s + model.slope_s * n * size)

    size = batching.largest_batch(model, slo_s, n, num_batches=num_batches, slots=slots)
    assert 1 <= size <= slots
    assert size == 1 or slack_s(size) >= -1e-9
    assert size == slots or slack_s(size + 1) <= 1e-9


@given(models, slos, slos, tokens, numbers, numbers)
def test_a_tighter_slo_means_smaller_batches_and_less_margin(
    model: LatencyModel, one: float, other: float, n: int, num_batches: int, slots: int
) -> None:
    tight, loose = sorted((one, other))
    sizes = [batching.largest_batch(model, slo, n, num_batches=num_batches, slots=slots) for slo in (tight, loose)]
    assert sizes[0] <= sizes[1]
    assume(loose < math.inf)
    margins = [batching.margin(model, slo, 0.1, n, num_batches=num_batches) for slo in (tight, loose)]
    assert margins[0] <= margins[1]


@given(models, slos, tokens, tokens, numbers, numbers)
def test_more_work_means_smaller_batches(
    model: LatencyModel, slo_s: float, n: int, more: int, num_batches: int, slots: int
) -> None:
    size = batching.largest_batch(model, slo_s, n, num_batches=num_batches, slots=slots)
    assert batching.largest_batch(model, slo_s, n + more, num_batches=num_batches, slots=slots) <= size
    assert batching.largest_batch(model, slo_s, n, num_batches=num_batches + more, slots=slots) <= size


@given(models, slos, tokens, numbers, numbers)
def test_a_window_ends_in_time_for_the_full_batch(
    model: LatencyModel, slo_s: float, n: int, num_batches: int, slots: int
) -> None:
    window_s = batching.fill_window(model, slo_s, n, num_batches=num_batches, slots=slots)
    assert 0 <= window_s <= 0.1
    if num_batches == 1:
        assert window_s == 0
    if window_s:
        size = batching.largest_batch(model, slo_s, n, num_batches=num_batches, slots=slots)
        assert window_s + num_batches * model.predict(n * size) <= slo_s + 1e-9
