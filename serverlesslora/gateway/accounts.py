"""Every request's account: opened when it is accepted, closed once with what it took; none where a budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from serverlesslora.errors import BudgetSpent
from serverlesslora.gateway.backend import Rung
from serverlesslora.gateway.live_state import Spending
from serverlesslora.metering.budgets import Budgets, rebuild
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import Prices
from serverlesslora.metering.usage import RequestUsage, Residency, Status
from serverlesslora.registry.functions import Target
from serverlesslora_ipc.messages import Spent

NOTHING = Spent()


class Account:
    """One request. It is closed exactly once; what comes later is ignored."""

    def __init__(self, accounts: Accounts, request_id: str, target: Target, domain: str, slo_s: float) -> None:
        self._accounts = accounts
        self._request_id = request_id
        self._target = target
        self._domain = domain
        self._slo_s = slo_s
        self._arrived = accounts.clock()
        self._arrived_wall = accounts.wall_clock()
        self._first_token_s: float | None = None
        self._is_closed = False
        self.rung: Rung = "hot"

    @property
    def arrived_at(self) -> float:
        return self._arrived

    @property
    def first_token_s(self) -> float | None:
        """After its arrival; None: it has not come yet."""
        return self._first_token_s

    def saw_token(self) -> None:
        if self._first_token_s is None:
            self._first_token_s = self._accounts.clock() - self._arrived

    async def finish(self, spent: Spent) -> None:
        """Returns when the account survives the death of this process; only then may the last bytes be sent."""
        if usage := self._close("finished", spent):
            await self._accounts.ledger.record(usage)

    def close(self, status: Status, spent: Spent | None = None) -> None:
        """Any other end. Never waits."""
        if usage := self._close(status, spent or NOTHING):
            self._accounts.ledger.note(usage)

    def _close(self, status: Status, spent: Spent) -> RequestUsage | None:
        if self._is_closed:
            return None
        self._is_closed = True
        duration_s = self._accounts.clock() - self._arrived
        first_token_s = self._first_token_s
        waited_s = duration_s if first_token_s is None else first_token_s
        function = self._target.function
        usage = RequestUsage(
            request_id=self._request_id,
            function=function.name if function else self._target.backbone.name,
            tenant=function.tenant if function else None,
            domain=self._domain,
            backbone=self._target.backbone.name,
            digest=self._target.digest,
            started_at=self._arrived_wall,
            prompt_tokens=spent.prompt_tokens,
            cached_tokens=spent.cached_tokens,
            completion_tokens=spent.completion_tokens,
            device_s=spent.device_s,
            queue_s=spent.queue_s,
            ttft_s=first_token_s,
            duration_s=duration_s,
            rung=self.rung,
            status=status,
            slo_missed=waited_s > self._slo_s or status == "refused",
            device=self._accounts.device,
        )
        self._accounts.spend(usage)
        return usage


class Accounts:
    def __init__(
        self,
        ledger: Ledger,
        prices: Prices,
        budgets: Budgets,
        *,
        device: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.prices = prices
        self.device = device
        self.clock = clock
        self.wall_clock = wall_clock
        self._budgets = budgets
        self._watchers: list[Spending] = []

    def watch(self, spending: Spending) -> None:
        """It hears of every request's cost, and of memory as often as that is written down."""
        self._watchers.append(spending)

    async def startup(self) -> None:
        """Raises ConfigError when the ledger cannot be used."""
        await self.ledger.startup()
        await rebuild(self._budgets, self.ledger, self.prices, self.wall_clock())

    async def shutdown(self) -> None:
        await self.ledger.shutdown()

    @property
    def problem(self) -> str | None:
        """Why accounts are not being written down; None: they are."""
        return self.ledger.problem

    def check(self, tenant: str | None) -> None:
        """Raises BudgetSpent."""
        if tenant is not None and (refusal := self._budgets.check(tenant, self.wall_clock())):
            raise BudgetSpent(refusal.reason, retry_after_s=refusal.retry_after_s)

    def open(self, request_id: str, target: Target, domain: str, *, slo_s: float) -> Account:
        function = target.function
        account = Account(self, request_id, target, domain, slo_s)
        self.ledger.begin(
            request_id,
            function=function.name if function else target.backbone.name,
            tenant=function.tenant if function else None,
            domain=domain,
            backbone=target.backbone.name,
            digest=target.digest,
            started_at=self.wall_clock(),
            device=self.device,
        )
        return account

    def spend(self, usage: RequestUsage) -> None:
        if usage.tenant is not None:
            self._budgets.add(usage.tenant, self.prices.request_cost(usage), self.wall_clock())
        if self._watchers:
            money = self.prices.request_money(usage)
            for each in self._watchers:
                each.spent(usage.function, usage.tenant, money.device, money.charged)

    def resident(self, rows: Sequence[Residency]) -> None:
        if rows:
            self.ledger.resident(rows)
        for row in rows:
            for each in self._watchers:
                tenant = row.tenant if row.function else None
                each.held(row.function or "", tenant, row.kind, row.byte_s, self.prices.holding_cost(row))
