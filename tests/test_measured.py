"""What was measured becomes lines and medians."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.gateway.measured import GUESSED_STEPS, Line, Measured, Samples, add, fit
from serverlesslora_ipc.messages import StepSums

GUESS = Line(9.0, 7.0)


def sums(points: list[tuple[float, float]]) -> StepSums:
    return StepSums(
        len(points),
        sum(x for x, _ in points),
        sum(x * x for x, _ in points),
        sum(t for _, t in points),
        sum(x * t for x, t in points),
    )


@given(st.floats(0, 1), st.floats(0, 0.1), st.lists(st.integers(1, 300), min_size=2, max_size=40, unique=True))
def test_a_line_is_found_again_from_sums(base: float, slope: float, xs: list[int]) -> None:
    points = [(float(x), base + slope * x) for x in xs]
    half = len(points) // 2
    line = fit(add([sums(points[:half]), sums(points[half:])]), GUESS)
    for x in xs:
        assert line.base + line.slope * x == pytest.approx(base + slope * x, rel=1e-3, abs=1e-5)
    assert line.base >= 0 and line.slope >= 0


def test_with_nothing_measured_the_guess_stands() -> None:
    assert fit(StepSums(), GUESS) == GUESS
    assert fit(sums([(4.0, 1.0)]), GUESS) == GUESS


def test_one_x_tells_the_height_and_not_the_slope() -> None:
    line = fit(sums([(2.0, 20.0), (2.0, 22.0)]), Line(1.0, 3.0))
    assert line == Line(15.0, 3.0)


def test_a_falling_line_is_noise() -> None:
    line = fit(sums([(1.0, 3.0), (2.0, 1.0)]), GUESS)
    assert line == Line(2.0, 0.0)


def test_samples_are_robust_and_forget() -> None:
    samples = Samples(5.0)
    assert samples.value == 5.0
    for value in (1.0, 1.0, 1000.0, float("inf"), float("nan"), -1.0):
        samples.add(value)
    assert samples.value == 1.0 and len(samples) == 3
    for _ in range(100):
        samples.add(2.0)
    assert samples.value == 2.0 and len(samples) == 64


def test_the_profile_keeps_workers_that_are_gone() -> None:
    measured = Measured(["b"], chunk_tokens=64)
    assert measured.profile({}, on="cpu").backbones["b"].steps.decode_s == GUESSED_STEPS.decode_s
    measured.backbones["b"].gone(sums([(1.0, 1.0), (3.0, 2.0)]), sums([(10.0, 1.0), (20.0, 2.0)]))
    living = ([sums([(5.0, 3.0)])], [StepSums()])
    steps = measured.profile({"b": living}, on="cpu").backbones["b"].steps
    assert [steps.decode_s, steps.decode_row_s] == pytest.approx([0.5, 0.5])
    assert [steps.prefill_s, steps.prefill_token_s] == pytest.approx([0.0, 0.1], abs=1e-9)
    assert steps.chunk_tokens == 64
