"""The life of every request under one system, from its arrival to its one end.

arrival -> a worker is chosen or started -> queued by the dispatcher -> sent -> memory and adapter -> prompt -> first
token -> last token. Times are seconds from the beginning of the trace.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from serverlesslora.scheduler.arrivals import ArrivalModel
from serverlesslora.scheduler.asks import Ask, Refusal
from serverlesslora.scheduler.dispatcher import Dispatcher
from serverlesslora.scheduler.latency import LatencyModel
from serverlesslora.scheduler.policies import NEVER_SEEN_GAP_S, build_policies
from serverlesslora.simulator.calendar import ADAPTER, DEVICE, DISPATCH, IDLE, PLAN, READY, WAKE, Calendar
from serverlesslora.simulator.cluster import Cluster
from serverlesslora.simulator.device import PREFILL, Device, Worker
from serverlesslora.simulator.fleet import Fleet, Functions
from serverlesslora.simulator.installing import install
from serverlesslora.simulator.planning import Planner
from serverlesslora.simulator.routing import Router
from serverlesslora.simulator.systems import System
from serverlesslora.simulator.trace import Trace

RUNGS = ("hot", "adapter-ram", "adapter-disk", "worker", "backbone")
HOT, WORKER, BACKBONE = 0, 3, 4

OPEN, FINISHED, REFUSED = 0, 1, 2

PROGRESS_EVERY = 4096  # requests


class Outcome(NamedTuple):
    """What happened; the lists are indexed by request."""

    fleet: Fleet
    end_s: float  # when the last request ended, at least the trace's duration
    status: bytearray
    rungs: bytearray
    ttft: list[float]  # NaN for refused ones
    e2e: list[float]
    refusals: dict[str, int]  # by reason
    num_events: int


class Simulation:
    def __init__(
        self,
        trace: Trace,
        cluster: Cluster,
        system: System,
        *,
        on_progress: Callable[[int], None] | None = None,
        check: bool = False,
    ) -> None:
        """`check` verifies every invariant after every event: for tests."""
        config = cluster.config
        slo_s = config.functions.slo_ttft_s
        self.trace = trace
        self.config = config
        self.settings = msgspec.structs.replace(config.policies.applied_to(system.settings), slo_ttft_s=slo_s)
        arrivals = ArrivalModel(prior_gap_s=NEVER_SEEN_GAP_S, day_offset_s=trace.day_offset_s)
        self.system = msgspec.structs.replace(system, settings=self.settings)
        self.policies = build_policies(self.settings, arrivals=arrivals, idle_timeout_s=system.keep_alive_s)
        self.functions = Functions(trace.names, cluster.tenants_of(trace.names), self.system)
        self.calendar = Calendar()
        self.fleet = Fleet(cluster, self.system, self.functions, self.policies, self.calendar, self._gone)
        self.router = Router(self.fleet, slots=config.slots if self.settings.batching == "on" else 1)
        self.planner = Planner(self.fleet, self.router, self.policies, self.settings)
        self._steps = self.fleet.steps
        self._gateway_s = cluster.profile.gateway_s
        self._knows_objectives = (config.deadline or system.deadline) == "objective"
        self._on_progress = on_progress
        self._check = check
        steps = self.fleet.steps

        def first_guess(device: str, backbone: str) -> LatencyModel:
            return LatencyModel(steps.prefill_s, steps.prefill_token_s)

        self._dispatchers = [
            Dispatcher(self.settings, max_queue=config.max_queue, slots=config.slots, new_latency=first_guess)
            for _ in self.fleet.devices
        ]
        self._dispatch_at = [math.inf] * len(self.fleet.devices)
        num = trace.num_requests
        self._times: list[float] = trace.times.tolist()
        self._function: list[int] = trace.functions.tolist()
        self._prompt: list[int] = trace.prompt_tokens.tolist()
        self._output: list[int] = trace.output_tokens.tolist()
        self._worker: list[Worker | None] = [None] * num
        self._kv = [0] * num
        self.status = bytearray(num)
        self.rungs = bytearray(num)
        self.ttft = [math.nan] * num
        self.e2e = [math.nan] * num
        self.refusals: dict[str, int] = {}
        self._num_open = 0
        self._unplaced: dict[int, deque[int]] = {}  # domain -> requests that no device has room for
        self._handlers: dict[int, Callable[[float, Any, int], None]] = {
            DEVICE: self._device_event,
            READY: self._ready,
            ADAPTER: self._adapter_loaded,
            IDLE: self._idle,
            WAKE: self._wake,
            DISPATCH: self._dispatch_due,
            PLAN: self._plan,
        }

    # --- the loop

    def run(self) -> Outcome:
        if self.system.life == "always":
            for worker in install(self.fleet, self._function):
                self._dispatchers[worker.device.index].open(str(worker.domain), 0.0)
        self.calendar.add(0.0, PLAN, None)
        entries, times, num = self.calendar.entries, self._times, len(self._times)
        handlers = self._handlers
        arrived = 0
        num_events = 0
        now = 0.0
        end = self.trace.duration_s
        while True:
            at = times[arrived] if arrived < num else math.inf
            if entries and entries[0][0] <= at:
                if arrived == num and not self._num_open and entries[0][0] > end:
                    break
                now, _, kind, subject, number = heapq.heappop(entries)
                handlers[kind](now, subject, number)
            elif arrived < num:
                now = at
                self._arrive(now, arrived)
                arrived += 1
                if self._on_progress is not None and arrived % PROGRESS_EVERY == 0:
                    self._on_progress(arrived)
            else:
                break
            num_events += 1
            if self._check:
                self.check()
        assert not self._num_open, f"{self._num_open} requests never ended"
        end = max(end, now)
        for device in self.fleet.devices:
            device.advance(end)
            device.hold(0, end)
        for host in self.fleet.hosts:
            host.hold(0, end)
        return Outcome(
            self.fleet,
            end,
            self.status,
            self.rungs,
            self.ttft,
            self.e2e,
            dict(sorted(self.refusals.items())),
            num_events,
        )

    # --- arrival and routing

    def _arrive(self, now: float, request: int) -> None:
        self._num_open += 1
        function = self._function[request]
        self.policies.arrivals.observe(self.functions.names[function], now)
        self._kv[request] = (self._prompt[request] + self._output[request]) * self.fleet.backbone.kv_bytes_per_token
        domain = self.functions.domain[function]
        if domain in self._unplaced:
            self._unplaced[domain].append(request)
            return
        worker = self.router.route(domain, self._prompt[request], self._kv[request], now)
        if worker is not None:
            self._offer(worker, request, now)
        elif self.system.life == "always":
            self._refuse(request, "its KV fits nowhere" if self.fleet.workers[domain] else "no room for its model")
        elif not self._could_ever_fit(request):
            self._refuse(request, "its KV fits nowhere")
        else:
            self._unplaced[domain] = deque([request])

    def _could_ever_fit(self, request: int) -> bool:
        fleet = self.fleet
        own = fleet.process_bytes + fleet.open_bytes + (0 if fleet.sharing else fleet.backbone.size_bytes)
        return own + fleet.adapter_bytes + self._kv[request] <= fleet.devices[0].capacity

    def _offer(self, worker: Worker, request: int, now: float) -> None:
        """Give it to the dispatcher of the worker's device."""
        function = self._function[request]
        worker.open += 1
        worker.users[function] = worker.users.get(function, 0) + 1
        self._worker[request] = worker
        if not worker.serving:
            self.rungs[request] = BACKBONE if worker.waits == "backbone" else WORKER
        index = worker.device.index
        arrived = self._times[request]
        cold_s = max(0.0, worker.ready_at - now)
        ask = Ask(
            str(request),
            self.functions.names[function],
            self.functions.tenants[function],
            str(worker.domain),
            "device",
            self._prompt[request],
            self._output[request],
            arrived,
            self._deadline(arrived, cold_s, now),
        )
        refusal = self._dispatchers[index].offer(ask, now, cold_s=cold_s)
        if refusal is not None:
            self._release(request, now)
            self._refuse(request, _kind_of(refusal))
        elif worker.serving:
            self._pump(worker.device, now)

    def _deadline(self, arrived: float, cold_s: float, now: float) -> float:
        """When its first token is too late to be worth computing, as the live server has it: a start that takes longer
        than the objective is waited for all the same."""
        if self._knows_objectives and not cold_s and now == arrived:
            return arrived + self.settings.slo_ttft_s
        return arrived + self.config.patience_s + (self.settings.slo_ttft_s if self._knows_objectives else 0.0)

    # --- sending

    def _pump(self, device: Device, now: float) -> None:
        """Do what the dispatcher says, until it says nothing more, and come back when it wants to."""
        dispatcher = self._dispatchers[device.index]
        again = dispatcher.num_waiting > 0  # most ends leave nobody waiting: then it has nothing to say
        while again:
            again = False
            for what in dispatcher.next(now):
                request = int(what.request_id)
                if isinstance(what, Refusal):
                    self._release(request, now)
                    self._refuse(request, _kind_of(what))
                elif now - self._times[request] > self.config.patience_s:
                    dispatcher.cancelled(what.request_id, now)
                    self._release(request, now)
                    self._refuse(request, "its client lost patience")
                    again = True  # its slot is free
                else:
                    worker = self._worker[request]
                    assert worker is not None
                    worker.blocked.append(request)
        self._unblock(device, now)
        wait_s = dispatcher.wait_s(now) if dispatcher.num_waiting else None
        if wait_s is not None:
            at = now + max(wait_s, 1e-6)
            if at < self._dispatch_at[device.index]:
                self._dispatch_at[device.index] = at
                self.calendar.add(at, DISPATCH, device)

    def _dispatch_due(self, now: float, device: Device, _: int) -> None:
        if self._dispatch_at[device.index] <= now:
            self._dispatch_at[device.index] = math.inf
            self._pump(device, now)

    def _unblock(self, device: Device, now: float) -> None:
        """Sent requests get memory for KV and adapter, in order; the first that cannot have it holds up the rest."""
        changed = False
        for queue in device.queues:
            if queue:
                changed |= self._unblock_some(queue, now)
        if changed:
            self._reschedule(device, now)

    def _unblock_some(self, queue: deque[int], now: float) -> bool:
        """Says whether a worker got something to do that had nothing."""
        changed = False
        while queue:
            request = queue[0]
            worker = self._worker[request]
            assert worker is not None
            function = self._function[request]
            is_new = function not in worker.adapters
            if not self.fleet.take(worker, self._kv[request] + (self.fleet.adapter_bytes if is_new else 0), now):
                break
            queue.popleft()
            if is_new:
                delay_s, rung = self.fleet.adapter_delay_s(worker, function)
                worker.adapters[function] = now + delay_s
                if not self.rungs[request]:
                    self.rungs[request] = RUNGS.index(rung)
            else:
                worker.adapters[function] = worker.adapters.pop(function)  # newest use last
            if worker.adapters[function] > now:
                self.calendar.add(worker.adapters[function], ADAPTER, worker, request)
            else:
                changed |= self._enqueue(worker, request, now)
        return changed

    def _adapter_loaded(self, now: float, worker: Worker, request: int) -> None:
        if self._enqueue(worker, request, now):
            self._reschedule(worker.device, now)

    # --- computing

    def _enqueue(self, worker: Worker, request: int, now: float) -> bool:
        worker.queue.append(request)
        if worker.job:
            return False
        worker.device.advance(now)
        self._next_job(worker)
        return True

    def _next_job(self, worker: Worker) -> None:
        """As many waiting prompts as one step takes; a longer one is alone, in several steps."""
        queue, prompts = worker.queue, self._prompt
        requests = [queue.popleft()]
        tokens = prompts[requests[0]]
        limit = self._steps.chunk_tokens
        while queue and tokens + prompts[queue[0]] <= limit:
            requests.append(queue.popleft())
            tokens += prompts[requests[-1]]
        worker.device.begin_job(worker, requests, tokens, self.calendar.next_order())

    def _device_event(self, now: float, device: Device, version: int) -> None:
        if version != device.version:
            return
        worker, request = device.pop(now)
        dispatcher = self._dispatchers[device.index]
        if request == PREFILL:
            done = worker.job
            device.end_job(worker)
            for one in done:
                self.ttft[one] = now - self._times[one] + self._gateway_s
                dispatcher.first_token(str(one), now)
                if self._output[one] > 1:
                    device.begin_decoding(worker, one, self._output[one] - 1, self.calendar.next_order())
                else:
                    self._finish(one, now)
            if worker.queue:
                self._next_job(worker)
        else:
            device.end_decoding(worker)
            self._finish(request, now)
        self._pump(device, now)
        self._reschedule(device, now)
        if self._unplaced:
            self._place_waiting(now)

    def _reschedule(self, device: Device, now: float) -> None:
        device.version += 1
        at = device.next_at()
        if at is not None:
            self.calendar.add(max(at, now), DEVICE, device, device.version)

    # --- ends

    def _finish(self, request: int, now: float) -> None:
        worker = self._worker[request]
        assert worker is not None
        prompt, output = self._prompt[request], self._output[request]
        self._dispatchers[worker.device.index].ended(str(request), now, prompt_tokens=prompt, output_tokens=output)
        self.fleet.give(worker, self._kv[request], now)
        self._release(request, now)
        assert self.status[request] == OPEN
        self.status[request] = FINISHED
        self.e2e[request] = now - self._times[request] + self._gateway_s
        self._num_open -= 1
        self.router.ended(prompt, output)

    def _refuse(self, request: int, reason: str) -> None:
        assert self.status[request] == OPEN
        self.status[request] = REFUSED
        self.rungs[request] = HOT
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        self._num_open -= 1

    def _release(self, request: int, now: float) -> None:
        """It leaves its worker, for whatever reason."""
        worker = self._worker[request]
        assert worker is not None
        self._worker[request] = None
        worker.open -= 1
        function = self._function[request]
        left = worker.users.pop(function) - 1
        if left:
            worker.users[function] = left
        if not worker.open:
            self.fleet.went_idle(worker, now)

    # --- workers

    def _ready(self, now: float, worker: Worker, _: int) -> None:
        worker.serving = True
        self._dispatchers[worker.device.index].open(str(worker.domain), now)
        if worker.open:
            self._pump(worker.device, now)
        else:
            self.fleet.went_idle(worker, now)

    def _gone(self, worker: Worker) -> None:
        self._dispatchers[worker.device.index].close(str(worker.domain))

    def _idle(self, now: float, worker: Worker, _: int) -> None:
        if self.fleet.look_at_idle(worker, now):
            self._freed(worker.device, now)

    def _freed(self, device: Device, now: float) -> None:
        self._unblock(device, now)
        if self._unplaced:
            self._place_waiting(now)

    def _wake(self, now: float, domain: int, _: int) -> None:
        """The keep-alive policy expects a request soon: its worker is started before it."""
        if not self.fleet.workers[domain] and domain not in self._unplaced and now < self.trace.duration_s:
            self.planner.start_ahead(domain, now)

    def _place_waiting(self, now: float) -> None:
        """Requests without a device try again, the domain that waits longest first."""
        while self._unplaced:
            domain, requests = next(iter(self._unplaced.items()))
            while requests and now - self._times[requests[0]] > self.config.patience_s:
                self._refuse(requests.popleft(), "no room within its patience")
            if not requests:
                del self._unplaced[domain]
                continue
            worker = self.router.route(domain, self._prompt[requests[0]], self._kv[requests[0]], now)
            if worker is None:
                return
            del self._unplaced[domain]
            for request in requests:
                self._offer(worker, request, now)

    def _plan(self, now: float, _: object, __: int) -> None:
        """At coarse intervals: what to load ahead, how many devices to keep, and who has waited too long."""
        if now < self.trace.duration_s and self.system.life == "elastic":
            self.planner.plan(now)
        if now < self.trace.duration_s or self._num_open:
            self.calendar.add(now + self.config.plan_every_s, PLAN, None)
        for device in self.fleet.devices:
            for queue in device.queues:
                while queue and now - self._times[queue[0]] > self.config.patience_s:
                    request = queue.popleft()
                    self._dispatchers[device.index].cancelled(str(request), now)
                    self._release(request, now)
                    self._refuse(request, "no memory within its patience")
            self._freed(device, now)

    # --- invariants

    def check(self) -> None:
        for device in self.fleet.devices:
            held = sum(w.bytes + (w.inner if w.budget is None else 0) for w in device.workers.values())
            assert device.used == held + (self.fleet.open_bytes if device.is_open else 0)
            active = [w for w in device.workers.values() if w.job or w.decoding]
            assert device.num_active == len(active)
            assert device.num_rows == sum(w.decoding for w in active)
            wanted = sum(w.step_s if w.job else self._steps.decode_s for w in active)
            assert math.isclose(device.base_s, wanted, rel_tol=1e-9, abs_tol=1e-9)
            assert len(device.events) == device.num_rows + sum(1 for w in active if w.job)
            for worker in device.workers.values():
                assert worker.open == sum(worker.users.values())
                assert worker.inner >= 0 and not worker.is_gone


def _kind_of(refusal: Refusal) -> str:
    return "too busy for its deadline" if refusal.status == 503 else "its queue is full"
