"""The worker's loop between its engine, its channel and the device: what it says, when, and what it counts."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from serverlesslora.worker import main
from serverlesslora.worker.lease import DeviceLease, create_lease_fd
from serverlesslora.worker.main import CONTENDED_STEP_TOKENS, Worker
from serverlesslora_ipc.channel import Channel
from serverlesslora_ipc.messages import (
    Abort,
    Aborted,
    Delta,
    Failed,
    Finished,
    Fork,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Ready,
    Refused,
    SamplingParams,
    Shutdown,
    Started,
    Stats,
    TokensPrompt,
    WorkerLimits,
    WorkerToGateway,
)
from tests.server import wait_until
from tests.test_engine import Bench


def ask(name: str, *, num_prompt: int = 3, max_tokens: int = 4, token: int = 1, **more: Any) -> Generate:
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    return Generate(name, None, TokensPrompt((token,) * num_prompt), sampling, **more)


class Running:
    """A worker in a thread, told things without a socket; another lease stands for the other domains."""

    def __init__(self, **limits: Any) -> None:
        self._lease_fd = create_lease_fd()
        self.other = DeviceLease(self._lease_fd)
        self.engine = Bench(**limits).engine
        self.engine._clock = time.monotonic
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        self.gateway: Channel[WorkerToGateway] = Channel(ours, WorkerToGateway)
        self.sockets = ours, theirs
        self.lease = DeviceLease(self._lease_fd)
        self.worker = Worker(Channel[GatewayToWorker](theirs, GatewayToWorker), self.engine, self.lease, time.monotonic)
        self.heard: list[WorkerToGateway] = []
        self._thread = threading.Thread(target=self._main_loop, daemon=True)

    @torch.inference_mode()
    def _main_loop(self) -> None:
        self.worker.main_loop()

    def start(self) -> None:
        self._thread.start()

    def tell(self, *messages: GatewayToWorker) -> None:
        self.worker._inbox.put(list(messages))

    def hears(self, kind: type[Any], is_meant: Callable[[Any], bool] = lambda message: True) -> Any:
        """The next of this kind."""
        while True:
            for message in self.heard:
                if isinstance(message, kind) and is_meant(message):
                    self.heard.remove(message)
                    return message
            self.heard += self.gateway.receive().messages

    def wait_queued(self, before: int) -> None:
        """Until it waits for a turn it has asked for since."""
        wait_until(lambda: self.other._num_drawn > before)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.tell(Shutdown())
            self._thread.join(30)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        for sock in self.sockets:
            sock.close()
        self.other.close()
        self.lease.close()
        os.close(self._lease_fd)


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running(max_step_tokens=256, max_running=4, blocks=64)
    yield made
    made.close()


def test_every_request_ends_once_and_together_they_cost_what_the_worker_was_busy(running: Running) -> None:
    running.start()
    running.tell(ask("finished"), ask("long", max_tokens=100), ask("bad", token=1 << 20), ask("late", deadline=0.0))
    running.hears(Delta, lambda delta: delta.request_id == "long")
    running.tell(Abort("long"), Abort("unknown"))
    ends = [running.hears(Finished).spent]
    ends.append(running.hears(Aborted).spent)
    codes = {end.request_id: end for end in (running.hears(Failed), running.hears(Failed))}
    assert codes["bad"].error.status == 400
    assert codes["late"].error.code == "deadline_exceeded"
    stats = running.hears(Stats, lambda stats: stats.running == 0 and stats.steps > 0)
    assert stats.busy_s == pytest.approx(sum(spent.device_s for spent in ends), rel=0.01)
    running.stop()
    assert not any(isinstance(message, Finished | Failed | Aborted) for message in running.heard)


def test_nobody_waits_for_a_turn_to_hear_of_a_refusal(running: Running) -> None:
    running.start()
    with running.other.turn():
        running.tell(ask("bad", token=1 << 20))
        running.hears(Failed)
        running.tell(ask("late", deadline=0.0))
        running.hears(Failed)


def test_who_comes_while_the_turn_is_waited_for_takes_part_in_it(running: Running) -> None:
    steps: list[int | None] = []
    step = running.engine.step

    def counted(max_tokens: int | None = None) -> list[WorkerToGateway]:
        steps.append(max_tokens)
        return step(max_tokens)

    running.engine.step = counted  # type: ignore[method-assign]
    running.start()
    with running.other.turn():
        running.tell(ask("gone"), ask("first", max_tokens=1))
        running.wait_queued(1)
        running.tell(Abort("gone"), ask("second", max_tokens=1))
        running.tell(LoadAdapter("d", "/nowhere"), ask("third", max_tokens=1))
    gone = running.hears(Aborted)
    assert (gone.spent.completion_tokens, gone.spent.device_s) == (0, 0.0)
    started = [running.hears(Started).request_id for _ in range(2)]
    assert started == ["first", "second"]
    running.hears(Finished)
    running.hears(Refused)
    running.hears(Started, lambda started: started.request_id == "third")
    running.stop()
    assert len(steps) == 2, "one for both that were there, one behind the adapter that had to be read"
    assert running.worker._lease_wait_s > 0


def test_a_step_is_short_while_others_want_the_device(running: Running) -> None:
    num_prompt = CONTENDED_STEP_TOKENS + 20
    running.start()
    running.tell(ask("alone", num_prompt=num_prompt, max_tokens=1))
    alone = running.hears(Finished)
    assert alone.device_s > 0
    stats = running.hears(Stats, lambda stats: stats.prefill.n)
    assert (stats.prefill.n, stats.prefill.sum_x) == (1, num_prompt), "in one step"
    with running.other.turn():
        running.tell(ask("beside", num_prompt=num_prompt, max_tokens=1, token=2))
        running.wait_queued(2)
    running.hears(Finished)
    stats = running.hears(Stats, lambda stats: stats.prefill.n >= 2 and stats.running == 0)
    assert stats.prefill.sum_xx == num_prompt**2 + CONTENDED_STEP_TOKENS**2 + 20**2
    assert stats.lease_wait_s > 0


def test_the_life_of_a_worker_begins_with_nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.ask("rehearsal", [1, 2, 3])
    bench.run()

    class Prepared:
        device_name = "cpu"
        libraries_s = load_s = copy_s = 0.0
        is_rehearsed = False
        device = type("Device", (), {"kind": "cpu"})
        weights = None

        def engine_for(self, limits: WorkerLimits) -> Any:
            return bench.engine

    def leaves(self: Worker) -> None:
        self._inbox.put([Shutdown()])

    monkeypatch.setattr(Worker, "read", leaves)
    ours, theirs = socket.socketpair()
    threads = torch.get_num_threads()
    prepared: Any = Prepared()
    assert main.run(theirs, prepared, Fork("w", "d", WorkerLimits(threads=threads, kv_bytes=1))) == 0
    gateway: Channel[WorkerToGateway] = Channel(ours, WorkerToGateway)
    seen = [message for _ in range(2) for message in gateway.receive().messages]
    assert isinstance(seen[0], Ready)
    assert isinstance(seen[1], Stats)
    assert (seen[1].steps, seen[1].busy_s, seen[1].prefill.n) == (0, 0.0, 0)
    ours.close()
    theirs.close()


def test_turns_can_be_switched_off_to_measure_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = create_lease_fd()
    monkeypatch.setenv(main.LEASE_VARIABLE, "off")
    with main.open_lease(fd).turn(), main.open_lease(fd).turn():
        pass
    os.close(fd)
