"""An answer in the shape of another API: its errors and the ends of its streams, where they are not OpenAI's.

Everything that runs a generation speaks of failures in one way (see `http_errors`); an API that says them differently
wraps the answer instead of having a path of its own through admission, metering and disconnects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serverlesslora.gateway.sse import DONE
from serverlesslora.gateway.sse import event as sse_event


class Refusal(msgspec.Struct, frozen=True):
    """What is inside an OpenAI error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class _Body(msgspec.Struct, frozen=True):
    error: Refusal


class Shape(Protocol):
    def refused(self, status: int, refusal: Refusal) -> tuple[int, bytes]:
        """The status and the body of an answer that is an error."""

    def failed(self, refusal: Refusal) -> bytes:
        """The end of a stream that broke, complete with framing."""


_decode = msgspec.json.Decoder(_Body).decode
_encode = msgspec.json.Encoder().encode
_FAILURE = b'data: {"error":'


def renamed(param: str | None, names: Mapping[str, str]) -> str | None:
    """A parameter by its name here; what is inside of one that has another name is only known to be somewhere in it."""
    return None if param is None else names.get(param.partition("[")[0].partition(".")[0], param)


class Renaming:
    """OpenAI's shape, for a request whose parameters are called otherwise than in the generation it became."""

    def __init__(self, **names: str) -> None:
        self._names = names

    def refused(self, status: int, refusal: Refusal) -> tuple[int, bytes]:
        return status, _encode(_Body(msgspec.structs.replace(refusal, param=renamed(refusal.param, self._names))))

    def failed(self, refusal: Refusal) -> bytes:
        return sse_event(self.refused(500, refusal)[1])


class Reshaped(Response):
    """Sends what `inner` sends. A stream ends without [DONE], which only OpenAI's older APIs have."""

    def __init__(self, inner: Response, shape: Shape) -> None:
        super().__init__()
        self._inner = inner
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: Message | None = None

        async def reshaping(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                if message["status"] >= 400:  # its length is not known yet
                    held = message
                    return
            elif held is not None:
                status, body = self._shape.refused(held["status"], _decode(message["body"]).error)
                MutableHeaders(raw=held["headers"])["content-length"] = str(len(body))
                await send({**held, "status": status})
                message = {**message, "body": body}
            elif not message.get("more_body") and message["body"].endswith(DONE):
                message = {**message, "body": self._ended(message["body"].removesuffix(DONE))}
            await send(message)

        await self._inner(scope, receive, reshaping)

    def _ended(self, last: bytes) -> bytes:
        if last.startswith(_FAILURE):
            return self._shape.failed(_decode(last.removeprefix(b"data: ")).error)
        return last
