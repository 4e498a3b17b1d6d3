"""What surrounds every request: its id, its journal, its access line, and an answer also to what nobody expected."""

from __future__ import annotations

import logging
import re
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serverlesslora.gateway.door import OPEN_PATHS, UNCOUNTED_PATHS
from serverlesslora.gateway.http_errors import answer_for
from serverlesslora.gateway.journal import Journal
from serverlesslora.logs import about

if TYPE_CHECKING:
    from serverlesslora.gateway.app import Gateway

QUIET_PATHS = OPEN_PATHS | UNCOUNTED_PATHS  # probes and open pages ask every second
_REQUEST_ID = re.compile(r"(?!.*sk-)[A-Za-z0-9._:-]{1,128}")  # what looks like a key is not written down

log = logging.getLogger("serverlesslora.access")


class Envelope:
    """Gives every answer its request id, counts it, and turns what nobody expected into an error object."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        journal = Journal(request_id, tuple(scope["headers"]))
        with about(journal):
            await self._answer(scope, receive, send, journal)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, journal: Journal) -> None:
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = journal.request_id
                if self._gateway.draining:
                    headers["connection"] = "close"
            await send(message)

        self._gateway.in_flight += 1
        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if status:
                raise
            await answer_for(error).response()(scope, receive, sending)
        finally:
            self._gateway.in_flight -= 1
            if (stay := scope["state"].get("stay")) is not None:
                stay.leave()
            route = getattr(scope.get("route"), "path", "none")
            self._gateway.metrics.responses.labels(route, str(status or 499)).inc()
            journal.ended(route, status)
            self._tell(journal, logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO)

    def _tell(self, journal: Journal, level: int) -> None:
        if log.isEnabledFor(level):
            log.log(level, "request", extra={"fields": journal.access_fields()})
        try:
            self._gateway.on_finished(journal)
        except Exception as error:  # the answer was sent, and its connection is good for more
            log.error("a request could not be traced", exc_info=error, extra={"withhold": True})


def _request_id(scope: Scope) -> str:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return uuid.uuid4().hex
