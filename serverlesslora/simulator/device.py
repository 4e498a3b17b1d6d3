"""A device as a token clock: its workers take turns, and a round of turns gives every running sequence one token.

With D workers decoding and B sequences running in all, a round takes decode_s·D + decode_row_s·B: isolated workers
each read the whole backbone. A worker that computes prompts spends its turn on a chunk of them, its decoding sequences
riding along. The clock counts rounds, as processor sharing in queueing theory: a sequence that joins at V with n tokens
to come ends at V+n, whatever happens to the speed of rounds meanwhile, so one heap holds the future of a device and
every change costs its logarithm. With M equal workers this comes to T_eff = M·T(b) of ServerlessLoRA, section 4.2.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from serverlesslora.scheduler.profile import StepProfile

PREFILL = -1  # in place of a request in an entry of the heap


class Host:
    """Main memory of some devices. Adapters that were on a device stay here, least recently used first to go."""

    __slots__ = ("adapters", "capacity", "checkpoint_at", "containers", "held", "index", "since", "used")

    def __init__(self, index: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        self.used = 0
        self.held = 0.0  # byte-seconds
        self.since = 0.0
        self.checkpoint_at: float | None = None  # when the base checkpoint is in memory; None: only on disk
        self.adapters: dict[int, int] = {}  # function -> bytes; oldest use first
        self.containers: set[int] = set()  # functions whose libraries and model wait in an idle container

    def hold(self, num_bytes: int, now: float) -> None:
        self.held += self.used * (now - self.since)
        self.since = now
        self.used += num_bytes


class Worker:
    """One process of one domain on one device."""

    __slots__ = (
        "adapters",
        "blocked",
        "budget",
        "bytes",
        "decoding",
        "device",
        "domain",
        "idle_since",
        "inner",
        "is_armed",
        "is_extra",
        "is_gone",
        "job",
        "open",
        "queue",
        "queued_tokens",
        "ready_at",
        "serving",
        "step_s",
        "users",
        "waits",
    )

    def __init__(self, domain: int, device: Device, num_bytes: int, now: float, ready_at: float) -> None:
        self.domain = domain
        self.device = device
        self.bytes = num_bytes  # process and, where it is private, the backbone; with a budget, all it will ever have
        self.budget: int | None = None  # for adapters and KV, held from the beginning; None: taken from the device
        self.inner = 0  # bytes of adapters and KV
        self.blocked = device.blocked  # sent requests that wait for memory; its own where the memory is
        self.ready_at = ready_at
        self.serving = False
        self.is_gone = False
        self.is_extra = False  # the domain had one already when this was started
        self.waits = "worker"  # the rung that requests meet while it starts
        self.adapters: dict[int, float] = {}  # function -> when it is loaded; oldest use first
        self.users: dict[int, int] = {}  # function -> its requests here that have not ended
        self.queue: deque[int] = deque()  # requests with memory and adapter, whose prompt is to be computed
        self.queued_tokens = 0
        self.job: list[int] = []  # whose prompts are being computed
        self.step_s = 0.0  # of one turn of the job
        self.decoding = 0
        self.open = 0  # requests routed here that have not ended
        self.idle_since = now
        self.is_armed = False  # a look at its idleness is in the calendar


class Device:
    __slots__ = (
        "active_s",
        "asked_at",
        "backbone_at",
        "base_s",
        "blocked",
        "busy_s",
        "can_give",
        "capacity",
        "closing",
        "events",
        "held",
        "host",
        "index",
        "is_open",
        "launcher_at",
        "memory_since",
        "num_active",
        "num_rows",
        "occupied_s",
        "peak",
        "queues",
        "rounds",
        "since",
        "spares",
        "steps",
        "used",
        "version",
        "workers",
    )

    def __init__(self, index: int, capacity: int, host: Host, steps: StepProfile) -> None:
        self.index = index
        self.capacity = capacity
        self.host = host
        self.steps = steps
        # the clock
        self.rounds = 0.0
        self.since = 0.0
        self.base_s = 0.0  # of a round, without rows
        self.num_rows = 0  # sequences that decode
        self.num_active = 0  # workers with something to compute: M
        self.busy_s = 0.0
        self.active_s = 0.0  # worker-seconds: the integral of M
        self.events: list[tuple[float, int, Worker, int]] = []  # (rounds, tie-breaker, worker, request or PREFILL)
        self.version = 0  # of the one entry in the calendar that counts
        # memory
        self.used = 0
        self.peak = 0
        self.held = 0.0  # byte-seconds
        self.occupied_s = 0.0  # with anything in its memory
        self.memory_since = 0.0
        self.workers: dict[int, Worker] = {}  # domain -> its worker here
        self.is_open = False  # holds the shared backbone, or begins to; without sharing: has a launcher
        self.closing = False  # gets no new domain; given up when the last worker has gone
        self.backbone_at = math.inf  # when the shared backbone is there
        self.launcher_at = math.inf  # when its launcher can fork
        self.spares: list[float] = []  # when each spare worker is ready
        self.can_give = 0  # bytes it could be relieved of when that was not enough,
        self.asked_at = -math.inf  # and when that was
        self.blocked: deque[int] = deque()  # sent requests that wait for its memory
        self.queues = [self.blocked]  # and those that wait for memory of a worker

    # --- the clock

    @property
    def round_s(self) -> float:
        return self.base_s + self.steps.decode_row_s * self.num_rows

    def advance(self, now: float) -> None:
        if self.num_active:
            passed = now - self.since
            self.rounds += passed / (self.base_s + self.steps.decode_row_s * self.num_rows)
            self.busy_s += passed
            self.active_s += passed * self.num_active
        self.since = now

    def next_at(self) -> float | None:
        """When its first event is due if nothing changes before."""
        if not self.events:
            return None
        return self.since + max(0.0, self.events[0][0] - self.rounds) * self.round_s

    def pop(self, now: float) -> tuple[Worker, int]:
        """The first event; the clock stands exactly at it, free of rounding, and the device has advanced to now."""
        self.advance(now)
        rounds, _, worker, request = heapq.heappop(self.events)
        self.rounds = rounds
        return worker, request

    def begin_job(self, worker: Worker, requests: list[int], num_tokens: int, order: int) -> None:
        """Compute prompts of so many tokens in equal turns of at most a chunk; needs an advanced clock."""
        steps = self.steps
        turns = -(-num_tokens // steps.chunk_tokens)
        if not worker.decoding:
            self.num_active += 1
        else:
            self.base_s -= steps.decode_s  # one pass over the weights serves both
        worker.job = requests
        worker.step_s = (steps.prefill_s + num_tokens * steps.prefill_token_s) / turns
        self.base_s += worker.step_s
        heapq.heappush(self.events, (self.rounds + turns, order, worker, PREFILL))

    def end_job(self, worker: Worker) -> None:
        self.base_s -= worker.step_s
        worker.job = []
        worker.step_s = 0.0
        if worker.decoding:
            self.base_s += self.steps.decode_s
        else:
            self._left()

    def begin_decoding(self, worker: Worker, request: int, num_tokens: int, order: int) -> None:
        if not worker.decoding and not worker.job:
            self.num_active += 1
            self.base_s += self.steps.decode_s
        worker.decoding += 1
        self.num_rows += 1
        heapq.heappush(self.events, (self.rounds + num_tokens, order, worker, request))

    def end_decoding(self, worker: Worker) -> None:
        worker.decoding -= 1
        self.num_rows -= 1
        if not worker.decoding and not worker.job:
            self.base_s -= self.steps.decode_s
            self._left()

    def _left(self) -> None:
        self.num_active -= 1
        if not self.num_active:
            self.base_s = 0.0  # what additions and subtractions of floats left over

    # --- memory

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def hold(self, num_bytes: int, now: float) -> None:
        if self.used:
            self.held += self.used * (now - self.memory_since)
            self.occupied_s += now - self.memory_since
        self.memory_since = now
        self.used += num_bytes
        if self.used > self.peak:
            self.peak = self.used
        assert 0 <= self.used <= self.capacity, f"device {self.index} holds {self.used} of {self.capacity} bytes"
