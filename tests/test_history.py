"""The last hour: what is counted, when it is forgotten, how well quantiles are told, and that memory has a bound."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.gateway.history import BUCKET_S, MINUTE, NUM_BUCKETS, OTHERS, History, Summary, Times, Who

HOUR_S = BUCKET_S * NUM_BUCKETS
WALL = 1_700_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def of(name: str) -> Who:
    return name, None


def told(history: History, name: str) -> Summary:
    summary = history.summary(of(name))
    assert summary is not None
    return summary


def history_at(clock: Clock, max_functions: int = 4) -> History:
    return History(max_functions, clock=clock, wall_clock=lambda: WALL + clock.now)


def test_one_request_is_seen_in_the_whole_and_in_its_function() -> None:
    history = history_at(Clock())
    history.first_token(of("f"), 0.2)
    history.cold(of("f"), "worker", 0.05)
    history.cost(of("f"), 0.25)
    history.ended(of("f"), tokens=7, failed=False)
    whole, points = history.total()
    assert whole == history.summary(of("f"))
    assert (whole.requests, whole.errors, whole.tokens, whole.cost) == (1, 0, 7, 0.25)
    assert whole.ttft_p50 == pytest.approx(0.2, rel=0.06)
    count, median = whole.colds["worker"]
    assert count == 1 and median == pytest.approx(0.05, rel=0.06)
    assert [(point.at, point.requests, point.colds) for point in points] == [(WALL, 1, {"worker": 1})]
    assert history.summary(of("g")) == Summary()


def test_an_hour_later_it_is_forgotten_and_not_a_bucket_earlier() -> None:
    clock = Clock()
    history = history_at(clock)
    history.ended(of("f"), tokens=1, failed=True)
    history.cost(of("f"), 0.1)
    clock.now = HOUR_S - 1
    history.ended(of("f"), tokens=2, failed=False)
    assert (told(history, "f").requests, told(history, "f").errors) == (2, 1)
    clock.now = HOUR_S + 1
    whole, points = history.total()
    assert (whole.requests, whole.errors, whole.tokens) == (1, 0, 2)
    assert whole.cost == 0  # nothing that rounding left
    assert [point.at for point in points] == [WALL + HOUR_S - BUCKET_S]
    clock.now = 2 * HOUR_S
    assert history.summary(of("f")) == Summary() and history.total() == (Summary(), [])


def test_buckets_are_told_apart() -> None:
    clock = Clock()
    history = history_at(clock)
    for now in (5.0, 9.9, 10.0, 31.0):
        clock.now = now
        history.ended(of("f"), tokens=1, failed=False)
    assert [(p.at - WALL, p.requests) for p in history.total()[1]] == [(0, 2), (10, 1), (30, 1)]


def test_some_functions_are_added_up_and_others_left_out() -> None:
    clock = Clock()
    history = history_at(clock)
    for name in ("a", "b", "c", "b"):
        history.ended(of(name), tokens=1, failed=name == "b")
        clock.now += BUCKET_S
    hour, points = history.total(map(of, ("a", "b", "unknown")))
    assert (hour.requests, hour.errors) == (3, 2)
    assert [(p.at - WALL, p.requests) for p in points] == [(0, 3)]  # a function's are minutes
    assert history.total([]) == (Summary(), [])


def test_functions_beyond_the_cap_share_a_series_until_one_is_silent_for_an_hour() -> None:
    clock = Clock()
    history = history_at(clock, max_functions=2)
    for name in ("a", "b", "c", "d"):
        history.ended(of(name), tokens=1, failed=False)
    assert history.summary(of("c")) is None  # not known, which is not nothing
    others = history.summary(OTHERS)
    assert others is not None and others.requests == 2
    assert history.total()[0].requests == 4
    clock.now += HOUR_S / 2
    history.ended(of("a"), tokens=1, failed=False)
    clock.now += HOUR_S / 2 + BUCKET_S
    history.ended(of("c"), tokens=1, failed=False)
    assert told(history, "c").requests == 1
    assert told(history, "a").requests == 1


@given(st.lists(st.floats(2e-4, 900), min_size=1, max_size=60), st.sampled_from([0.5, 0.95]))
def test_quantiles_are_right_within_five_percent(values: list[float], q: float) -> None:
    times = Times()
    for value in values:
        times.observe(value)
    exact = sorted(values)[max(0, -(-round(q * 100) * len(values) // 100) - 1)]
    found = times.quantile(q)
    assert found is not None and abs(found / exact - 1) < 0.051


@given(st.lists(st.tuples(st.integers(0, 2000), st.sampled_from("abc"), st.floats(0, 50)), max_size=80))
def test_the_sum_of_the_hour_is_the_sum_of_its_buckets(events: list[tuple[int, str, float]]) -> None:
    clock = Clock()
    history = history_at(clock)
    kept: list[tuple[int, str]] = []
    for gap, name, seconds in events:
        clock.now += gap
        history.first_token(of(name), seconds)
        history.ended(of(name), tokens=3, failed=False)
        kept.append((int(clock.now / BUCKET_S), name))
    oldest = int(clock.now / BUCKET_S) - NUM_BUCKETS
    whole, points = history.total()
    assert whole.requests == sum(p.requests for p in points) == sum(number > oldest for number, _ in kept)
    assert whole.tokens == 3 * whole.requests
    for name in "abc":
        in_minutes = sum(n - n % MINUTE > oldest and each == name for n, each in kept)
        assert told(history, name).requests == in_minutes


def test_memory_is_bounded_however_many_functions_and_requests() -> None:
    clock = Clock()
    history = history_at(clock, max_functions=16)
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(3):
            for _ in range(NUM_BUCKETS):
                clock.now += BUCKET_S
                for number in range(20):
                    history.first_token(of(f"f{number}"), 0.01 * (1 + number))
                    history.ended(of(f"f{number}"), tokens=1, failed=False)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[2] < 1.1 * sizes[0]
    assert sizes[2] < (2 * NUM_BUCKETS + 18 * NUM_BUCKETS / MINUTE) * 1500  # bytes: 0.1 MB for every busy function


def test_a_name_that_becomes_anothers_begins_with_nothing() -> None:
    history = history_at(Clock())
    history.ended(("f", "acme"), tokens=5, failed=False)
    history.cost(("f", "acme"), 0.5)
    assert history.summary(("f", "other")) == Summary() == history.total([("f", "other")])[0]
    history.ended(("f", "other"), tokens=1, failed=True)
    theirs = history.summary(("f", "other"))
    assert theirs is not None and (theirs.requests, theirs.errors, theirs.tokens, theirs.cost) == (1, 1, 1, 0)
    assert history.total()[0].requests == 2
