"""All queues of a gateway: asks come in, what to send to which worker comes out.

There is no second queue: a worker gets what it has slots for and nothing more. Who cannot make its deadline is refused
when it asks, by prediction, or at the latest when the time to start has passed. Of the domains of a device the one
with the smallest margin goes first; inside a domain `DomainQueue` decides. A prompt for an idle worker may be held back
for a moment while others are computed on the same device: two at once make both late, and more may join it meanwhile.

Pure: the caller says what happened and what time it is, and calls next() after it said something, and after wait_s().
With batching off there is one slot, first come first served, without deadlines: what comparisons compare with.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count

from serverlesslora.scheduler.admission import Learned, retry_after
from serverlesslora.scheduler.agenda import Agenda
from serverlesslora.scheduler.asks import Ask, Refusal, Send
from serverlesslora.scheduler.batching import Batching
from serverlesslora.scheduler.domain_queue import DomainQueue, Entry
from serverlesslora.scheduler.domains import Device, Domain
from serverlesslora.scheduler.fair_share import FairShare
from serverlesslora.scheduler.latency import LatencyModel
from serverlesslora.scheduler.settings import PolicySettings

__all__ = ["Ask", "Dispatcher", "Refusal", "Send"]

GUESS_BASE_S, GUESS_TOKEN_S = 0.05, 0.0005  # of a prefill, where nobody knows better


class Dispatcher:
    def __init__(
        self,
        settings: PolicySettings,
        *,
        max_queue: int,
        slots: int,
        fair_share: Callable[[], FairShare] = FairShare,
        new_latency: Callable[[str, str], LatencyModel] | None = None,
    ) -> None:
        """`max_queue` asks of a domain may wait; `slots` sequences run in a worker at once. `fair_share` makes the
        counters of one domain, `new_latency(device, backbone)` the first guess of its prefill times."""
        if max_queue < 0 or slots < 1:
            raise ValueError(f"max_queue {max_queue} and slots {slots}: give at least 0 and 1")
        self._is_on = settings.batching == "on"
        self._max_queue = max_queue
        self._slots = slots if self._is_on else 1
        self._fair_share = fair_share
        self._new_latency = new_latency or (lambda device, backbone: LatencyModel(GUESS_BASE_S, GUESS_TOKEN_S))
        self._batching = Batching()
        self._open: set[str] = set()
        self._domains: dict[str, Domain] = {}  # that have asks, or are open and had some
        self._devices: dict[str, Device] = {}
        self._learned: dict[tuple[str, str], Learned] = {}
        self._entries: dict[str, Entry] = {}  # waiting and running
        self._num_waiting = 0
        self._numbers = count()
        self._touched: dict[str, Device] = {}  # next() looks at them
        self._refusals: list[Refusal] = []  # for the next call of next()
        self._expiries = Agenda[Entry](lambda at, entry: entry.is_waiting)
        self._timers = Agenda[Domain](lambda at, domain: domain.wake_at == at)

    # --- what happened

    def offer(self, ask: Ask, now: float, *, cold_s: float = 0.0) -> Refusal | None:
        """None: it is queued. `cold_s` is what its worker will probably still take to start. A domain may move to
        another device while nothing of it runs."""
        assert ask.request_id not in self._entries, f"{ask.request_id} was offered twice"
        domain = self._domain_of(ask)
        # With batching off all are one tenant without deadlines.
        deadline, owner = (ask.deadline, ask.owner) if self._is_on else (math.inf, "")
        # On an idle device; M stretches all in a line alike.
        latest_start = deadline - domain.learned.latency.predict(ask.prompt_tokens)
        key = (latest_start, ask.arrived_at, next(self._numbers))
        need = min(ask.sequences, self._slots)
        entry = Entry(ask, key, owner, deadline, expires_at=latest_start, queued_at=now, need=need)
        refusal = self._judge(entry, domain, now, cold_s)
        if refusal is not None:
            self._drop_if_unused(domain)
            return refusal
        self._entries[ask.request_id] = entry
        self._num_waiting += 1
        domain.queue.add(entry, now)
        if entry.expires_at < math.inf:
            self._expiries.add(entry.expires_at, entry)
        self._touch(domain)
        return None

    def open(self, domain: str, now: float) -> None:
        """Its worker serves."""
        self._open.add(domain)
        if (found := self._domains.get(domain)) is not None:
            self._touch(found)

    def close(self, domain: str) -> None:
        """Its worker is gone: nothing is sent until it is opened again. What was running must still be ended."""
        self._open.discard(domain)
        if (found := self._domains.get(domain)) is not None:
            self._drop_if_unused(found)

    def first_token(self, request_id: str, now: float, *, is_typical: bool = True) -> None:
        """Of a request that was sent. Further ones, and those of unknown requests, are ignored.

        `is_typical`: False for one that also waited for something to be loaded, from which nothing is to be learned.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.batch is None or entry.has_token:
            return
        domain = self._domains[entry.ask.domain]
        # M changed on the way: the mean of both ends stands for all of it.
        num_batches = (entry.batch.num_batches + domain.device.num_busy) / 2
        if is_typical:
            domain.learned.latency.observe(entry.batch.tokens, max(0.0, now - entry.sent_at) / num_batches)
        entry.has_token = True
        self._prefilled(domain, entry)

    def ended(self, request_id: str, now: float, *, prompt_tokens: int, output_tokens: int) -> None:
        """It has finished or failed, its slots are free. An unknown one (refused a moment ago) is ignored."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        if entry.is_waiting:
            self._forget(entry)
            return
        del self._entries[request_id]
        domain = self._domains[entry.ask.domain]
        if not entry.has_token:
            self._prefilled(domain, entry)
        domain.end(entry, now, prompt_tokens, output_tokens)
        self._touch(domain)
        self._drop_if_unused(domain)

    def cancelled(self, request_id: str, now: float) -> None:
        """Its client left while it was queued. One that was sent must be ended instead, or is taken to have cost
        nothing; an unknown one is ignored."""
        self.ended(request_id, now, prompt_tokens=0, output_tokens=0)

    # --- what to do

    def next(self, now: float) -> list[Send | Refusal]:
        """What to do now, in this order."""
        todo: list[Send | Refusal] = [*self._refusals]
        self._refusals.clear()
        while (entry := self._expiries.take_due(now)) is not None:
            todo.append(self._expired(entry, now))
        while (domain := self._timers.take_due(now)) is not None:
            domain.wake_at = None
            self._touch(domain)
        touched, self._touched = self._touched, {}
        for device in touched.values():
            self._dispatch(device, now, todo)
        return todo

    def wait_s(self, now: float) -> float | None:
        """Seconds until next() should be called again if nothing happens before; None: never."""
        if self._touched or self._refusals:
            return 0.0
        times = [at for at in (self._expiries.first_at(), self._timers.first_at()) if at is not None]
        return max(0.0, min(times) - now) if times else None

    def _dispatch(self, device: Device, now: float, todo: list[Send | Refusal]) -> None:
        """Send what there are slots for, the domain with the smallest margin first."""
        num_batches = device.num_busy + 1  # one M for all that are compared
        hurry: list[tuple[float, int, Domain, Entry]] = []

        def enter(domain: Domain) -> None:
            entry, held_until = domain.queue.next_up(now)
            if entry is not None:
                margin_s = domain.margin_s(self._batching, entry, now, num_batches)
                heapq.heappush(hurry, (margin_s, entry.key[2], domain, entry))
            elif held_until is not None:
                self._wake(domain, held_until)

        for domain in device.touched.values():
            if domain.name in self._open:
                enter(domain)
        device.touched.clear()
        sent: dict[str, Domain] = {}
        while hurry:
            _, _, domain, entry = heapq.heappop(hurry)
            until = domain.fill_until(self._batching, entry, now) if self._is_on else now
            if until > now:
                if domain.filling_since is None:
                    domain.filling_since = entry.queued_at
                device.filling[domain.name] = domain
                self._wake(domain, until)
                continue
            todo.append(self._send(domain, entry, now))
            sent[domain.name] = domain
            enter(domain)
        for domain in sent.values():
            assert domain.batch is not None
            domain.batch.num_batches, domain.batch = device.num_busy, None

    def _send(self, domain: Domain, entry: Entry, now: float) -> Send:
        reason, window_s = "the worker has a free slot" if domain.running else "the worker is idle", 0.0
        if domain.filling_since is not None:
            window_s = now - max(domain.filling_since, entry.queued_at)
            reason = "its batch has waited to fill"
        domain.filling_since = None
        domain.device.filling.pop(domain.name, None)
        domain.send(entry, now)
        self._num_waiting -= 1
        return Send(entry.ask.request_id, now - entry.queued_at, window_s, reason)

    def _expired(self, entry: Entry, now: float) -> Refusal:
        retry_s = retry_after(self._domains[entry.ask.domain].ttft_s(entry, 0.0))
        self._forget(entry)
        reason = f"it waited {now - entry.queued_at:.2f} s and cannot have its first token in time any more"
        return Refusal(entry.ask.request_id, 503, retry_s, reason)

    # --- admission

    def _judge(self, entry: Entry, domain: Domain, now: float, cold_s: float) -> Refusal | None:
        """Whether it is refused now. May displace somebody who waits."""
        queue, request_id = domain.queue, entry.ask.request_id
        num_own = queue.num_of(entry.owner)
        share = self._max_queue / (queue.num_lines + (num_own == 0))
        if entry.deadline < math.inf:
            ttft_s = domain.ttft_s(entry, cold_s)
            late_s = now + ttft_s - entry.deadline
            # Where nobody waits for anything one is let through: a prediction that refuses all would never learn.
            if late_s > 0 and (queue.num_waiting or domain.prefilling):
                reason = f"its first token is expected in {ttft_s:.2f} s, {late_s:.2f} s too late"
                return Refusal(request_id, 429 if num_own >= share else 503, retry_after(late_s), reason)
            if late_s > 0:
                entry.expires_at = entry.deadline
        if queue.num_waiting < self._max_queue:
            return None
        retry_s = retry_after(domain.slots_s(queue.num_waiting_slots // 8 + 1))
        if num_own >= share:
            reason = f"{queue.num_waiting} requests of this domain wait, the most that may; {num_own} of this tenant"
            return Refusal(request_id, 429, retry_s, reason)
        # The queue is full of somebody else's: their last one makes place.
        displaced = queue.longest_line().last
        self._forget(displaced, for_another=True)
        reason = "too many requests of this tenant wait; another tenant needs the place"
        self._refusals.append(Refusal(displaced.ask.request_id, 429, retry_s, reason))
        return None

    # --- for people and tests

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_running(self) -> int:
        """Requests, not sequences."""
        return len(self._entries) - self._num_waiting

    @property
    def num_domains(self) -> int:
        """That something is remembered of."""
        return len(self._domains)

    def waiting_in(self, domain: str) -> int:
        found = self._domains.get(domain)
        return found.queue.num_waiting if found is not None else 0

    def explain(self, domain: str, now: float) -> str:
        """One line."""
        state = "open" if domain in self._open else "without a worker"
        found = self._domains.get(domain)
        if found is None:
            return f"{domain}: {state}, nothing waits"
        return f"{domain} on {found.device.name}: {state}, {found.explain(self._batching, now)}"

    def check(self) -> None:
        """Our invariants; slow."""
        waiting = [entry for entry in self._entries.values() if entry.is_waiting]
        assert self._num_waiting == len(waiting) == sum(d.queue.num_waiting for d in self._domains.values())
        assert {(e.expires_at, e) for e in waiting if e.expires_at < math.inf} <= set(self._expiries)
        for device in self._devices.values():
            domains = [d for d in self._domains.values() if d.device is device]
            assert device.num_busy == sum(1 for d in domains if d.running)
            assert device.num_prefilling == sum(1 for d in domains if d.prefilling)
            assert all(self._domains.get(name) is d for name, d in (device.touched | device.filling).items())
            assert not device.touched or device.name in self._touched
        for domain in self._domains.values():
            sent = [e for e in self._entries.values() if e.ask.domain == domain.name and not e.is_waiting]
            unanswered = [e for e in sent if not e.has_token]
            assert domain.running == len(sent) and domain.prefilling == len(unanswered)
            assert domain.prefill_tokens == sum(e.ask.prompt_tokens for e in unanswered)
            assert domain.queue.num_waiting <= self._max_queue
            assert domain.name in self._open or sent or domain.queue.num_waiting
            assert domain.wake_at is None or (domain.wake_at, domain) in set(self._timers)
            domain.queue.check()

    # --- parts

    def _domain_of(self, ask: Ask) -> Domain:
        domain = self._domains.get(ask.domain)
        if domain is not None and (domain.device.name == ask.device or domain.running):
            return domain
        device = self._devices.get(ask.device)
        if device is None:
            device = self._devices[ask.device] = Device(ask.device)
        learned = self._learned.get((ask.device, ask.backbone))
        if learned is None:
            learned = Learned(self._new_latency(ask.device, ask.backbone), self._slots)
            self._learned[ask.device, ask.backbone] = learned
        if domain is None:
            queue = DomainQueue(self._slots, self._fair_share())
            domain = self._domains[ask.domain] = Domain(ask.domain, device, learned, learned.pace.follower(), queue)
        else:
            domain.leave_device()
            domain.device, domain.learned, domain.pace = device, learned, learned.pace.follower()
            self._touch(domain)
        return domain

    def _prefilled(self, domain: Domain, entry: Entry) -> None:
        domain.prefilled(entry.ask)
        if not domain.device.num_prefilling:
            for filling in domain.device.filling.values():
                self._touch(filling)

    def _forget(self, entry: Entry, *, for_another: bool = False) -> None:
        """It waits no more and will not be sent."""
        domain = self._domains[entry.ask.domain]
        entry.is_waiting = False
        del self._entries[entry.ask.request_id]
        self._num_waiting -= 1
        domain.queue.remove(entry)
        if not domain.queue.num_waiting:
            domain.filling_since = None
            domain.device.filling.pop(domain.name, None)
        self._touch(domain)
        if not for_another:
            self._drop_if_unused(domain)

    def _touch(self, domain: Domain) -> None:
        domain.device.touched[domain.name] = domain
        self._touched[domain.device.name] = domain.device

    def _drop_if_unused(self, domain: Domain) -> None:
        if not (domain.running or domain.queue.num_waiting or domain.name in self._open):
            domain.leave_device()
            del self._domains[domain.name]

    def _wake(self, domain: Domain, at: float) -> None:
        if domain.wake_at != at:
            domain.wake_at = at
            self._timers.add(at, domain)
