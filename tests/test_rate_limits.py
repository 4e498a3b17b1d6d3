"""What one key may take, against slow and obvious models of it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.tenancy.key import Limits
from serverlesslora.tenancy.rate_limits import LONGEST_WAIT_S, Bucket, Limiter, Permit, Refusal

GAPS = st.lists(st.floats(0, 3, allow_subnormal=False), min_size=1, max_size=80)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def entered(limiter: Limiter, limits: Limits, key_id: str = "k") -> Permit | None:
    answer = limiter.enter(key_id, limits)
    return answer if isinstance(answer, Permit) else None


@given(GAPS, st.floats(0.05, 20), st.integers(1, 10))
def test_no_stretch_of_time_has_more_requests_than_burst_and_rate_allow(
    gaps: list[float], rps: float, burst: int
) -> None:
    clock = Clock()
    limiter = Limiter(clock)
    admitted: list[float] = []
    for gap in gaps:
        clock.now += gap
        if permit := entered(limiter, Limits(rps=rps, burst=burst)):
            admitted.append(clock.now)
            permit.leave()
    for i, first in enumerate(admitted):
        for j, last in enumerate(admitted[i:], start=1):
            assert j <= burst + rps * (last - first) + 1e-3


@given(GAPS, st.floats(0.05, 20), st.integers(1, 10))
def test_who_waits_as_long_as_told_is_let_in(gaps: list[float], rps: float, burst: int) -> None:
    clock = Clock()
    limiter = Limiter(clock)
    limits = Limits(rps=rps, burst=burst)
    for gap in gaps:
        clock.now += gap
        answer = limiter.enter("k", limits)
        if isinstance(answer, Refusal):
            assert 1 <= answer.retry_after_s <= LONGEST_WAIT_S
            clock.now += answer.retry_after_s
            assert entered(limiter, limits)


def test_the_burst_is_a_second_s_worth_unless_it_is_said() -> None:
    assert [Limits(rps=rps).burst_size for rps in (0.1, 1.0, 4.5)] == [1, 1, 5]
    limiter = Limiter(Clock())
    assert [entered(limiter, Limits(rps=3)) is not None for _ in range(4)] == [True, True, True, False]


class Step(NamedTuple):
    does_enter: bool
    which: int


@given(st.lists(st.builds(Step, st.booleans(), st.integers(0, 20)), max_size=100), st.integers(1, 5))
def test_never_more_at_once_and_every_leaving_makes_room(steps: list[Step], most: int) -> None:
    limiter = Limiter(Clock())
    limits = Limits(concurrent=most)
    inside: list[Permit] = []
    for step in steps:
        if step.does_enter:
            permit = entered(limiter, limits)
            assert (permit is not None) == (len(inside) < most)
            if permit is not None:
                inside.append(permit)
        elif inside:
            gone = inside.pop(step.which % len(inside))
            gone.leave()
            gone.leave()  # a second time counts for nothing


def test_a_refusal_for_one_limit_takes_nothing_of_another() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    limits = Limits(rps=1, burst=2, concurrent=1)
    first = entered(limiter, limits)
    assert first is not None
    for _ in range(5):
        assert entered(limiter, limits) is None  # one is open
    first.leave()
    second = entered(limiter, limits)  # the refused ones did not use up the burst
    assert second is not None
    second.leave()
    assert entered(limiter, limits) is None  # now the burst is gone
    clock.now += 1
    assert entered(limiter, limits) is not None


class Request(NamedTuple):
    gap_s: float
    estimated: int
    used: int


REQUESTS = st.lists(
    st.builds(Request, st.floats(0, 40, allow_subnormal=False), st.integers(0, 200), st.integers(0, 400)), max_size=40
)


@given(REQUESTS, st.integers(1, 300))
def test_tokens_are_counted_as_by_hand(requests: list[Request], per_minute: int) -> None:
    """By hand: a level that rises with time, never above a minute's worth, and falls by what was really used."""
    clock = Clock()
    limiter = Limiter(clock)
    level = float(per_minute)
    for gap_s, estimated, used in requests:
        clock.now += gap_s
        level = min(per_minute, level + gap_s * per_minute / 60)
        permit = entered(limiter, Limits(tokens_per_minute=per_minute))
        assert permit is not None
        needed = min(estimated, per_minute)
        if abs(level - needed) > 1e-3:  # at the edge both answers are right
            assert (permit.expect(estimated) is None) == (level >= needed)
        else:
            permit.leave()
            return
        if level >= needed:
            permit.used(used)
            level -= used
        permit.leave()
        level = min(level, per_minute)


@given(REQUESTS, st.integers(1, 300))
def test_tokens_used_stay_below_the_rate_but_for_the_last_request(requests: list[Request], per_minute: int) -> None:
    clock = Clock()
    limiter = Limiter(clock)
    used_before, began = 0, clock.now
    for gap_s, estimated, used in requests:
        clock.now += gap_s
        permit = entered(limiter, Limits(tokens_per_minute=per_minute))
        assert permit is not None
        if permit.expect(estimated) is None:
            # Whoever is let in finds no debt: all before it fits into a full bucket and the time that passed.
            assert used_before <= per_minute + (clock.now - began) * per_minute / 60 + 1e-3
            permit.used(used)
            used_before += used
        permit.leave()


def test_the_estimate_is_given_back_when_nothing_came_of_it() -> None:
    limiter = Limiter(Clock())
    limits = Limits(tokens_per_minute=100)
    for _ in range(50):
        permit = entered(limiter, limits)
        assert permit is not None and permit.expect(90) is None
        other = entered(limiter, limits)
        assert other is not None and other.expect(90) is not None  # meanwhile it is taken
        other.leave()
        permit.leave()


def test_output_is_paid_for_afterwards() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    limits = Limits(tokens_per_minute=60)  # one a second
    permit = entered(limiter, limits)
    assert permit is not None and permit.expect(10) is None
    permit.used(90)
    permit.leave()
    second = entered(limiter, limits)
    assert second is not None
    refusal = second.expect(1)
    assert refusal is not None and refusal.retry_after_s == 31  # 30 in debt, and one for the prompt
    clock.now += 31
    assert second.expect(1) is None


def test_a_prompt_larger_than_the_minute_passes_when_the_bucket_is_full() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    permit = entered(limiter, Limits(tokens_per_minute=60))
    assert permit is not None and permit.expect(600) is None
    permit.used(600)
    permit.leave()
    second = entered(limiter, Limits(tokens_per_minute=60))
    assert second is not None
    refusal = second.expect(600)
    assert refusal is not None and refusal.retry_after_s == LONGEST_WAIT_S
    clock.now += 600
    assert second.expect(600) is None


def test_keys_do_not_share_and_a_key_without_limits_has_none() -> None:
    limiter = Limiter(Clock())
    for key_id in "abc":
        assert entered(limiter, Limits(rps=1), key_id) is not None
        assert entered(limiter, Limits(rps=1), key_id) is None
    free = [entered(limiter, Limits(), "free") for _ in range(1000)]
    assert all(permit is not None and permit.expect(10**9) is None for permit in free)


@pytest.mark.parametrize("step_s", [-5.0, 0.0])
def test_a_clock_that_does_not_go_on_gives_nothing(step_s: float) -> None:
    bucket = Bucket(rate=1, capacity=2, now=10.0)
    bucket.take(2, 10.0)
    assert bucket.level(10.0 + step_s) == 0
    assert bucket.wait_s(1, 10.0 + step_s) == 1
