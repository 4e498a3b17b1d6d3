"""What the dispatcher knows of a domain and of the device it shares with others, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from serverlesslora.scheduler.admission import Learned, Pace, wait_for_slots
from serverlesslora.scheduler.asks import Ask
from serverlesslora.scheduler.batching import Batching
from serverlesslora.scheduler.domain_queue import Batch, DomainQueue, Entry

GUESS_OUTPUT_TOKENS = 256  # of an answer, before any has ended


@dataclass(slots=True, eq=False)
class Device:
    name: str
    num_busy: int = 0  # domains with something in their worker
    num_prefilling: int = 0  # domains that wait for a first token
    touched: dict[str, Domain] = field(default_factory=dict)  # next() looks at them
    filling: dict[str, Domain] = field(default_factory=dict)  # held back until the device has time


@dataclass(slots=True, eq=False)
class Domain:
    name: str
    device: Device
    learned: Learned
    pace: Pace
    queue: DomainQueue
    running: int = 0  # requests
    prefilling: int = 0  # of them without a first token
    prefill_tokens: int = 0
    filling_since: float | None = None
    wake_at: float | None = None  # of its one valid timer
    batch: Batch | None = None  # what this call of next() sends it

    # --- queries

    @property
    def num_batches(self) -> int:
        """M on its device, counting itself."""
        return self.device.num_busy + (self.running == 0)

    def slots_s(self, num: int) -> float:
        """Seconds until `num` more slots have become free, when none is."""
        # Before anything has ended: an answer takes as long as its first token at least.
        answer_s = self.pace.seconds if self.pace.num_observed else self.num_batches * self.learned.latency.base_s
        return wait_for_slots(num, answer_s=answer_s, slots=self.queue.slots)

    def ttft_s(self, entry: Entry, cold_s: float) -> float:
        """Predicted seconds from now to the first token of an ask that waits or would."""
        queue, tokens = self.queue, entry.ask.prompt_tokens
        num_before = queue.num_before(entry.owner, entry.key)
        slots_each = queue.num_waiting_slots / queue.num_waiting if queue.num_waiting else 1
        missing = math.ceil(num_before * slots_each) + entry.need - (queue.slots - queue.num_running)
        if missing <= 0:  # it is computed together with those before it
            tokens += self.prefill_tokens + num_before * tokens
        return cold_s + self.slots_s(missing) + self.num_batches * self.learned.latency.predict(tokens)

    def margin_s(self, batching: Batching, entry: Entry, now: float, num_batches: int) -> float:
        ask, model = entry.ask, self.learned.latency
        slo_s, waited_s = entry.deadline - ask.arrived_at, now - ask.arrived_at
        return batching.margin(model, slo_s, waited_s, ask.prompt_tokens, num_batches=num_batches)

    def fill_until(self, batching: Batching, entry: Entry, now: float) -> float:
        """Until when to hold this ask back; now: not at all. A worker that runs something takes it in at once
        (continuous batching), and while nothing else is computed on the device waiting would gain nothing."""
        if self.running or not self.device.num_prefilling:
            return now
        ask, model, num_batches, slots = entry.ask, self.learned.latency, self.num_batches, self.queue.slots
        slo_s = entry.deadline - ask.arrived_at
        full = batching.largest_batch(model, slo_s, ask.prompt_tokens, num_batches=num_batches, slots=slots)
        if self.queue.num_waiting_slots >= full:
            return now
        window_s = batching.fill_window(model, slo_s, ask.prompt_tokens, num_batches=num_batches, slots=slots)
        since = entry.queued_at if self.filling_since is None else self.filling_since
        return min(since + window_s, now + self.margin_s(batching, entry, now, num_batches))

    def explain(self, batching: Batching, now: float) -> str:
        queue, num_batches = self.queue, self.num_batches
        waiting = sorted(queue.waiting_by_tenant().items(), key=lambda item: -item[1])
        tenants = ", ".join(f"{owner} {num}" for owner, num in waiting[:3]) + (", ..." if len(waiting) > 3 else "")
        line = f"{queue.num_running} of {queue.slots} slots taken, {queue.num_waiting} waiting"
        line += f" ({tenants})" if tenants else ""
        line += f", an answer takes {self.pace.seconds:.2f} s" if self.pace.num_observed else ""
        entry, held_until = queue.next_up(now)
        if entry is not None:
            prefill_s = self.learned.latency.predict(entry.ask.prompt_tokens)
            margin_s = self.margin_s(batching, entry, now, num_batches)
            line += f"; next is {entry.ask.request_id} of {entry.owner}, margin {margin_s:.2f} s"
            line += f" = {entry.deadline - now:.2f} s left - {num_batches} x {prefill_s:.2f} s"
        elif held_until is not None:
            line += "; the free slots are kept for other tenants"
        if self.name in self.device.filling and self.wake_at is not None:
            line += f"; its batch may fill for {max(0.0, self.wake_at - now):.3f} s more"
        return line

    # --- what happens to it

    def send(self, entry: Entry, now: float) -> None:
        expected = self.pace.output_tokens if self.pace.num_observed else GUESS_OUTPUT_TOKENS
        self.queue.take(entry, min(entry.ask.max_tokens, expected))
        entry.is_waiting, entry.sent_at = False, now
        self.device.num_busy += not self.running
        self.device.num_prefilling += not self.prefilling
        self.running += 1
        self.prefilling += 1
        self.prefill_tokens += entry.ask.prompt_tokens
        if self.batch is None:
            self.batch = Batch()
        entry.batch = self.batch
        entry.batch.tokens = self.prefill_tokens

    def prefilled(self, ask: Ask) -> None:
        """It has its first token, or will have none."""
        self.prefilling -= 1
        self.prefill_tokens -= ask.prompt_tokens
        self.device.num_prefilling -= not self.prefilling

    def end(self, entry: Entry, now: float, prompt_tokens: int, output_tokens: int) -> None:
        if entry.has_token and output_tokens > 0:  # failures say nothing about the pace
            for pace in (self.pace, self.learned.pace):
                pace.observe(max(0.0, now - entry.sent_at), output_tokens)
        self.running -= 1
        self.device.num_busy -= not self.running
        self.queue.release(entry, now, prompt_tokens, output_tokens)

    def leave_device(self) -> None:
        self.device.touched.pop(self.name, None)
        self.device.filling.pop(self.name, None)
        self.filling_since = self.wake_at = None
