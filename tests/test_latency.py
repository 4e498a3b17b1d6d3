"""The line that latencies are fitted to: right with good samples, calm with a bad one, quick after a change."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.scheduler.latency import LatencyModel

bases = st.floats(1e-3, 1.0)
slopes = st.floats(1e-6, 1e-2)
sizes = st.floats(1, 10_000)


def fed(model: LatencyModel, base: float, slope: float, *, num: int, seed: int = 0, noise: float = 0.0) -> LatencyModel:
    rng = random.Random(seed)
    for _ in range(num):
        x = rng.choice([1, 10, 50, 200, 1000, 4000])
        model.observe(x, (base + slope * x) * (1 + noise * rng.uniform(-1, 1)))
    return model


def test_starts_with_the_guess() -> None:
    model = LatencyModel(0.1, 0.001)
    assert (model.base_s, model.slope_s, model.num_observed) == (0.1, 0.001, 0)
    assert model.predict(400) == pytest.approx(0.5)


@pytest.mark.parametrize(("base", "slope"), [(0, 0.1), (-1, 0.1), (1, -0.1), (math.nan, 1), (1, math.inf)])
def test_refuses_an_impossible_guess(base: float, slope: float) -> None:
    with pytest.raises(ValueError, match="positive base"):
        LatencyModel(base, slope)


@pytest.mark.parametrize("forgetting", [0, 1.1])
def test_refuses_impossible_forgetting(forgetting: float) -> None:
    with pytest.raises(ValueError, match="above 0 to 1"):
        LatencyModel(1, 1, forgetting=forgetting)


@settings(max_examples=60, deadline=None)
@given(base=bases, slope=slopes, guess=bases, guess_slope=slopes, seed=st.integers(0, 999))
def test_finds_the_line(base: float, slope: float, guess: float, guess_slope: float, seed: int) -> None:
    """Whatever the guess was, up to a thousand times too much or too little."""
    model = fed(LatencyModel(guess, guess_slope), base, slope, num=200, seed=seed, noise=0.1)
    for x in (10, 200, 4000):
        assert model.predict(x) == pytest.approx(base + slope * x, rel=0.25)


def test_small_prompts_matter_as_much_as_large_ones() -> None:
    model = LatencyModel(0.5, 0.01)
    for seed in range(100):
        model.observe(10, 0.03)
        model.observe(10_000, 5.0 * random.Random(seed).uniform(0.7, 1.3))
    assert model.predict(10) == pytest.approx(0.03, rel=0.15)


def test_sizes_it_never_saw_keep_the_shape_of_the_guess() -> None:
    model = LatencyModel(0.1, 0.001)
    for _ in range(300):
        model.observe(100, 0.2)  # as guessed
    assert model.predict(1000) == pytest.approx(1.1, rel=0.05)
    for _ in range(300):
        model.observe(100, 0.4)
    assert model.predict(100) == pytest.approx(0.4, rel=0.05)
    assert model.predict(1000) > 1.1


def test_only_empty_prompts() -> None:
    model = LatencyModel(0.1, 0.001)
    for _ in range(100):
        model.observe(0, 0.3)
    assert model.predict(0) == pytest.approx(0.3, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(base=bases, slope=slopes, x=sizes, factor=st.floats(10, 10_000), num=st.integers(20, 120))
def test_one_outlier_moves_the_prediction_little(base: float, slope: float, x: float, factor: float, num: int) -> None:
    model = fed(LatencyModel(base, slope), base, slope, num=num, noise=0.1)
    before = model.predict(x)
    model.observe(x, factor * before)
    assert before <= model.predict(x) * 1.01
    assert model.predict(x) <= 1.1 * before


def test_a_first_sample_of_a_hundred_times_the_guess_is_not_believed() -> None:
    model = LatencyModel(0.1, 0.001)
    model.observe(100, 20.0)  # the first of a process compiles, faults pages in
    assert model.predict(100) < 0.5
    for _ in range(20):
        model.observe(100, 0.2)
    assert model.predict(100) == pytest.approx(0.2, rel=0.1)


def test_now_and_then_an_outlier_is_never_learned() -> None:
    model = LatencyModel(0.1, 0.001)
    for n in range(400):
        model.observe(100, 20.0 if n % 10 == 9 else 0.2)
    assert model.predict(100) < 0.3


@pytest.mark.parametrize("factor", [0.01, 0.1, 5, 100])
def test_a_world_that_changed_is_learned_soon(factor: float) -> None:
    model = fed(LatencyModel(0.05, 0.0005), 0.05, 0.0005, num=300, noise=0.1)
    fed(model, 0.05 * factor, 0.0005 * factor, num=100, seed=1, noise=0.1)
    assert model.predict(500) == pytest.approx(0.3 * factor, rel=0.5)
    fed(model, 0.05 * factor, 0.0005 * factor, num=100, seed=2, noise=0.1)
    assert model.predict(500) == pytest.approx(0.3 * factor, rel=0.15)


@settings(max_examples=150, deadline=None)
@given(
    guess=st.floats(1e-6, 100),
    guess_slope=st.floats(0, 1),
    samples=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e4)), max_size=60),
)
def test_never_negative_and_never_falling(guess: float, guess_slope: float, samples: list[tuple[float, float]]) -> None:
    model = LatencyModel(guess, guess_slope)
    for x, seconds in samples:
        model.observe(x, seconds)
        assert model.base_s >= 0 and model.slope_s >= 0
        assert math.isfinite(model.predict(1e6))
    assert model.num_observed == len(samples)
