"""What tenants may spend: money per hour, day or month of the calendar (UTC), or in total. Times are unix seconds.

What was spent before a start comes from the ledger (`rebuild`), so a budget outlives the server.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import Prices, counted

Period = Literal["hour", "day", "month", "total"]


class Limit(NamedTuple):
    tenant: str
    money: float
    period: Period = "month"


class Refusal(NamedTuple):
    reason: str
    retry_after_s: int | None  # until the next period; None: waiting does not help


class _Account:
    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.start = -math.inf  # of the period `spent` belongs to
        self.spent = 0.0

    def turn(self, now: float) -> None:
        """A new period begins with nothing spent. A clock that is set back does not give money back."""
        start, _ = period_of(self.limit.period, now)
        if start > self.start:
            self.start, self.spent = start, 0.0


class Budgets:
    def __init__(self, limits: Iterable[Limit] = (), *, currency: str = "") -> None:
        self._accounts = {limit.tenant: _Account(limit) for limit in limits}
        self._currency = currency

    @property
    def limits(self) -> list[Limit]:
        return [account.limit for account in self._accounts.values()]

    def check(self, tenant: str, now: float) -> Refusal | None:
        """None: it may spend. A budget is refused once it is reached, so the last request may exceed it."""
        account = self._accounts.get(tenant)
        if account is None:
            return None
        account.turn(now)
        if account.spent < account.limit.money:
            return None
        _, end = period_of(account.limit.period, now)
        money = f"{account.spent:.6g} of {account.limit.money:.6g} {self._currency}".rstrip()
        if account.limit.period == "total":
            return Refusal(f"tenant {tenant!r} has spent {money}, its whole budget; raise the budget", None)
        when = datetime.datetime.fromtimestamp(end, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        return Refusal(
            f"tenant {tenant!r} has spent {money}, its budget of this {account.limit.period}; the next begins {when}",
            max(1, math.ceil(end - now)),
        )

    def add(self, tenant: str, money: float, now: float) -> None:
        """Tenants without a budget are not counted. `now`: when it was spent; what belongs to an earlier period than
        the newest seen counts for nothing."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.turn(now)
            if now >= account.start:
                account.spent += money

    def spent(self, tenant: str, now: float) -> float:
        account = self._accounts.get(tenant)
        if account is None:
            return 0.0
        account.turn(now)
        return account.spent


def period_of(period: Period, now: float) -> tuple[float, float]:
    """[start, end) of the period `now` lies in."""
    if period == "total":
        return -math.inf, math.inf
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC).replace(minute=0, second=0, microsecond=0)
    if period == "hour":
        return moment.timestamp(), moment.timestamp() + 3600
    day = moment.replace(hour=0)
    if period == "day":
        return day.timestamp(), day.timestamp() + 86400
    first = day.replace(day=1)
    following = (first + datetime.timedelta(days=32)).replace(day=1)
    return first.timestamp(), following.timestamp()


async def rebuild(budgets: Budgets, ledger: Ledger, prices: Prices, now: float) -> None:
    """Adds what the ledger says was spent in the current periods, with today's prices."""
    for period in sorted({limit.period for limit in budgets.limits}):
        start, _ = period_of(period, now)
        tenants = {limit.tenant for limit in budgets.limits if limit.period == period}
        for row in await ledger.usage(by="tenant", since=start):
            if row.key in tenants and not row.idle:
                budgets.add(row.key, counted(prices.row_money(row)), now)
