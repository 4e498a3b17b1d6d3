"""Budgets: refused once reached, free again in the next period, the same after a restart."""

from __future__ import annotations

import asyncio
import datetime
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.metering.budgets import Budgets, Limit, Period, period_of, rebuild
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import Prices, read_prices
from serverlesslora.metering.usage import RequestUsage, Residency


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


NOW = at("2026-02-28T23:59:30.5")


@pytest.mark.parametrize(
    ("period", "retry_after_s"), [("hour", 30), ("day", 30), ("month", 30)]
)  # all end with February
def test_a_reached_budget_is_refused_until_the_next_period(period: Period, retry_after_s: int) -> None:
    budgets = Budgets([Limit("acme", 10.0, period)], currency="EUR")
    assert budgets.check("acme", NOW) is None
    budgets.add("acme", 9.99, NOW)
    assert budgets.check("acme", NOW) is None
    budgets.add("acme", 0.01, NOW)
    refusal = budgets.check("acme", NOW)
    assert refusal is not None
    assert refusal.retry_after_s == retry_after_s
    for part in ("'acme'", "10 of 10 EUR", period, "2026-03-01 00:00"):
        assert part in refusal.reason
    assert budgets.check("acme", NOW + refusal.retry_after_s) is None
    assert budgets.spent("acme", NOW + 30) == 0


def test_a_total_budget_does_not_come_back() -> None:
    budgets = Budgets([Limit("acme", 1.0, "total")])
    budgets.add("acme", 2.0, NOW)
    refusal = budgets.check("acme", NOW + 1e9)
    assert refusal is not None
    assert refusal.retry_after_s is None
    assert "raise" in refusal.reason


def test_nothing_may_be_spent_of_nothing() -> None:
    assert Budgets([Limit("acme", 0.0, "day")]).check("acme", NOW) is not None


def test_a_tenant_without_a_budget_is_free() -> None:
    budgets = Budgets([Limit("acme", 1.0)])
    budgets.add("other", 1e9, NOW)
    assert budgets.check("other", NOW) is None
    assert budgets.spent("other", NOW) == 0


def test_a_clock_that_is_set_back_gives_no_money_back() -> None:
    budgets = Budgets([Limit("acme", 1.0, "hour")])
    budgets.add("acme", 1.0, NOW)
    assert budgets.check("acme", NOW - 3600) is not None
    budgets.add("acme", 5.0, NOW - 3600)  # of an hour that is over
    assert budgets.spent("acme", NOW) == 1.0


@given(st.floats(0, 4e9), st.sampled_from(["hour", "day", "month"]))
def test_periods_tile_the_time(now: float, period: Period) -> None:
    start, end = period_of(period, now)
    assert start <= now < end
    assert period_of(period, start) == (start, end)
    assert period_of(period, end)[0] == end
    assert datetime.datetime.fromtimestamp(start, datetime.UTC).minute == 0
    if period == "month":
        assert datetime.datetime.fromtimestamp(start, datetime.UTC).day == 1
    assert period_of("total", now) == (-math.inf, math.inf)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100_000)), max_size=20))
def test_spent_is_the_sum_of_the_period(spending: list[tuple[float, float]]) -> None:
    budgets = Budgets([Limit("acme", 1e9, "day")])
    for money, later in sorted(spending, key=lambda pair: pair[1]):
        budgets.add("acme", money, NOW + later)
    end = NOW + 100_000
    start, _ = period_of("day", end)
    expected = sum(money for money, later in spending if NOW + later >= start)
    assert budgets.spent("acme", end) == pytest.approx(expected)


def spend(number: int, tenant: str | None, when: float, device_s: float) -> RequestUsage:
    return RequestUsage(
        request_id=str(number),
        function="f",
        tenant=tenant,
        domain="d",
        backbone="b",
        digest=None,
        started_at=when,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
        device_s=device_s,
        queue_s=0.0,
        ttft_s=None,
        duration_s=0.0,
        rung="hot",
        status="finished",
        slo_missed=False,
        device="H100",
    )


def test_what_was_spent_is_rebuilt_from_the_ledger(tmp_path: Path) -> None:
    prices: Prices = read_prices()
    second = prices.device_price("H100")
    spending = [
        ("hourly", NOW - 10, 1.0),
        ("hourly", NOW - 3600, 2.0),
        ("monthly", NOW - 3600, 4.0),
        ("monthly", NOW - 40 * 86400, 8.0),
        ("forever", NOW - 400 * 86400, 16.0),
        ("forever", NOW, 32.0),
        ("nobody's", NOW, 64.0),
        (None, NOW, 128.0),
    ]
    limits = [Limit("hourly", 1.0, "hour"), Limit("monthly", 1.0, "month"), Limit("forever", 1.0, "total")]

    async def main() -> None:
        ledger = Ledger(tmp_path / "u.db")
        await ledger.startup()
        before = Budgets(limits)
        for number, (tenant, when, device_s) in enumerate(sorted(spending, key=lambda entry: entry[1])):
            usage = spend(number, tenant, when, device_s)
            ledger.note(usage)
            before.add(tenant or "", prices.request_cost(usage), when)
        ledger.resident([Residency("worker:d", "worker", "f", "forever", "d", 10**12, 100.0, NOW - 100)])
        await ledger.shutdown()
        after = Budgets(limits)
        await rebuild(after, ledger, prices, NOW)
        expected = {"hourly": second, "monthly": 4 * second, "forever": 48 * second, "nobody's": 0}
        for tenant, money in expected.items():
            assert after.spent(tenant, NOW) == pytest.approx(money)
            assert before.spent(tenant, NOW) == pytest.approx(money)

    asyncio.run(main())
