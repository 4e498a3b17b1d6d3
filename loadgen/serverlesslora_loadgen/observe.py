"""What the server holds while it is under load: memory, workers and device time, looked at now and then.

A server of ours is asked through its admin API; any server on this machine is seen through /proc as well, which then
says how much memory there is, and the server only what it is for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from serverlesslora_loadgen import lifetimes
from serverlesslora_loadgen.admin_pages import Admin, Gauges, State
from serverlesslora_loadgen.errors import TargetError
from serverlesslora_loadgen.lifetimes import Held

MAX_SHARE = 0.03  # of a core: page tables of many large processes take time that the server and the client need
PATIENCE_S = 5.0  # a server under load answers late


class Sample(msgspec.Struct, frozen=True):
    """One look at the server. None: nobody could say."""

    at_s: float  # after the start of the run; below 0: before it
    workers: int | None = None  # alive, whatever they do
    held_bytes: int | None = None
    parts: dict[str, int] = {}  # of held_bytes, all of it: backbone, adapters, workers, kv, other
    device_s: float | None = None  # since the first look


class Memory(NamedTuple):
    held_bytes: int | None
    parts: dict[str, int]


def memory_of(state: State | None, gauges: Gauges | None, held: Held | None) -> Memory:
    """What is held and what for; the parts add up to it.

    The kernel is believed before the server. Backbones lie in shared memory, adapters and keys and values in that of
    workers, unless they lie on a device, whose memory is not counted here. Where only the server was asked, its own
    processes cannot be told from its workers.
    """
    if held is None:
        whole = gauges.held_bytes if gauges is not None else None
        if whole is None or state is None:
            return Memory(whole, {} if whole is None else {"other": whole})
        taken = _Taken(whole)
        backbone = taken.take(state.backbone_bytes)
        adapters, kv = taken.take(state.adapter_bytes), taken.take(state.kv_bytes)
        return Memory(whole, {"backbone": backbone, "adapters": adapters, "workers": taken.left, "kv": kv, "other": 0})
    whole = held.total_bytes
    if state is None:
        return Memory(whole, {"other": whole})
    backbone = min(state.backbone_bytes, held.shared_bytes)
    taken = _Taken(sum(held.pids.get(worker.pid or 0, 0) for worker in state.workers))
    adapters, kv = taken.take(state.adapter_bytes), taken.take(state.kv_bytes)
    other = whole - backbone - adapters - kv - taken.left
    return Memory(whole, {"backbone": backbone, "adapters": adapters, "workers": taken.left, "kv": kv, "other": other})


class _Taken:
    """A sum to take parts from. Parts were asked for a moment apart, so together they may be more than the sum."""

    def __init__(self, whole: int) -> None:
        self.left = max(0, whole)

    def take(self, size_bytes: int) -> int:
        part = min(size_bytes, self.left)
        self.left -= part
        return part


class DeviceClock:
    """Device seconds since the first look, from two counts that both only fall short.

    The server's total misses requests that are not finished. The time its workers were busy misses those that were
    not met alive, and the last moments of those that were.
    """

    def __init__(self) -> None:
        self._first_total: float | None = None
        self._first_busy: float | None = None
        self._busy: dict[str, float] = {}  # worker → its newest
        self._seconds: float | None = None

    def update(self, state: State | None, gauges: Gauges | None) -> float | None:
        found = [] if self._seconds is None else [self._seconds]
        if state is not None:
            self._busy |= {
                worker.worker_id: worker.stats.busy_s for worker in state.workers if worker.stats is not None
            }
            busy = sum(self._busy.values())
            self._first_busy = busy if self._first_busy is None else self._first_busy
            found.append(busy - self._first_busy)
        if gauges is not None and gauges.device_s is not None:
            self._first_total = gauges.device_s if self._first_total is None else self._first_total
            found.append(gauges.device_s - self._first_total)
        self._seconds = max(found, default=None)
        return self._seconds


class Observer:
    """Looks from a thread of its own, from `with` (or `start`) until its end (or `stop`).

    `admin`: the admin API of a server of ours, `url` its public address. `group`: a process group on this machine,
    which has memory and processes; which of them are workers only the server knows.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        admin: str | None = None,
        group: int | None = None,
        interval_s: float = 1.0,
        headers: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if admin is None and group is None:
            raise TargetError("nothing to observe: give --admin URL of the server, --meter-group PGID, or both")
        if interval_s <= 0:
            raise TargetError(f"a server cannot be looked at every {interval_s} s: give more than 0")
        self._admin = (
            None if admin is None else Admin(admin, url, headers=headers, timeout_s=max(PATIENCE_S, interval_s))
        )
        self._group = group
        self._interval_s = interval_s
        self._clock = clock
        self._device = DeviceClock()
        self._seen: list[Sample] = []  # their times on our clock; only ever appended to
        self._failed: list[str] = []
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Observer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Raises TargetError when there is nothing to see already now."""
        assert self._thread is None, "started twice"
        self._look()
        self._thread = threading.Thread(target=self._main_loop, name="observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """With a last look, so that the end of the run is not guessed."""
        if self._thread is None or self._ends.is_set():
            return
        self._ends.set()
        self._thread.join()
        self._try_to_look()

    def samples(self, began_at: float) -> list[Sample]:
        """In order. `began_at`: the start of the run, on the clock of this observer (`time.monotonic`)."""
        return [msgspec.structs.replace(each, at_s=each.at_s - began_at) for each in list(self._seen)]

    @property
    def how(self) -> str:
        """Where the bytes come from, for people."""
        if self._group is not None:
            return f"all processes of group {self._group}, shared pages once, looked at every {self._interval_s:g} s"
        return f"the server's own gauge, looked at every {self._interval_s:g} s"

    @property
    def notes(self) -> list[str]:
        said = []
        if self._admin is None:
            said.append(
                "How many workers were alive is not known: nobody but the server (--admin URL) can say which processes "
                "of a group are workers."
            )
        if self._failed:
            looks = len(self._seen) + len(self._failed)
            said.append(f"{len(self._failed)} of {looks} looks at the server failed, the last one: {self._failed[-1]}")
        return said

    def facts(self) -> dict[str, Any]:
        """What the server says of itself, for the setup of a result."""
        return {} if self._admin is None else self._admin.facts()

    def _main_loop(self) -> None:
        wait_s = self._interval_s
        while not self._ends.wait(wait_s):
            before = time.thread_time()
            self._try_to_look()
            wait_s = max(self._interval_s, (time.thread_time() - before) / MAX_SHARE)

    def _try_to_look(self) -> None:
        try:
            self._look()
        except TargetError as error:  # a server under load may be slow; the next look is soon
            self._failed.append(str(error))

    def _look(self) -> None:
        at = self._clock()
        state = gauges = held = None
        if self._admin is not None:
            state, gauges = self._admin.state(), self._admin.gauges()
        if self._group is not None and (held := lifetimes.look(self._group)) is None:
            raise TargetError(f"no process of group {self._group} that may be looked at; is the server running?")
        memory = memory_of(state, gauges, held)
        self._seen.append(
            Sample(
                at_s=at,
                workers=None if state is None else len(state.workers),
                held_bytes=memory.held_bytes,
                parts=memory.parts,
                device_s=self._device.update(state, gauges),
            )
        )
