"""When each request leaves. Times are absolute, so no delay is ever carried on to the next request.

`OpenLoop` sends at its times whatever became of the requests before, which is what people do; `ClosedLoop` keeps a
number of them under way, which is what finds out how much a server can take, and is no measurement of latency:
a slow server makes such a client ask less (coordinated omission; G. Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

BURST = 16  # sent in one round of the loop; more would keep answers that have come waiting for their stamps

Send = Callable[[int, float], None]  # which request, and when it was meant to leave


class Pacer(Protocol):
    def start(self) -> None: ...

    def wake(self) -> None:
        """The time asked for has come."""

    def done(self) -> None:
        """A request has ended."""

    def stop(self) -> range:
        """Sends no more; those that will not be sent."""


class OpenLoop:
    def __init__(
        self, times: Sequence[float], send: Send, *, now: Callable[[], float], wake_at: Callable[[float], None]
    ) -> None:
        """`times` must not fall."""
        self._times, self._send, self._now, self._wake_at = times, send, now, wake_at
        self._next = 0
        self._end = len(times)

    def start(self) -> None:
        if self._next < self._end:
            self._wake_at(self._times[self._next])

    def wake(self) -> None:
        now = self._now()
        limit = min(self._end, self._next + BURST)
        while self._next < limit and self._times[self._next] <= now:
            index = self._next
            self._next += 1
            self._send(index, self._times[index])
        self.start()

    def done(self) -> None:
        pass

    def stop(self) -> range:
        rest = range(self._next, self._end)
        self._end = self._next
        return rest


class ClosedLoop:
    def __init__(
        self,
        count: int,
        send: Send,
        *,
        concurrency: int,
        start_at: float,
        now: Callable[[], float],
        wake_at: Callable[[float], None],
    ) -> None:
        self._send, self._now, self._wake_at = send, now, wake_at
        self._start_at = start_at
        self._free = concurrency
        self._next = 0
        self._end = count

    def start(self) -> None:
        self._wake_at(self._start_at)

    def wake(self) -> None:
        limit = min(self._end, self._next + BURST)
        while self._next < limit and self._free > 0:
            self._free -= 1
            index = self._next
            self._next += 1
            self._send(index, self._now())
        if self._next < self._end and self._free > 0:
            self._wake_at(self._now())

    def done(self) -> None:
        self._free += 1
        self.wake()

    def stop(self) -> range:
        rest = range(self._next, self._end)
        self._end = self._next
        return rest
