"""Workers that take what a dispatcher sends them, step by step, on devices that their workers share."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from serverlesslora.scheduler.asks import Ask, Refusal, Send
from serverlesslora.scheduler.dispatcher import Dispatcher

PREFILL_TOKEN_S, STEP_S, ROW_S = 0.0005, 0.02, 0.002  # of a step: prompt tokens, any at all, each sequence


@dataclass
class Run:
    """One request in a worker."""

    ask: Ask
    output_tokens: int
    num_output: int = 0


@dataclass
class Worker:
    device: str
    joining: list[Run] = field(default_factory=list)  # sent, for the next step
    stepping: list[Run] = field(default_factory=list)  # in the current step
    is_busy: bool = False


@dataclass
class Outcome:
    ttft_s: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    most_in_worker: int = 0

    def served(self, prefix: str = "") -> list[float]:
        return sorted(ttft for name, ttft in self.ttft_s.items() if name.startswith(prefix))

    def goodput(self, slo_s: float) -> int:
        return sum(ttft <= slo_s for ttft in self.ttft_s.values())


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def arrivals(
    rng: random.Random,
    name: str,
    *,
    rate: float,
    seconds: float,
    slo_s: float,
    domain: str = "d",
    device: str = "gpu0",
    tenant: str | None = None,
    prompt_tokens: int = 60,
) -> list[Ask]:
    """Poisson; prompts of about the given length."""
    now, asks = 0.0, list[Ask]()
    while (now := now + rng.expovariate(rate)) < seconds:
        tokens = rng.randint(prompt_tokens // 2, prompt_tokens * 3 // 2)
        asks.append(Ask(f"{name}{len(asks)}", name, tenant or name, domain, device, tokens, 256, now, now + slo_s))
    return asks


def simulate(
    dispatcher: Dispatcher,
    asks: Sequence[Ask],
    rng: random.Random,
    *,
    mean_output: float = 30,
    check_each: int = 97,
) -> Outcome:
    """Until everybody was answered or refused."""
    outcome, numbers = Outcome(), count()
    events: list[tuple[float, int, Ask | Worker | None]] = [(ask.arrived_at, next(numbers), ask) for ask in asks]
    heapq.heapify(events)
    workers = {ask.domain: Worker(ask.device) for ask in asks}
    runs = {ask.request_id: Run(ask, 1 + int(rng.expovariate(1 / mean_output))) for ask in asks}
    for domain in workers:
        dispatcher.open(domain, 0.0)
    num_events = 0
    while events:
        now, _, event = heapq.heappop(events)
        num_events += 1
        if isinstance(event, Ask):
            refusal = dispatcher.offer(event, now)
            if refusal is not None:
                outcome.refused[event.request_id] = refusal
        elif isinstance(event, Worker):
            _finish_step(event, dispatcher, outcome, now)
        touched = {id(event): event} if isinstance(event, Worker) else {}
        for todo in dispatcher.next(now):
            if isinstance(todo, Send):
                run = runs[todo.request_id]
                worker = workers[run.ask.domain]
                worker.joining.append(run)
                touched[id(worker)] = worker
                outcome.most_in_worker = max(outcome.most_in_worker, len(worker.joining) + len(worker.stepping))
            else:
                outcome.refused[todo.request_id] = todo
        for worker in touched.values():
            if not worker.is_busy and (worker.joining or worker.stepping):
                heapq.heappush(events, (now + _start_step(worker, workers.values()), next(numbers), worker))
        if num_events % check_each == 0:
            dispatcher.check()
        wait_s = dispatcher.wait_s(now)
        if wait_s is not None and (not events or now + wait_s < events[0][0]):
            heapq.heappush(events, (now + wait_s, next(numbers), None))
    dispatcher.check()
    assert dispatcher.num_waiting == dispatcher.num_running == 0
    assert outcome.ttft_s.keys() | outcome.refused.keys() == runs.keys()
    assert not outcome.ttft_s.keys() & outcome.refused.keys()
    return outcome


def _start_step(worker: Worker, workers: Iterable[Worker]) -> float:
    tokens = sum(run.ask.prompt_tokens for run in worker.joining)
    worker.stepping += worker.joining
    worker.joining = []
    worker.is_busy = True
    num_busy = sum(w.is_busy and w.device == worker.device for w in workers)
    return num_busy * (STEP_S + ROW_S * len(worker.stepping) + PREFILL_TOKEN_S * tokens)


def _finish_step(worker: Worker, dispatcher: Dispatcher, outcome: Outcome, now: float) -> None:
    worker.is_busy = False
    for run in list(worker.stepping):
        run.num_output += 1
        request_id = run.ask.request_id
        if run.num_output == 1:
            dispatcher.first_token(request_id, now)
            outcome.ttft_s[request_id] = now - run.ask.arrived_at
        if run.num_output == run.output_tokens:
            worker.stepping.remove(run)
            dispatcher.ended(request_id, now, prompt_tokens=run.ask.prompt_tokens, output_tokens=run.output_tokens)
