"""The device lease: one turn at a time, in the order of asking, whoever is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from serverlesslora.worker import lease as module
from serverlesslora.worker.lease import DeviceLease, create_lease_fd
from tests.server import wait_until


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_lease_fd()
    yield made
    os.close(made)


class Taker:
    """Somebody with a lease of its own: asks for turns in a thread and ends each when told to."""

    def __init__(self, fd: int, name: str, log: list[str]) -> None:
        self.lease = DeviceLease(fd)
        self.waited_s = 0.0
        self._name, self._log = name, log
        self._may_end = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def ask(self, turns: int = 1) -> None:
        """Returns when it holds the device or stands in the queue."""
        before = self.lease._num_drawn
        self._thread = threading.Thread(target=self._take, args=(turns,), daemon=True)
        self._thread.start()
        wait_until(lambda: self.lease._num_drawn > before)

    def _take(self, turns: int) -> None:
        for _ in range(turns):
            with self.lease.turn() as self.waited_s:
                self._log.append(self._name)
                self._may_end.acquire()

    def end(self, turns: int = 1) -> None:
        for _ in range(turns):
            self._may_end.release()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.lease.close()


class Process:
    """The same in a process that can be killed."""

    CODE = (
        "import sys\n"
        "from serverlesslora.worker.lease import DeviceLease\n"
        "with DeviceLease({fd}).turn():\n"
        "    print('holding', flush=True)\n"
        "    sys.stdin.read()\n"
    )

    def __init__(self, fd: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE.format(fd=fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[fd],
            text=True,
        )

    def wait_holding(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "holding\n"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        with self._process:
            self._process.wait(10)


def test_turns_come_in_the_order_of_asking(fd: int) -> None:
    log: list[str] = []
    takers = {name: Taker(fd, name, log) for name in "abcd"}
    takers["a"].ask(turns=2)
    wait_until(lambda: log == ["a"])
    for name in "bcd":
        takers[name].ask()
    # Each behind one other, so that the end of a turn wakes one and not all of them.
    for ticket in range(3):
        wait_until(lambda ticket=ticket: is_waited_for(fd, byte=module._FIRST_TICKET + ticket))  # type: ignore[misc]
    assert not is_waited_for(fd, byte=module._DEVICE)
    takers["a"].end(2)  # it asks again at once, before anybody has woken up
    for count, name in enumerate("bcd", 2):
        wait_until(lambda count=count: len(log) >= count)  # type: ignore[misc]
        takers[name].end()
    for taker in takers.values():
        taker.join()
    assert log == ["a", "b", "c", "d", "a"]
    assert all(taker.waited_s > 0 for taker in takers.values())


def test_turns_exclude_each_other_and_nobody_is_overtaken(fd: int) -> None:
    """Everybody as fast as they can."""
    inside = 0
    tickets: list[int] = []
    start = threading.Barrier(4)

    def work() -> None:
        nonlocal inside
        lease = DeviceLease(fd)
        start.wait()
        for _ in range(200):
            with lease.turn():
                inside += 1
                assert inside == 1
                tickets.append(lease._ticket)
                inside -= 1
        lease.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert tickets == list(range(4 * 200))


def test_a_turn_ends_with_an_error_too(fd: int) -> None:
    lease, other = DeviceLease(fd), DeviceLease(fd)
    with pytest.raises(ZeroDivisionError), lease.turn():
        _ = 1 / 0
    with other.turn(), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    with lease.turn():
        pass
    lease.close()
    other.close()


def test_a_killed_holder_frees_it(fd: int) -> None:
    holder = Process(fd)
    holder.wait_holding()
    log: list[str] = []
    taker = Taker(fd, "next", log)
    taker.ask()
    assert not log
    holder.kill()
    wait_until(lambda: log == ["next"])
    taker.end()
    taker.join()


def test_a_killed_waiter_lets_those_behind_move_up_but_not_past_the_holder(fd: int) -> None:
    log: list[str] = []
    holder, behind, last = (Taker(fd, name, log) for name in ("holder", "behind", "last"))
    holder.ask()
    wait_until(lambda: log == ["holder"])
    killed = Process(fd)
    wait_until(lambda: holder.lease._num_drawn == 2)
    behind.ask()
    last.ask()
    killed.kill()
    # Whoever stood behind the killed one now waits for the device itself.
    wait_until(lambda: is_waited_for(fd, byte=module._DEVICE))
    assert log == ["holder"]
    holder.end()
    wait_until(lambda: log == ["holder", "behind"])
    behind.end()
    wait_until(lambda: log == ["holder", "behind", "last"])
    last.end()
    for taker in (holder, behind, last):
        taker.join()


def is_waited_for(fd: int, *, byte: int) -> bool:
    """As the kernel lists it: a line with an arrow is somebody blocked, the last columns are the range."""
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/locks") as locks:
        rows = [line.split() for line in locks]
    return any("->" in row and row[-3].endswith(f":{inode}") and row[-2:] == [str(byte)] * 2 for row in rows)


def test_who_dies_while_drawing_a_ticket_loses_only_that(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    dying, taker = DeviceLease(fd), Taker(fd, "taker", log)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_NUM_DRAWN", None)  # after its ticket is locked, before anybody can know
        with pytest.raises(AttributeError):
            dying._draw()
    dying.close()
    taker.ask()
    wait_until(lambda: log == ["taker"])
    taker.end()
    taker.join()


def test_contention_is_seen_by_who_holds_the_device(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    lease, other = DeviceLease(fd), Taker(fd, "other", log)
    for _ in range(2):
        with lease.turn() as waited_s:
            assert waited_s < 5
            assert not lease.is_contended()
    with lease.turn():
        other.ask()
        assert lease.is_contended(), "somebody waits"
    wait_until(lambda: log == ["other"])
    other.end()
    other.join()
    monkeypatch.setattr(module, "RECENT_S", float("inf"))
    with lease.turn():
        assert lease.is_contended(), "the other has had a turn in between and may be back"
    with lease.turn():
        assert not lease.is_contended(), "it was not"
    monkeypatch.setattr(module, "RECENT_S", 0.0)
    again = DeviceLease(fd)
    with again.turn():
        pass
    with lease.turn():
        assert not lease.is_contended(), "that was long ago"
    again.close()
    lease.close()


def test_a_device_of_ones_own_needs_no_lock() -> None:
    lease = DeviceLease(None)
    with lease.turn() as waited_s:
        assert waited_s == 0.0
        assert not lease.is_contended()
    lease.close()


def test_nobody_who_has_it_can_cut_it_short(fd: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
