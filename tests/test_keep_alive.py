"""Idle time-outs from gaps, waking ahead of what is regular, and not paying more than waiting is worth."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.scheduler.arrivals import ArrivalModel
from serverlesslora.scheduler.keep_alive import FixedKeepAlive, KeepAlive, KeepAlivePolicy
from serverlesslora.scheduler.settings import PolicySettings

SETTINGS = PolicySettings()  # 5 to 600 s
GB = 10**9


def observe(model: ArrivalModel, name: str, gaps: list[float], start: float = 0.0) -> float:
    now = start
    model.observe(name, now)
    for gap in gaps:
        now += gap
        model.observe(name, now)
    return now


def keeper(gaps: list[float], settings: PolicySettings = SETTINGS) -> tuple[KeepAlive, float]:
    model = ArrivalModel()
    last = observe(model, "f", gaps)
    return KeepAlive(settings, model), last


def test_it_stays_a_little_longer_than_nearly_all_gaps() -> None:
    rng = random.Random(0)
    keep, last = keeper([rng.uniform(10, 50) for _ in range(300)])
    wait = keep.idle_timeout(["f"], last + 1)
    assert 48 < wait.seconds < 80
    assert "99%" in wait.reason and "f" in wait.reason
    assert keep.wake_in(["f"], last + 100) is None


def test_gaps_too_long_to_bridge_do_not_count_among_those_that_can_be() -> None:
    # Questions half a minute apart, and a night after every twenty.
    keep, last = keeper([*([30.0] * 20), 40_000.0] * 10)
    assert keep.idle_timeout(["f"], last).seconds < 60


def test_it_goes_at_once_when_next_to_nothing_can_be_bridged() -> None:
    rng = random.Random(0)
    keep, last = keeper([rng.uniform(2000, 50_000) for _ in range(60)])
    assert keep.idle_timeout(["f"], last).seconds == SETTINGS.keep_alive_min_s


def test_it_is_not_kept_for_the_few_gaps_that_can_be_bridged() -> None:
    rng = random.Random(0)
    keep, last = keeper([300.0 if i % 33 == 0 else rng.uniform(2000, 50_000) for i in range(330)])
    assert keep.idle_timeout(["f"], last).seconds == SETTINGS.keep_alive_min_s


@pytest.mark.parametrize("gaps", [[], [20.0, 20.0], [20.0] * 2 + [1.0] * 20])
def test_it_does_not_judge_by_a_few_gaps(gaps: list[float]) -> None:
    keep, last = keeper(gaps)
    assert keep.idle_timeout(["f"], last).seconds == 600.0


def test_a_function_that_was_never_silent_goes_early_once_it_is() -> None:
    keep, last = keeper([0.6] * 150)
    assert keep.idle_timeout(["f"], last).seconds == SETTINGS.keep_alive_min_s


def test_never_asked_gets_the_prior() -> None:
    keep = KeepAlive(SETTINGS, ArrivalModel(prior_gap_s=100.0))
    assert keep.idle_timeout(["f"], 0.0).seconds == 100.0
    assert keep.idle_timeout([], 0.0).seconds == 100.0
    assert keep.wake_in(["f"], 0.0) is None


@pytest.mark.parametrize("period", [200.0, 3600.0, 86_400.0])
def test_long_regular_gaps_are_met_instead_of_bridged(period: float) -> None:
    keep, last = keeper([period] * 12)
    assert keep.idle_timeout(["f"], last + 1).seconds == SETTINGS.keep_alive_min_s
    wake = keep.wake_in(["f"], last + 10)
    assert wake is not None and "f" in wake.reason
    woken = last + 10 + wake.seconds
    assert last + 0.85 * period < woken < last + period
    # Woken, it stays until its request had time to come, and not for long after.
    stays = keep.idle_timeout(["f"], woken, idle_since=woken).seconds
    assert last + period < woken + stays < last + 1.25 * period
    if period > SETTINGS.keep_alive_max_s:  # then only the window can be why it is there
        assert keep.idle_timeout(["f"], woken).seconds == pytest.approx(stays)
    # It is due now; and no longer once it has not come.
    due = keep.wake_in(["f"], woken + 1)
    assert due is not None and due.seconds == 0
    assert keep.wake_in(["f"], last + 1.5 * period) is None


def test_what_is_irregular_is_not_woken() -> None:
    rng = random.Random(0)
    keep, last = keeper([rng.expovariate(1 / 3000) + 1 for _ in range(200)])
    assert keep.wake_in(["f"], last + 100) is None


def test_a_domain_stays_for_whichever_function_wants_it_longest_and_wakes_for_the_soonest() -> None:
    model = ArrivalModel()
    a = observe(model, "a", [40.0] * 50)
    b = observe(model, "b", [400.0] * 5 + [200.0, 100.0, 300.0, 20.0], start=a - 2620.0 - 100.0)
    keep = KeepAlive(SETTINGS, model)
    alone = {name: model_last + keep.idle_timeout([name], a).seconds for name, model_last in (("a", a), ("b", b))}
    assert a + keep.idle_timeout(["a", "b"], a).seconds == pytest.approx(max(alone.values()))

    model = ArrivalModel()
    observe(model, "hourly", [3600.0] * 10)
    observe(model, "often", [900.0] * 40)
    keep = KeepAlive(SETTINGS, model)
    both, often = keep.wake_in(["hourly", "often"], 36_010.0), keep.wake_in(["often"], 36_010.0)
    assert both == often and both is not None
    hourly = keep.wake_in(["hourly"], 36_010.0)
    assert hourly is not None and hourly.seconds > both.seconds


def test_big_memory_is_let_go_earlier_than_small() -> None:
    keep, last = keeper([random.Random(i).expovariate(1 / 120) + 6 for i in range(200)])
    waits = [
        keep.idle_timeout(["f"], last, size_bytes=size, delay_s=1.0).seconds for size in (0, GB, 50 * GB, 999 * GB)
    ]
    assert waits[0] == keep.idle_timeout(["f"], last).seconds
    assert waits == sorted(waits, reverse=True)
    assert waits[-1] == SETTINGS.keep_alive_min_s


def test_functions_that_are_not_worth_it_alone_are_worth_it_together() -> None:
    model = ArrivalModel()
    names = [f"f{i}" for i in range(8)]
    rng = random.Random(0)
    for name in names:
        length = [rng.expovariate(1 / 1500) + 6 for _ in range(100)]
        observe(model, name, length, start=-sum(length))
    keep = KeepAlive(SETTINGS, model)
    size = 4 * 10**9 * 5  # worth one second in 500
    alone = keep.idle_timeout(names[:1], 1.0, size_bytes=size, delay_s=1.0).seconds
    together = keep.idle_timeout(names, 1.0, size_bytes=size, delay_s=1.0).seconds
    assert alone == SETTINGS.keep_alive_min_s
    assert together > 100


def test_not_worth_keeping_is_not_worth_waking() -> None:
    keep, last = keeper([3600.0] * 12)
    cheap = keep.wake_in(["f"], last + 10, size_bytes=GB, delay_s=5.0)
    assert cheap is not None
    assert keep.wake_in(["f"], last + 10, size_bytes=10**9 * GB, delay_s=5.0) is None
    woken = last + 10 + cheap.seconds
    stays = keep.idle_timeout(["f"], woken, idle_since=woken, size_bytes=GB, delay_s=5.0)
    assert woken + stays.seconds > last + 3600.0


gaps = st.lists(st.floats(0, 5000), max_size=30)
sizes = st.floats(0, 1e12).map(int)


@given(gaps, gaps, st.floats(0, 5000), sizes, sizes, st.floats(0, 100), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_and_more_money_never_shortens(
    one: list[float], other: list[float], later: float, size: int, more: int, delay: float, share: float
) -> None:
    model = ArrivalModel()
    now = max(observe(model, "a", one), observe(model, "b", other)) + later
    keep = KeepAlive(SETTINGS, model)
    names = ["a", "b", "never"]
    plain = keep.idle_timeout(names, now).seconds
    dear = keep.idle_timeout(names, now, size_bytes=size + more, delay_s=delay).seconds
    cheap = keep.idle_timeout(names, now, size_bytes=size, delay_s=delay).seconds
    urgent = keep.idle_timeout(names, now, size_bytes=size, delay_s=delay + 1).seconds
    assert 5 <= dear <= cheap + 1e-6 <= urgent + 2e-6 <= plain + 3e-6 <= 600 + 4e-6
    alone = keep.idle_timeout(["a"], now, idle_since=now - later * share).seconds
    assert 5 <= alone <= 600
    assert keep.idle_timeout(names, now, idle_since=now - later * share).seconds >= alone - 1e-6
    wake = keep.wake_in(names, now)
    assert wake is None or wake.seconds >= 0


@given(gaps, st.floats(-100, 6000), st.floats(0, 1e4), st.floats(0, 1e4))
@settings(max_examples=60, deadline=None)
def test_odd_settings_and_times_are_survived(gaps: list[float], later: float, low: float, high: float) -> None:
    odd = PolicySettings(keep_alive_min_s=low + 0.1, keep_alive_max_s=high + 0.1, min_gain_per_gb=0.0)
    keep, last = keeper(gaps, odd)
    wait = keep.idle_timeout(["f"], last + later, size_bytes=0, delay_s=0.0).seconds
    assert low + 0.1 <= wait <= max(low, high) + 0.1
    keep.wake_in(["f"], last + later, size_bytes=0, delay_s=0.0)


def test_fixed_is_fixed() -> None:
    policies: list[KeepAlivePolicy] = [FixedKeepAlive(SETTINGS), FixedKeepAlive(SETTINGS, 7.0)]
    assert [policy.idle_timeout(["f"], 1.0, size_bytes=1, delay_s=0.0).seconds for policy in policies] == [600.0, 7.0]
    assert [policy.wake_in(["f"], 1.0) for policy in policies] == [None, None]
    both: KeepAlivePolicy = KeepAlive(SETTINGS, ArrivalModel())
    assert both.wake_in([], 0.0) is None
