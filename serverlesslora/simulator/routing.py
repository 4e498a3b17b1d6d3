"""Which worker gets a request, and on which device a new worker starts.

The worker that promises the earliest first token gets it. Where that promise would take more than half of the SLO, a
further one is started, if a device is not full yet: T_eff = M·T(b) of ServerlessLoRA, section 4.2, says when it is.
The live server has one device per backbone and needs none of this.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from serverlesslora.simulator.device import Device, Worker
from serverlesslora.simulator.fleet import Fleet

RESERVED_SEQUENCES = 8  # that a new worker should find room for


class Spot(NamedTuple):
    device: Device
    is_full: bool  # a worker fits, to the detriment of all


def most_bytes(worker: Worker, fleet: Fleet) -> int:
    """Of KV that it could ever have for one request. What is elastic moves elsewhere; always-on processes never do."""
    if worker.budget is not None:
        return worker.budget - fleet.adapter_bytes
    if fleet.system.life == "always":
        others = worker.device.workers.values()
        return worker.device.capacity - sum(other.bytes + fleet.adapter_bytes for other in others)
    return worker.device.capacity


class Router:
    def __init__(self, fleet: Fleet, *, slots: int) -> None:
        self._fleet = fleet
        self._slots = slots
        self._steps = fleet.steps
        self._slo_s = fleet.config.functions.slo_ttft_s
        # Sums over the requests that ended, with a first guess that is soon outweighed.
        self._prompt_tokens, self._output_tokens, self._num_ended = 5000.0, 1000.0, 5.0

    def ended(self, prompt_tokens: int, output_tokens: int) -> None:
        self._prompt_tokens += prompt_tokens
        self._output_tokens += output_tokens
        self._num_ended += 1

    @property
    def crowd(self) -> int:
        """Workers that may compute at once on a device: M·T must leave half of the time to the first token, and M
        turns must fit into the time of every further one."""
        functions, steps = self._fleet.config.functions, self._steps
        prompt_s = steps.prefill_s + self._prompt_tokens / self._num_ended * steps.prefill_token_s
        return max(1, int(min(0.5 * functions.slo_ttft_s / prompt_s, functions.slo_tpot_s / steps.decode_s)))

    def route(self, domain: int, prompt_tokens: int, kv_bytes: int, now: float) -> Worker | None:
        """None: there is no room for its worker now."""
        fleet = self._fleet
        best: Worker | None = None
        best_s = math.inf
        crowd = self.crowd
        for worker in fleet.workers[domain]:
            if kv_bytes > most_bytes(worker, fleet):
                continue
            wait_s = self._promise_s(worker, prompt_tokens, crowd, now)
            if wait_s < best_s:
                best, best_s = worker, wait_s
        if fleet.system.life == "always" or best_s <= 0.5 * self._slo_s:
            return best
        more_bytes = fleet.adapter_bytes + kv_bytes
        tokens = (self._prompt_tokens + self._output_tokens) / self._num_ended
        reserve_bytes = int(RESERVED_SEQUENCES * tokens * fleet.backbone.kv_bytes_per_token)
        spot = self.place(domain, more_bytes, reserve_bytes)
        if spot is None:
            return best
        if best is not None:
            # A second worker of a domain reads the backbone once more per round: only where nobody minds, and for a
            # clear gain once it serves. Where its start takes longer than this request waits, it is for those to come.
            served_s = spot.device.round_s + prompt_tokens * self._steps.prefill_token_s
            if spot.is_full or 2 * served_s > best_s:
                return best
            if fleet.starts.ready_at(domain, spot.device, now) - now + served_s > best_s:
                fleet.start(domain, spot.device, now, more_bytes)
                return best
            if not best.open and best.serving:
                fleet.retire(best, now)  # it moves
        return fleet.start(domain, spot.device, now, more_bytes)

    def _promise_s(self, worker: Worker, prompt_tokens: int, crowd: int, now: float) -> float:
        """Seconds until its first token, of what is known now: T_eff with what waits before it and what slots allow."""
        device, steps = worker.device, self._steps
        seconds = max(0.0, worker.ready_at - now)
        waiting = (worker.open - worker.decoding) * self._prompt_tokens / self._num_ended
        over = worker.open + 1 - self._slots
        if over > 0:
            answer_s = self._output_tokens / self._num_ended * max(device.round_s, steps.decode_s)
            seconds += over / self._slots * answer_s
        if device.closing or (not worker.open and device.num_active >= crowd):
            seconds += self._slo_s  # only if there is no other: so domains leave what is to be given back, or is full
        turns = 1.0 + waiting / steps.chunk_tokens
        return seconds + turns * device.round_s + (waiting + prompt_tokens) * steps.prefill_token_s

    def place(self, domain: int, more_bytes: int, reserve_bytes: int = 0) -> Spot | None:
        """The device for a new worker; where it does not fit even without all that is idle, there is none.

        Devices that hold the backbone come first, until the least crowded of them is full; a further one costs another
        copy. Without sharing the least crowded wins, of those whose host has the domain's waiting container, if any
        does: room may have to be made there, which costs less than libraries. A device is full when one more busy
        worker would be too many, or when less than `reserve_bytes` would be left for the worker to grow.
        """
        fleet, crowd = self._fleet, self.crowd
        taken = {worker.device.index for worker in fleet.workers[domain]}
        best: Device | None = None
        best_key: tuple[int, ...] = ()
        for device in fleet.devices:
            if device.index in taken:
                continue
            room = device.free - fleet.worker_bytes(device) - more_bytes
            is_short = room < 0
            if room < reserve_bytes:
                room += fleet.idle_bytes(device)
                if room < 0:
                    continue
            is_full = device.num_active >= crowd or room < reserve_bytes
            rank = 2 if is_full else 0 if not fleet.sharing or (device.is_open and not device.closing) else 1
            is_elsewhere = fleet.system.start == "container" and domain not in device.host.containers
            key = (rank, is_elsewhere, is_short, device.num_active, len(device.workers), device.index)
            if best is None or key < best_key:
                best, best_key = device, key
        return None if best is None else Spot(best, best_key[0] == 2)
