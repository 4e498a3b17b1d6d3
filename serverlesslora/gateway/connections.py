"""Connections that must say something: uvicorn itself waits for request headers without end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class WatchedProtocol(HttpToolsProtocol):
    """Closes a connection whose request headers are not complete in time; bodies have their own limit.

    Give it to uvicorn as `http=`. Idle connections between two requests stay with `timeout_keep_alive`.
    """

    header_timeout_s = 10.0
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._header_timer is None:  # the first request is timed from the connection on
            self._watch()

    def on_headers_complete(self) -> None:
        self._unwatch()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._unwatch()
        super().shutdown()

    def _watch(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._close)

    def _unwatch(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def watched(header_timeout_s: float) -> type[WatchedProtocol]:
    attributes: dict[str, Any] = {"header_timeout_s": header_timeout_s}
    return type("WatchedProtocol", (WatchedProtocol,), attributes)
