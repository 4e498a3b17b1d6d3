"""Work that many wait for and that is done once: whoever leaves does not stop it for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Flight(Generic[Result]):
    """One piece of work. Its result is let go of when it is there and the last one has left."""

    def __init__(self, task: asyncio.Task[Result], landed: Callable[[Result], Callable[[], None]]) -> None:
        self._task = task
        self._landed = landed
        self._waiting = 0
        self._let_go: Callable[[], None] | None = None
        task.add_done_callback(self._done)

    def enter(self) -> None:
        self._waiting += 1

    async def wait(self) -> Result:
        return await asyncio.shield(self._task)

    def leave(self) -> None:
        self._waiting -= 1
        self._release()

    def _done(self, task: asyncio.Task[Result]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._let_go = self._landed(task.result())
        self._release()

    def _release(self) -> None:
        if not self._waiting and self._let_go is not None:
            let_go, self._let_go = self._let_go, None
            let_go()


class Flights(Generic[Key, Result]):
    def __init__(self) -> None:
        self._by_key: dict[Key, Flight[Result]] = {}

    def join(
        self,
        key: Key,
        work: Callable[[], Awaitable[Result]],
        *,
        landed: Callable[[Result], Callable[[], None]],
    ) -> Flight[Result]:
        """The work under way for this key, or new work; to be left by who joined. `landed` returns what is to be called
        when nobody needs the result any more.
        """
        flight = self._by_key.get(key)
        if flight is None:
            task = asyncio.ensure_future(work())
            assert isinstance(task, asyncio.Task)
            flight = self._by_key[key] = Flight(task, landed)
            task.add_done_callback(lambda _: self._by_key.pop(key, None))
        flight.enter()
        return flight
