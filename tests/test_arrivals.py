"""Arrival rates: what is periodic, what has stopped, what comes at nine every morning, and what survives a restart."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.scheduler.arrivals import DAY_S, ArrivalModel, ArrivalSnapshot
from serverlesslora.scheduler.gaps import BURST_S, EDGES, Gaps

HOUR_S = 3600.0

times = st.lists(st.floats(0, 1e5), min_size=1, max_size=40)


def model_of(times: Iterable[float], name: str = "f") -> ArrivalModel:
    model = ArrivalModel()
    for now in times:
        model.observe(name, now)
    return model


def poisson(rate: float, until: float, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    now, found = 0.0, []
    while (now := now + rng.expovariate(rate)) < until:
        found.append(now)
    return found


def test_a_function_never_seen_has_the_prior_rate() -> None:
    model = ArrivalModel(prior_gap_s=200.0)
    assert model.rate("f", 5.0) == 1 / 200
    assert model.expects("f", 5.0, 200.0) == pytest.approx(1 - math.exp(-1))
    assert model.last_seen("f") is None and model.gap_quantile("f", 0.5) is None and model.cv("f") is None


def test_one_arrival_makes_it_no_less_likely_and_forgetting_undoes_it() -> None:
    model = model_of([10.0])
    assert model.rate("f", 10.0) >= 1 / 600
    model.forget("f")
    model.forget("f")
    assert model.rate("f", 1e9) == 1 / 600


@pytest.mark.parametrize("rate", [0.01, 0.2, 3.0])
def test_a_steady_rate_is_found(rate: float) -> None:
    arrivals = poisson(rate, 20_000.0)
    model = ArrivalModel()
    rates: list[float] = []
    mark = 5000.0
    for now in arrivals:
        while mark < now:
            rates.append(model.rate("f", mark))
            mark += 50.0
        model.observe("f", now)
    mean = sum(rates) / len(rates)
    assert 0.8 * rate < mean < 1.5 * rate


@pytest.mark.parametrize("period", [120.0, 600.0, HOUR_S])
def test_a_periodic_function_is_expected_shortly_before_it_is_due(period: float) -> None:
    model = model_of(i * period for i in range(12))
    last = 11 * period
    early = [model.rate("f", last + share * period) for share in (0.05, 0.2, 0.4)]
    late = model.rate("f", last + 0.97 * period)
    assert late > 3 * max(early)
    assert late > 1.5 / period  # more than on average
    assert model.expects("f", last + 0.2 * period, 0.3 * period) < 0.2
    assert model.expects("f", last + 0.8 * period, 0.5 * period) > 0.8


def test_what_has_been_silent_far_beyond_its_gaps_decays_to_nearly_nothing() -> None:
    model = model_of(poisson(1.0, 2000.0))
    last = model.last_seen("f")
    assert last is not None
    rates = [model.rate("f", last + age) for age in (30.0, 60.0, 300.0, HOUR_S, DAY_S, 30 * DAY_S)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] < 0.1  # a minute is far beyond a second
    assert rates[-1] < 1e-5
    assert all(rate > 0 for rate in rates)


def test_bursts_count_as_one_gap_and_as_many_arrivals() -> None:
    alone = model_of(i * 600.0 for i in range(10))
    bursts = model_of(i * 600.0 + j * 0.01 for i in range(10) for j in range(20))
    assert bursts.cv("f") == 0.0
    median = bursts.gap_quantile("f", 0.5)
    assert median is not None and 500 < median < 700
    now = 9 * 600.0 + 590.0
    assert bursts.rate("f", now) > 10 * alone.rate("f", now)


def test_two_at_once_are_twice_as_many() -> None:
    one = model_of(i * 600.0 for i in range(30))
    two = model_of(i * 600.0 for i in range(30) for _ in range(2))
    later = model_of(i * 600.0 + j for i in range(30) for j in (0.0, 0.4, 0.8, 1.2, 1.6, 2.0))
    now = 29 * 600.0 + 595.0
    assert two.rate("f", now) == pytest.approx(2 * one.rate("f", now), rel=0.05)
    # Who comes later in a burst finds everything loaded.
    assert later.rate("f", now) < 4 * one.rate("f", now)


def test_hours_are_known_after_years() -> None:
    model = ArrivalModel()
    for day in (*range(4), *range(2000, 2006)):
        for i in range(100):
            model.observe("f", day * DAY_S + 9 * HOUR_S + i * 30.0)
    nine = model.rate("f", 2006 * DAY_S + 9 * HOUR_S + 1)
    assert 0.004 < nine < 0.05
    assert model.rate("f", 2006 * DAY_S + 7 * HOUR_S) < 1e-3


def test_an_hour_of_the_day_is_learned_and_only_trusted_after_two_days() -> None:
    model = ArrivalModel(day_offset_s=2 * HOUR_S)  # the clock's zero is two in the morning
    rates = []
    for day in range(6):
        nine = day * DAY_S + 7 * HOUR_S
        rates.append(model.rate("f", nine + 1) if day else 0.0)
        for i in range(360):
            model.observe("f", nine + i * 10.0)
    assert rates[1] < 0.01
    assert rates[5] > 0.03 and rates[5] > 5 * rates[1]
    midnight = 6 * DAY_S - 2 * HOUR_S
    assert model.rate("f", midnight) < 1e-3
    # Retired: a day's silence is nothing, a week's is.
    assert model.rate("f", 6 * DAY_S + 7 * HOUR_S + 1) > 0.03
    assert model.rate("f", 12 * DAY_S + 7 * HOUR_S + 1) < 1e-3


@given(times, times, st.floats(0, 1e5))
@settings(max_examples=150, deadline=None)
def test_more_arrivals_never_give_a_lower_rate_while_gaps_say_nothing(
    some: list[float], more: list[float], later: float
) -> None:
    # The bare estimate: with bursts only, or fewer gaps than tell anything.
    few = sorted(some)[:4]
    now = max(few + more) + later
    first = min(few)
    extra = sorted(few + [t for t in more if t >= first])
    assert _base(extra, now) >= _base(few, now) * (1 - 1e-9)


def _base(times: list[float], now: float) -> float:
    model = model_of(times)
    return model._base(model._functions["f"], now)


@given(times, st.data(), st.floats(0, 1e5))
@settings(max_examples=150, deadline=None)
def test_larger_bursts_never_give_a_lower_rate(times: list[float], data: st.DataObject, later: float) -> None:
    times = sorted(times)
    extra = data.draw(st.lists(st.sampled_from(times), max_size=20))
    now = times[-1] + later
    few, many = model_of(times), model_of(sorted(times + extra))
    assert many.rate("f", now) >= few.rate("f", now) * (1 - 1e-9)
    assert many.expects("f", now, 30.0) >= few.expects("f", now, 30.0) * (1 - 1e-9)


@given(st.floats(5, 2000), st.integers(2, 10), st.integers(6, 30))
@settings(max_examples=80, deadline=None)
def test_a_faster_rhythm_never_gives_a_lower_rate(period: float, times: int, count: int) -> None:
    # Over a whole turn: at single moments one of them is due and the other is not.
    slow = model_of(i * period for i in range(count + 1))
    fast = model_of(i * period / times for i in range(count * times + 1))
    moments = [count * period + period / times * i / 16 for i in range(16)]
    assert sum(fast.rate("f", now) for now in moments) >= sum(slow.rate("f", now) for now in moments)


@given(st.lists(st.one_of(st.floats(-1e9, 1e9), st.sampled_from([0.0, 1.0, 1.5])), max_size=60), st.floats(-1e9, 1e9))
@settings(max_examples=200, deadline=None)
def test_any_order_of_times_is_survived(times: list[float], now: float) -> None:
    model = ArrivalModel()
    for i, at in enumerate(times):
        model.observe("fg"[i % 2], at)
    for name in "fgh":
        assert 0 < model.rate(name, now) < math.inf
        within = [model.expects(name, now, horizon) for horizon in (0.0, 1.0, 60.0, 1e4, 1e6)]
        assert all(0 <= p <= 1 for p in within)
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(within))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5e5)), max_size=80), st.floats(0, 1e5))
@settings(max_examples=100, deadline=None)
def test_a_restored_model_gives_the_same_rates(arrivals: list[tuple[str, float]], later: float) -> None:
    model = ArrivalModel()
    for name, at in sorted(arrivals, key=lambda arrival: arrival[1]):
        model.observe(name, at)
    taken = max((at for _, at in arrivals), default=0.0) + 1.0
    snapshot = msgspec.json.decode(msgspec.json.encode(model.snapshot(taken, unix_s=1e9)), type=ArrivalSnapshot)
    # Another clock, at the same time of day; 100 s went by between the two.
    again = 86400.0 * 7
    restored = ArrivalModel.restore(snapshot, again, unix_s=1e9 + 100, day_offset_s=taken + 100 - again)
    for name in "abcd":
        for age in (0.0, later):
            assert restored.rate(name, again + age) == pytest.approx(model.rate(name, taken + 100 + age), rel=1e-5)
            expected = model.expects(name, taken + 100 + age, 30.0)
            assert restored.expects(name, again + age, 30.0) == pytest.approx(expected, rel=1e-5)
        assert restored.cv(name) == model.cv(name)
    for name in "abc":  # and it goes on learning as if nothing had happened
        model.observe(name, taken + 100 + later)
        restored.observe(name, again + later)
        expected = model.rate(name, taken + 200 + later)
        assert restored.rate(name, again + 100 + later) == pytest.approx(expected, rel=1e-5)


def test_hours_survive_a_restart() -> None:
    model = ArrivalModel()
    for day in range(4):
        for i in range(100):
            model.observe("f", day * DAY_S + 9 * HOUR_S + i * 30.0)
    now = 4 * DAY_S
    restored = ArrivalModel.restore(model.snapshot(now), 50.0, day_offset_s=-50.0)
    nine = restored.rate("f", 50.0 + 9 * HOUR_S)
    assert nine == pytest.approx(model.rate("f", now + 9 * HOUR_S), rel=1e-6)
    assert nine > 5 * restored.rate("f", 50.0 + 6 * HOUR_S)


def test_a_snapshot_of_another_version_is_not_believed() -> None:
    snapshot = msgspec.structs.replace(model_of([1.0, 2.0]).snapshot(3.0), version=0)
    assert ArrivalModel.restore(snapshot, 3.0).last_seen("f") is None


# --- gaps


@given(st.lists(st.floats(BURST_S, 3e5), min_size=4, max_size=200))
@settings(max_examples=100, deadline=None)
def test_quantiles_are_right_to_a_bin(lengths: list[float]) -> None:
    gaps = Gaps()
    for length in lengths:
        gaps.add(length)
    ordered = sorted(min(length, EDGES[-1]) for length in lengths)
    previous = 0.0
    for q in (0.0, 0.05, 0.5, 0.99, 1.0):
        found = gaps.quantile(q)
        assert found is not None and found >= previous * (1 - 1e-6)
        previous = found
        low = ordered[max(0, math.ceil(q * len(ordered) - 1e-6) - 1)]
        high = ordered[min(len(ordered) - 1, math.floor(q * len(ordered) + 1e-6))]
        assert low / 1.31 <= found <= high * 1.31
    assert gaps.quantile(1.0, up_to_s=1.0) in (None, pytest.approx(1.0, abs=0.51))


@given(st.lists(st.floats(BURST_S, 2e5), min_size=1, max_size=60), st.floats(0, 2e5), st.floats(0.1, 1e5))
@settings(max_examples=150, deadline=None)
def test_what_lies_ahead_is_consistent(lengths: list[float], age: float, horizon: float) -> None:
    gaps = Gaps()
    for length in lengths:
        gaps.add(length)
    survivors, share, quiet = gaps.ahead(age, horizon)
    assert 0 <= share <= 1 + 1e-9
    assert -1e-6 <= quiet <= horizon
    if gaps.jitter_s > gaps.mean_s / 8:  # from the bins
        assert survivors == pytest.approx(gaps.beyond(age), abs=1e-4)
        assert survivors * (1 - share) == pytest.approx(gaps.beyond(age + horizon) if survivors else 0, abs=1e-4)
    assert gaps.ahead(age, 2 * horizon).quiet_s >= quiet * (1 - 1e-6)
    if survivors and share == 0:
        assert quiet == pytest.approx(horizon)


def test_regular_gaps_are_expected_to_the_minute() -> None:
    gaps = Gaps()
    for _ in range(10):
        gaps.add(3600.0)
    assert gaps.ahead(100.0, 3400.0) == (10.0, 0.0, 3400.0)
    survivors, share, quiet = gaps.ahead(3000.0, 600.0)  # half of an even spread of 72 s about the hour
    assert survivors == 10.0 and share == pytest.approx(0.5)
    assert quiet == pytest.approx(528.0 + 0.75 * 72.0)
    assert list(gaps.ahead(3600.0, 1000.0)) == pytest.approx([5.0, 1.0, 36.0])
    assert gaps.ahead(3700.0, 100.0).survivors == pytest.approx(gaps.beyond(3700.0))  # not as regular as it seemed


def test_old_habits_are_forgotten_and_shares_are_kept() -> None:
    gaps = Gaps()
    for _ in range(300):
        gaps.add(10.0)
    for _ in range(2000):
        gaps.add(1000.0)
    assert gaps.weight < 512 and gaps.count == 2300
    assert gaps.beyond(100.0) / gaps.weight > 0.99
    assert gaps.mean_s == pytest.approx(1000.0) and gaps.jitter_s < 1e-3


def test_jitter_is_finer_than_a_bin() -> None:
    gaps = Gaps()
    rng = random.Random(1)
    for _ in range(50):
        gaps.add(3600.0 + rng.uniform(-2, 2))
    assert gaps.mean_s == pytest.approx(3600.0, abs=2)
    assert gaps.jitter_s < 3
