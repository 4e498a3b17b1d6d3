"""Being woken at a time, more precisely than event loops do it.

Loops round their timers to milliseconds, and latencies count from the time a request was meant to leave: half a
millisecond of lag on each would be half a millisecond of every number. Linux has timers that are files (`timerfd`),
which wake a loop within some ten microseconds; Python offers them from 3.13 on only, hence ctypes.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK and TFD_CLOEXEC are these by definition


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Calls back once per `set`, never before its time. Setting it again moves it."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._at = 0.0
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._fd = -1
        if self._libc is not None:
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._rang)

    def set(self, at: float) -> None:
        """`at` is on `time.monotonic`; what has passed rings in the next round of the loop."""
        self._at = at
        if self._fd < 0:
            self._set_on_loop()
            return
        assert self._libc is not None
        nanoseconds = max(1, round(at * 1e9))  # 0 would switch it off
        spec = _Itimerspec(value=_Timespec(*divmod(nanoseconds, 1_000_000_000)))
        if self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _rang(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # it was set again between ringing and being heard
            return
        self._callback()

    def _set_on_loop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later(max(0.0, self._at - time.monotonic()), self._due)

    def _due(self) -> None:
        if time.monotonic() < self._at:  # loops may ring up to a millisecond early
            self._set_on_loop()
        else:
            self._callback()
