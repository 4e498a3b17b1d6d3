"""An event loop whose clock jumps to the next timer as soon as nothing is left to do: hours of idleness in seconds.

Sockets are real, so what is sent inside of the loop is seen before time goes on. `time.monotonic` is the same clock,
for all who look at it while the test runs. Jobs given to the loop's executor are waited for in real time; other threads
are not.
"""

from __future__ import annotations

import asyncio
import inspect
import selectors
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from types import FunctionType
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

STUCK_S = 10.0  # real time without any timer


class _Jumping(selectors.DefaultSelector):
    """Instead of waiting, moves the clock; but not while a thread works for the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.num_jobs = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or (timeout > 0 and self.num_jobs):
            ready = super().select(STUCK_S)
            assert ready, "everybody waits for something that nobody will do"
        else:
            ready = super().select(0)
            if not ready:
                self.now += max(0.0, timeout)
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, selector: _Jumping) -> None:
        super().__init__(selector)
        self._jumping = selector

    def run_in_executor(  # type: ignore[override]  # the superclass has type variables for what is passed on as it is
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        job = super().run_in_executor(executor, func, *args)
        self._jumping.num_jobs += 1
        job.add_done_callback(self._job_done)
        return job

    def _job_done(self, job: object) -> None:
        self._jumping.num_jobs -= 1


def run_in_virtual_time(monkeypatch: pytest.MonkeyPatch, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    selector = _Jumping()
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: selector.now)
    for function in _functions("serverlesslora"):  # some took the real clock as a default when they were defined
        if real in (function.__defaults__ or ()):
            swapped = tuple(time.monotonic if each is real else each for each in function.__defaults__ or ())
            monkeypatch.setattr(function, "__defaults__", swapped)
        for name, default in (function.__kwdefaults__ or {}).items():
            if default is real:
                monkeypatch.setitem(function.__kwdefaults__, name, time.monotonic)  # type: ignore[arg-type]
    with asyncio.Runner(loop_factory=lambda: _Loop(selector)) as runner:
        return runner.run(main())


def _functions(package: str) -> Iterator[FunctionType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for each in vars(module).values():
                if inspect.isfunction(each):
                    yield each
                elif inspect.isclass(each):
                    yield from filter(inspect.isfunction, vars(each).values())
