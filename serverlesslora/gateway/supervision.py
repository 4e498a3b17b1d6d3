"""Runs one process after another: the pause between them grows while they die young."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger("serverlesslora.backbone")

MAX_BACKOFF_S = 10.0


async def keep_alive(name: str, run: Callable[[], Awaitable[None]], goes_on: Callable[[], bool]) -> None:
    """`run` is one process's life; `goes_on` is asked after each whether there is to be another."""
    backoff_s = 0.1
    while True:
        started = time.monotonic()
        try:
            await run()
        except Exception:  # such as: no process or descriptor is left to be had; there may be one later
            log.exception("a process of backbone %s could not be run", name)
        if not goes_on():
            return
        backoff_s = 0.1 if time.monotonic() - started > MAX_BACKOFF_S else min(2 * backoff_s, MAX_BACKOFF_S)
        await asyncio.sleep(backoff_s)
