"""The scheduler of a gateway, put together from its configuration: policies, queue, workers, memory and money.

Its parts know each other only through the calls they are given here. It also keeps what must survive a restart: what
was learned of arrivals, and the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from serverlesslora.adapters.store import AdapterStore
from serverlesslora.config import ServerConfig
from serverlesslora.devices import DeviceKind
from serverlesslora.gateway.accounts import Accounts
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.controller import Controller
from serverlesslora.gateway.holdings import Holdings
from serverlesslora.gateway.request_queue import RequestQueue
from serverlesslora.gateway.workers import Workers
from serverlesslora.metering.budgets import Budgets, Limit
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.prices import read_prices
from serverlesslora.registry.functions import Target
from serverlesslora.registry.registry import Registry
from serverlesslora.scheduler.arrivals import ArrivalModel, ArrivalSnapshot
from serverlesslora.scheduler.dispatcher import Dispatcher
from serverlesslora.scheduler.policies import NEVER_SEEN_GAP_S, build_policies
from serverlesslora.scheduler.profile import Profile, write_profile

log = logging.getLogger("serverlesslora.control")

ARRIVALS_FILE = "arrivals.json"
LEDGER_FILE = "usage.sqlite"
KEEP_EVERY_S = 300.0  # what a kill -9 takes of what was learned
LEDGER_EVERY_S = 60.0  # a row for everything that is held


class ControlPlane:
    def __init__(
        self,
        config: ServerConfig,
        *,
        device: DeviceKind,
        registry: Registry,
        services: Mapping[str, BackboneService],
        store: AdapterStore,
        chunk_tokens: int,
    ) -> None:
        """Raises ConfigError when the price file or the ledger cannot be used."""
        self._config = config
        self.device = device
        self.cold_timeout_s = config.cold_timeout_s
        self.store = store
        self._state = Path(config.state_dir)
        self.open_by_domain: Counter[str] = Counter()  # requests, from the door to their end
        self.keeps_deadlines = config.batching == "on"
        prices = read_prices(config.prices)
        budgets = [
            Limit(tenant.name, tenant.budget, tenant.period) for tenant in config.tenants if tenant.budget is not None
        ]
        self.accounts = Accounts(
            Ledger(self._state / LEDGER_FILE), prices, Budgets(budgets, currency=prices.currency), device=device
        )
        self.holdings = Holdings(config, services, device=device, chunk_tokens=chunk_tokens)
        self.controller = Controller(
            build_policies(config.policy, arrivals=self._known_arrivals(), idle_timeout_s=config.idle_timeout_s),
            registry=registry,
            services=services,
            holdings=self.holdings,
            isolation=config.isolation,
            sharing=config.sharing,
            store=store,
            cold_timeout_s=config.cold_timeout_s,
            rest_after_s=config.keep_alive_min_s,
        )
        self.queue = RequestQueue(Dispatcher(config.policy, max_queue=config.max_queue, slots=config.max_running))
        self.workers = Workers(
            idle_timeout=self.controller.idle_timeout,
            cold_timeout_s=config.cold_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            is_wanted=lambda domain: self.open_by_domain[domain] > 0,
            make_room=self.controller.make_room,
            on_change=self.controller.changed,
            on_idle=self.controller.let_go,
            on_start=self.holdings.started,
            look_every_s=min(1.0, (config.idle_timeout_s or config.keep_alive_min_s) / 4),
        )
        self.holdings.connect(self.workers)
        self.controller.connect(self.workers, self.queue)
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self) -> None:
        await self.accounts.startup()
        self._tasks = [
            asyncio.create_task(self.workers.main_loop(), name="idle workers"),
            asyncio.create_task(self.controller.main_loop(), name="controller"),
            asyncio.create_task(self.holdings.main_loop(self.controller.looked), name="memory"),
            asyncio.create_task(self._keep(), name="ledger"),
        ]

    async def shutdown(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.controller.shutdown()
        self.queue.shutdown()
        self._keep_learned()
        await self.workers.shutdown()
        self.accounts.resident(self.holdings.take())
        await self.accounts.shutdown()

    def objective_s(self, request: GenerationRequest, target: Target) -> float:
        """How long the first token may take."""
        own = target.function.slo_ttft_s if target.function else None
        return request.slo_ttft_s or own or self._config.slo_ttft_s

    def expected_cold_s(self, domain: str, service: BackboneService) -> float:
        """Until a worker of the domain can serve."""
        if self.workers.serving(domain) is not None:
            return 0.0
        profile = self.holdings.profile
        loading_s = 0.0 if service.is_ready else profile.backbones[service.name].load_s
        return loading_s + profile.worker_s

    async def write_down(self) -> None:
        """What was held until now is in the ledger when this returns."""
        self.accounts.resident(self.holdings.take())
        await self.accounts.ledger.flush()

    def profile(self) -> Profile:
        return self.holdings.measure()

    async def _keep(self) -> None:
        """Write down what was held and learned."""
        next_at = time.monotonic() + KEEP_EVERY_S
        while True:
            await asyncio.sleep(LEDGER_EVERY_S)
            self.accounts.resident(self.holdings.take())
            if time.monotonic() >= next_at:
                self._keep_learned()
                next_at = time.monotonic() + KEEP_EVERY_S

    def _keep_learned(self) -> None:
        snapshot = self.controller.policies.arrivals.snapshot(time.monotonic(), unix_s=time.time())
        try:
            replace_file(self._state / ARRIVALS_FILE, msgspec.json.encode(snapshot))
            if self._config.profile_out:
                write_profile(self._config.profile_out, self.profile())
        except Exception as error:  # it can be learned again
            log.warning("cannot keep what was learned: %s", error)

    def _known_arrivals(self) -> ArrivalModel:
        model = ArrivalModel(prior_gap_s=NEVER_SEEN_GAP_S, day_offset_s=day_offset_s())
        path = self._state / ARRIVALS_FILE
        if self._config.preload != "on" or not path.exists():
            return model
        try:
            snapshot = msgspec.json.decode(path.read_bytes(), type=ArrivalSnapshot)
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("what was learned of arrivals cannot be read, and is learned again: %s", error)
            return model
        return ArrivalModel.restore(
            snapshot,
            time.monotonic(),
            unix_s=time.time(),
            prior_gap_s=NEVER_SEEN_GAP_S,
            day_offset_s=day_offset_s(),
        )


def day_offset_s() -> float:
    """What to add to the monotonic clock to get seconds since the local midnight of some day."""
    local = time.localtime()
    since_midnight = local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec
    return since_midnight - time.monotonic()


def replace_file(path: Path, content: bytes) -> None:
    """All of it or nothing, whenever the process dies."""
    draft = path.with_suffix(f".{os.getpid()}.new")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
