"""The dispatcher on an event loop: what it sends resolves a future, what it refuses raises, a timer calls it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from serverlesslora.errors import Overloaded, RateLimited, ServerlessLoraError, Unavailable
from serverlesslora.scheduler.asks import Ask, Refusal, Send
from serverlesslora.scheduler.dispatcher import Dispatcher


class Turn(NamedTuple):
    function: str
    future: asyncio.Future[None]


class RequestQueue:
    """All waiting of the gateway happens here; a worker is sent only what it can run at once."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._turns: dict[str, Turn] = {}  # of those that wait
        self._running: set[str] = set()  # those that were sent
        self._is_open = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        return self._dispatcher.num_waiting

    @property
    def waiting_functions(self) -> tuple[str, ...]:
        return tuple(sorted({turn.function for turn in self._turns.values()}))

    def offer(self, ask: Ask, *, cold_s: float) -> asyncio.Future[None]:
        """A future that is done when the request may be sent to its worker.

        Raises RateLimited or Overloaded, now or through the future, when it cannot be answered in time.
        """
        if not self._is_open:
            raise Unavailable("The server is shutting down.", retry_after_s=5)
        if refusal := self._dispatcher.offer(ask, self._clock(), cold_s=cold_s):
            raise refused(refusal)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn.add_done_callback(lambda done: done.cancelled() or done.exception())  # its client may have left
        self._turns[ask.request_id] = Turn(ask.function, turn)
        self._pump()
        return turn

    def opened(self, domain: str) -> None:
        self._dispatcher.open(domain, self._clock())
        self._pump()

    def closed(self, domain: str) -> None:
        self._dispatcher.close(domain)
        self._pump()

    def first_token(self, request_id: str, *, is_typical: bool) -> None:
        if request_id in self._running:
            self._dispatcher.first_token(request_id, self._clock(), is_typical=is_typical)
            self._pump()

    def left(self, request_id: str, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """It is over, or its client left, wherever it was; a second time means nothing."""
        now = self._clock()
        if self._turns.pop(request_id, None) is not None:
            self._dispatcher.cancelled(request_id, now)
        elif request_id in self._running:
            self._running.discard(request_id)
            self._dispatcher.ended(request_id, now, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        else:
            return
        self._pump()

    def explain(self, domain: str) -> str:
        return self._dispatcher.explain(domain, self._clock())

    def waiting_in(self, domain: str) -> int:
        return self._dispatcher.waiting_in(domain)

    def shutdown(self) -> None:
        """Nobody who still waits will be sent."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
        for turn in self._turns.values():
            if not turn.future.done():
                turn.future.set_exception(Unavailable("The server is shutting down.", retry_after_s=5))

    def _pump(self) -> None:
        if not self._is_open:
            return
        for decided in self._dispatcher.next(self._clock()):
            turn = self._turns.pop(decided.request_id).future
            if isinstance(decided, Send):
                self._running.add(decided.request_id)
            if turn.done():  # its client is leaving, and will say so
                continue
            if isinstance(decided, Refusal):
                turn.set_exception(refused(decided))
            else:
                turn.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wait_s = self._dispatcher.wait_s(self._clock())
        if wait_s is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._pump)


def refused(refusal: Refusal) -> ServerlessLoraError:
    kind = RateLimited if refusal.status == 429 else Overloaded
    return kind(refusal.reason, retry_after_s=refusal.retry_after_s)
