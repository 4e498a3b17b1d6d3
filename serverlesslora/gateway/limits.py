"""What a request body may be: its type, its size, its arrival time, and JSON without surprises."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serverlesslora.errors import InvalidRequest

DISCARD = 4  # how many times the limit is read before the connection is cut


class HttpSettings(msgspec.Struct, frozen=True):
    """Limits of the HTTP layer."""

    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0  # from the headers to the last byte of the body,
    body_bytes_per_s: float = 32 << 10  # and longer for what has arrived: a slow line may send a long body
    max_n: int = 128  # choices of one prompt
    max_prompts: int = 512  # prompts of one completions request
    ping_s: float = 10.0  # keep-alive comments while a stream waits for its first token
    write_timeout_s: float = 30.0  # how long a streaming client may refuse to read
    metrics_functions: int = 200  # functions with labels of their own in /metrics


def check_content_type(request: Request) -> None:
    """JSON only. A missing header is forgiven: some clients leave it out."""
    value = request.headers.get("content-type")
    media_type = (value or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(415, "The body must be JSON: send 'Content-Type: application/json'.")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise HTTPException(415, "Compressed bodies are not accepted.")


async def read_body(request: Request, settings: HttpSettings) -> bytes:
    """Counted while it arrives, so that a lying or missing Content-Length costs no memory.

    A body that is only a little too large is read to its end and thrown away: a client that is cut off while it still
    writes may never see the answer.
    """
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    size = int(declared[:20]) if declared.isdecimal() else 0
    # Who asks before sending is told at once.
    asks_first = request.headers.get("expect", "").lower() == "100-continue"
    if size <= (limit if asks_first else limit * DISCARD):
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.body_timeout_s) as deadline:
                first_at = deadline.when() or 0.0
                async for chunk in request.stream():
                    size += len(chunk)
                    deadline.reschedule(first_at + size / settings.body_bytes_per_s)
                    if size <= limit:
                        chunks.append(chunk)
                        continue
                    chunks.clear()
                    if size > limit * DISCARD:
                        break
        except TimeoutError:
            raise HTTPException(408, "The body did not arrive in time.", {"connection": "close"}) from None
        if size <= limit:
            return b"".join(chunks)
    raise HTTPException(413, f"The body is larger than {limit} bytes.", {"connection": "close"})


OBJECTIVE_HEADER = "x-slo-ttft-ms"


def objective_of(request: Request) -> float | None:
    """How long the client will wait for its first token, in seconds, if it says so. Raises InvalidRequest."""
    value = request.headers.get(OBJECTIVE_HEADER)
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = 0.0
    if not 0 < milliseconds < float("inf"):
        raise InvalidRequest(f"The header {OBJECTIVE_HEADER} must be a number of milliseconds above 0.")
    return milliseconds / 1000


_decode = msgspec.json.Decoder().decode  # strict: no NaN, no Infinity, no lone surrogates, no invalid UTF-8


def decode_object(body: bytes) -> dict[str, Any]:
    try:
        value = _decode(body)
    except RecursionError:
        raise InvalidRequest("The JSON body is nested too deeply.", code="invalid_json") from None
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: invalid UTF-8
        reason = "it is not valid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise InvalidRequest(f"The body could not be parsed as JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The JSON body must be an object.", code="invalid_json")
    return value


async def read_json(request: Request, settings: HttpSettings) -> dict[str, Any]:
    check_content_type(request)
    return decode_object(await read_body(request, settings))
