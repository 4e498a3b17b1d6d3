"""Every error as an OpenAI error object: one table from exceptions to answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from serverlesslora.errors import ServerlessLoraError, Unauthorized
from serverlesslora_ipc.messages import WireError

log = logging.getLogger("serverlesslora.http")

RETRYABLE_4XX = frozenset({408, 409, 429})
CHALLENGE = ("www-authenticate", "Bearer")  # HTTP asks for one with every 401
MESSAGE_LIMIT = 1000  # characters; an error must not become larger than what caused it


class _ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorObject


_encode = msgspec.json.Encoder().encode


class ErrorAnswer(msgspec.Struct, frozen=True):
    """An error ready to be sent, as a response or inside a stream."""

    error: WireError
    retry_after_s: int | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def status(self) -> int:
        return self.error.status

    def body(self) -> bytes:
        error = self.error
        return _encode(_ErrorBody(_ErrorObject(clip(error.message), error.type, error.param, error.code)))

    def response(self) -> Response:
        headers = dict(self.headers)
        if self.status in (429, 503):
            headers["retry-after"] = str(min(60, max(1, self.retry_after_s or 1)))  # clients ignore more than a minute
        elif 400 <= self.status < 500 and self.status not in RETRYABLE_4XX:
            headers["x-should-retry"] = "false"
        return Response(self.body(), self.status, headers, media_type="application/json")


def clip(text: str) -> str:
    """Bounded and always encodable."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MESSAGE_LIMIT else f"{text[:MESSAGE_LIMIT]}…"


def _plain(status: int, message: str, code: str | None, headers: Mapping[str, str] | None = None) -> ErrorAnswer:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorAnswer(WireError(status, message, kind, code), headers=tuple((headers or {}).items()))


def _http_exception(error: HTTPException) -> ErrorAnswer:
    message, code = {
        404: ("This path does not exist. See /v1/models and the documentation.", "unknown_url"),
        405: ("This method is not allowed on this path.", "method_not_allowed"),
        408: (error.detail, "request_timeout"),
        413: (error.detail, "content_too_large"),
        415: (error.detail, "unsupported_media_type"),
    }.get(error.status_code, (error.detail, None))
    return _plain(error.status_code, message, code, error.headers)


def answer_for(error: BaseException) -> ErrorAnswer:
    """The one place that decides how an exception looks from outside."""
    match error:
        case Unauthorized():
            return ErrorAnswer(error.to_wire(), headers=(CHALLENGE,))
        case ServerlessLoraError():
            return ErrorAnswer(error.to_wire(), error.retry_after_s)
        case HTTPException():
            return _http_exception(error)
        case ClientDisconnect():
            return _plain(400, "The client closed the connection before the request was complete.", "client_closed")
        case RecursionError():
            return _plain(400, "The JSON body is nested too deeply.", "invalid_json")
        case _:
            log.error("unexpected error", exc_info=error, extra={"withhold": True})
            return _plain(500, "The server had an unexpected error; its log has the details.", "internal_error")
