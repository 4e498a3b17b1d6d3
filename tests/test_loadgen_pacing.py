"""When requests leave, on a clock that is moved by hand, and the alarm that wakes the real one."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen.client.alarm import Alarm
from serverlesslora_loadgen.client.pacing import BURST, ClosedLoop, OpenLoop, Pacer


class Time:
    """Jumps to whatever it is to wake somebody for, `late_s` too late."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.late_s = late_s
        self.alarm: float | None = None

    def now(self) -> float:
        return self.now_s

    def wake_at(self, at: float) -> None:
        self.alarm = at

    def run(self, pacer: Pacer, *, between: Callable[[], None] = lambda: None) -> None:
        pacer.start()
        while self.alarm is not None:
            self.now_s, self.alarm = max(self.now_s, self.alarm + self.late_s), None
            pacer.wake()
            between()


times = st.lists(st.floats(0, 100), max_size=80).map(sorted)


@given(times, st.floats(0, 50))
def test_every_request_leaves_once_and_never_early(at: list[float], late_s: float) -> None:
    clock, sent = Time(late_s), []
    pacer = OpenLoop(at, lambda i, due: sent.append((i, due, clock.now())), now=clock.now, wake_at=clock.wake_at)
    clock.run(pacer)
    assert [(index, due) for index, due, _ in sent] == list(enumerate(at))
    assert all(due <= now for _, due, now in sent)


@given(times)
def test_a_slow_send_delays_nobody_for_longer_than_itself(at: list[float]) -> None:
    """A wait after each send would add up; absolute times are caught up with."""
    clock, left = Time(), []

    def send(index: int, due: float) -> None:
        left.append(clock.now_s)
        clock.now_s += 0.5

    clock.run(OpenLoop(at, send, now=clock.now, wake_at=clock.wake_at))
    free = 0.0
    for due, now in zip(at, left, strict=True):
        assert now == pytest.approx(max(due, free))
        free = now + 0.5


def test_a_crowd_leaves_in_parts_so_that_answers_are_heard_in_between() -> None:
    clock, sent, rounds = Time(), list[int](), list[int]()
    pacer = OpenLoop([1.0] * 100, lambda i, _: sent.append(i), now=clock.now, wake_at=clock.wake_at)
    clock.run(pacer, between=lambda: rounds.append(len(sent)))
    assert sent == list(range(100)) and clock.now_s == 1.0
    assert max(b - a for a, b in zip([0, *rounds], rounds, strict=False)) == BURST


def test_stopping_names_those_that_do_not_leave() -> None:
    clock, sent = Time(), list[int]()
    pacer = OpenLoop([1.0, 2.0, 3.0], lambda i, _: sent.append(i), now=clock.now, wake_at=clock.wake_at)
    pacer.start()
    clock.now_s = 1.5
    pacer.wake()
    assert pacer.stop() == range(1, 3) and sent == [0]
    clock.now_s = 9.0
    pacer.wake()
    assert sent == [0] and pacer.stop() == range(0)


@given(
    count=st.integers(0, 60), concurrency=st.integers(1, 40), order=st.lists(st.integers(0, 100), max_size=60),
)  # fmt: skip
def test_as_many_as_asked_for_are_under_way(count: int, concurrency: int, order: list[int]) -> None:
    clock, under_way, sent = Time(), list[int](), list[int]()

    def send(index: int, due: float) -> None:
        assert due == clock.now_s
        sent.append(index)
        under_way.append(index)

    pacer = ClosedLoop(
        count, send, concurrency=concurrency, start_at=3.0, now=clock.now, wake_at=clock.wake_at
    )  # fmt: skip
    clock.run(pacer)
    assert clock.now_s == 3.0
    picks = iter(order)
    while under_way:
        assert len(under_way) == min(concurrency, count - (len(sent) - len(under_way)))
        clock.now_s += 1.0
        under_way.pop(next(picks, 0) % len(under_way))
        pacer.done()
    assert sent == list(range(count))


def test_a_closed_loop_that_was_stopped_sends_no_more() -> None:
    clock, sent = Time(), list[int]()
    pacer = ClosedLoop(
        9, lambda i, _: sent.append(i), concurrency=2, start_at=0.0, now=clock.now, wake_at=clock.wake_at
    )
    clock.run(pacer)
    assert pacer.stop() == range(2, 9)
    pacer.done()
    assert sent == [0, 1]


@pytest.mark.parametrize("kind", ["file", "loop"])
@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_the_alarm_never_rings_early(kind: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    if kind == "file" and sys.platform != "linux":
        pytest.skip("timers that are files are Linux's")

    async def ring() -> list[tuple[float, float]]:
        rang, heard = list[float](), asyncio.Event()

        def hear() -> None:
            rang.append(time.monotonic())
            heard.set()

        alarm = Alarm(hear)
        if kind == "loop":
            alarm.close()  # as where there is no such file
        asked = []
        for wait_s in (0.0021, 0.0107, -1.0):
            heard.clear()
            at = time.monotonic() + wait_s
            alarm.set(time.monotonic() + 100)  # the later call counts
            alarm.set(at)
            asked.append(at)
            await asyncio.wait_for(heard.wait(), 10)
        alarm.close()
        return list(zip(asked, rang, strict=True))

    with asyncio.Runner(loop_factory=new_loop) as runner:
        for at, rang_at in runner.run(ring()):
            assert rang_at >= at
