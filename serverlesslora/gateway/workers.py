"""Which worker serves which domain: started on demand once, found again, stopped when idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

from serverlesslora.errors import ServerlessLoraError, Unavailable, WorkerLost
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.gateway.worker_state import WorkerState

log = logging.getLogger("serverlesslora.workers")


class Placed(NamedTuple):
    """A worker that can take a request, and what it cost to have it."""

    link: WorkerLink
    backbone_s: float  # waiting for the backbone itself
    worker_s: float  # forking and attaching


async def always_room(domain: str, service: BackboneService) -> None:
    """For those who do not count memory."""


class Workers:
    """At most one usable worker per domain. Everything here runs on the event loop, so looks and acts are atomic.

    What is decided elsewhere comes in as calls: how long an idle domain keeps its worker, whether somebody still wants
    it (a request may be on its way to it without being open yet), and room in memory for one more, which may take a
    while or fail with Unavailable. `on_change` hears of every worker that begins to serve, leaves or is gone, `on_idle`
    of the domains that were let go, `on_start` of the seconds a start took.
    """

    def __init__(
        self,
        *,
        idle_timeout: Callable[[str], float],
        cold_timeout_s: float,
        is_wanted: Callable[[str], bool] = lambda domain: False,
        make_room: Callable[[str, BackboneService], Awaitable[None]] = always_room,
        on_change: Callable[[WorkerLink], None] = lambda link: None,
        on_idle: Callable[[str], None] = lambda domain: None,
        on_start: Callable[[WorkerLink, float], None] = lambda link, seconds: None,
        look_every_s: float = 1.0,
        leave_timeout_s: float = 5.0,
        stall_timeout_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_timeout = idle_timeout
        self._is_wanted = is_wanted
        self._make_room = make_room
        self._on_change = on_change
        self._on_idle = on_idle
        self._on_start = on_start
        self._look_every_s = look_every_s
        self._cold_timeout_s = cold_timeout_s
        self._leave_timeout_s = leave_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._by_domain: dict[str, WorkerLink] = {}
        self._all: dict[str, WorkerLink] = {}  # also those that are leaving
        self._starting: dict[str, asyncio.Task[Placed]] = {}
        self._pumps: set[asyncio.Task[None]] = set()

    def find(self, domain: str) -> WorkerLink | None:
        link = self._by_domain.get(domain)
        return link if link is not None and link.is_usable else None

    def serving(self, domain: str) -> WorkerLink | None:
        """One that can take a request at once."""
        link = self._by_domain.get(domain)
        return link if link is not None and link.state is WorkerState.SERVING else None

    def __iter__(self) -> Iterator[WorkerLink]:
        yield from list(self._all.values())

    async def place(self, domain: str, service: BackboneService) -> Placed:
        """The domain's worker, started if there is none; however many ask at once, one is started.

        Raises Unavailable when none is ready within the cold timeout, WorkerLost when it died on the way.
        """
        if (link := self.serving(domain)) is not None:
            return Placed(link, 0.0, 0.0)
        task = self._starting.get(domain)
        if task is None:
            task = asyncio.create_task(self._start(domain, service), name=f"start {domain}")
            self._starting[domain] = task
            task.add_done_callback(lambda done: self._started(domain, done))
        # One of many waiters going away must not stop the start the others wait for.
        return await asyncio.shield(task)

    async def start_alone(self, domain: str, service: BackboneService) -> WorkerLink:
        """A worker outside the table, for one job its caller will retire it after. Raises as `place` does."""
        link = None
        try:
            async with asyncio.timeout(self._cold_timeout_s):
                await self._make_room(domain, service)
                link = service.fork(domain, may_be_spare=False)
                self._adopt(link, service)
                await asyncio.shield(link.ready)
        except TimeoutError:
            raise self._late() from None
        finally:
            if link is not None and not link.ready.done():  # nobody else knows of it
                link.kill()
        return link

    def is_starting(self, domain: str) -> bool:
        return domain in self._starting

    def is_idle(self, link: WorkerLink) -> bool:
        """It serves, nothing runs on it and nobody is on the way to it."""
        return link.state is WorkerState.SERVING and not link.num_open and not self._is_wanted(link.domain)

    def retire(self, link: WorkerLink) -> None:
        """Stop a worker that has no open request; the domain forgets it first."""
        if self._by_domain.get(link.domain) is link:
            del self._by_domain[link.domain]
        link.retire()
        self._on_change(link)
        asyncio.get_running_loop().call_later(self._leave_timeout_s, link.kill)

    def retire_idle(self) -> list[str]:
        """Stop every worker that has been idle for longer than its domain is worth; returns their domains."""
        now = self._clock()
        idle = [
            link
            for link in self._by_domain.values()
            # A starting worker is somebody's: its requests arrive right after it is ready.
            if self.is_idle(link) and now - link.last_used >= self._idle_timeout(link.domain)
        ]
        for link in idle:
            self.retire(link)
            self._on_idle(link.domain)
        return [link.domain for link in idle]

    def kill_stalled(self) -> str | None:
        """End the worker that has been silent for longest, if for too long; returns its domain.

        One at a time: a worker that hangs inside its turn silences all others of the device, and they go on once it
        is gone.
        """
        working = [link for link in self._all.values() if link.num_open]
        link = min(working, key=lambda worker: worker.heard_at, default=None)
        if link is None or self._clock() - link.heard_at < self._stall_timeout_s:
            return None
        link.kill()
        for other in working:
            other.heard_at = self._clock()
        return link.domain

    async def main_loop(self) -> None:
        while True:
            await asyncio.sleep(self._look_every_s)
            try:
                for domain in self.retire_idle():
                    log.info("stopped the idle worker of %s", domain)
                if stalled := self.kill_stalled():
                    log.error("killed the worker of %s: it had requests and said nothing", stalled)
            except Exception:  # a mistake about one worker must not keep all others for ever
                log.exception("idle workers could not be looked after")

    async def shutdown(self) -> None:
        for task in list(self._starting.values()):
            task.cancel()
        for link in self:
            if link.num_open:
                link.kill()  # it had its time to finish
            elif link.is_usable:
                self.retire(link)
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=self._leave_timeout_s)
        for link in self:
            link.kill()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _start(self, domain: str, service: BackboneService) -> Placed:
        began = self._clock()
        try:
            async with asyncio.timeout(self._cold_timeout_s):
                await service.wait_ready()
                ready = asked = self._clock()
                link = self.find(domain)  # an earlier start may have run out of time and left it
                if link is None:
                    await self._make_room(domain, service)
                    asked = self._clock()
                    link = self._by_domain[domain] = service.fork(domain)
                    self._adopt(link, service)
                await asyncio.shield(link.ready)
                self._on_start(link, self._clock() - asked)
        except TimeoutError:
            # One that had hardly begun goes on, for the next request; one that had its time is stuck.
            if (link := self.find(domain)) and time.monotonic() - link.started_at > self._cold_timeout_s / 2:
                del self._by_domain[domain]
                link.kill()
            raise self._late() from None
        return Placed(link, ready - began, self._clock() - ready)

    def _late(self) -> Unavailable:
        return Unavailable(f"no worker was ready within {self._cold_timeout_s:g} s; it may be by now", retry_after_s=5)

    def _started(self, domain: str, task: asyncio.Task[Placed]) -> None:
        self._starting.pop(domain, None)
        if not task.cancelled() and (error := task.exception()):
            log.warning("no worker for %s: %s", domain, error)

    def _adopt(self, link: WorkerLink, service: BackboneService) -> None:
        link.backbone = service.name
        link.on_change = self._on_change
        self._all[link.worker_id] = link
        pump = asyncio.create_task(link.main_loop(self._gone), name=f"worker {link.worker_id}")
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        self._on_change(link)  # its memory is spoken for from now on

    def _gone(self, link: WorkerLink) -> None:
        self._all.pop(link.worker_id, None)
        if self._by_domain.get(link.domain) is link:
            del self._by_domain[link.domain]
        self._on_change(link)


@contextlib.contextmanager
def retired_after(workers: Workers, link: WorkerLink) -> Iterator[WorkerLink]:
    try:
        yield link
    finally:
        if link.is_usable and not link.num_open:
            workers.retire(link)


def is_retryable(error: ServerlessLoraError, *, started: bool) -> bool:
    """Only a request of which nothing was heard yet may be given to another worker."""
    return isinstance(error, WorkerLost) and not started
