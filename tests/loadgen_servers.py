"""A server that does what the asked model's name says, most of it wrong: what a load generator has to notice.

`wrong-adapter` is wrong every time, `wrong-adapter/10` every tenth time that it is asked, `sheds-most` sheds but for
every tenth time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socketserver
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from serverlesslora_loadgen.null_answers import WORDS, words_of
from serverlesslora_loadgen.record import Failure
from tests.server import running

HONEST = "honest"
SHEDS = ("sheds", "sheds-without-a-word")  # with 429 and Retry-After, with 503 and without
STALL_S = 1.0  # longer than a client of these tests waits between tokens
HANG_S = 30.0

# Every way to be wrong, and what it has to be called. `wrong-adapter` can only be seen by who knows the right answer.
FAULTS: dict[str, Failure] = {
    "wrong-adapter": "wrong-answer",
    "other-name": "wrong-model",
    "no-done": "truncated",
    "closes-early": "truncated",
    "drops-last-chunk": "no-finish-reason",
    "drops-one-token": "usage-mismatch",
    "repeats-one-token": "usage-mismatch",
    "usage-one-more": "usage-mismatch",
    "one-token-less": "length-mismatch",
    "no-finish-reason": "no-finish-reason",
    "no-usage": "no-usage",
    "error-event": "error-event",
    "half-an-event": "malformed",
    "not-a-stream": "malformed",
    "stalls": "stall",
    "hangs": "timeout",
    "redirects": "status",
    "breaks": "status",
}

Event = dict[str, Any]


def right_answer(body: dict[str, Any]) -> str:
    return "".join(WORDS[word] for word in words_of(body["model"], body["prompt"], body["max_tokens"]))


def honest_events(body: dict[str, Any], words: list[int]) -> list[Event]:
    envelope = {"id": "cmpl-1", "object": "text_completion", "model": body["model"]}
    count, asked = len(words), len(body["prompt"])
    events: list[Event] = [
        {**envelope, "choices": [{"index": 0, "text": WORDS[word], "token_ids": [word], "finish_reason": None}]}
        for word in words
    ]
    events[-1]["choices"][0]["finish_reason"] = "length"
    usage = {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}
    return [*events, {**envelope, "choices": [], "usage": usage}]


def other_name(events: list[Event]) -> None:
    for event in events:
        event["model"] = "somebody-else"


def no_finish_reason(events: list[Event]) -> None:
    events[-2]["choices"][0]["finish_reason"] = None


def usage_one_more(events: list[Event]) -> None:
    events[-1]["usage"]["completion_tokens"] += 1


def error_event(events: list[Event]) -> None:
    events[2:] = [{"error": {"message": "the worker is gone", "type": "server_error"}}]


# What only changes the events; the rest is done in `Misbehaving`.
EDITS: dict[str, Callable[[list[Event]], object]] = {
    "other-name": other_name,
    "drops-last-chunk": lambda events: events.pop(-2),
    "drops-one-token": lambda events: events.pop(1),
    "repeats-one-token": lambda events: events.insert(1, events[1]),
    "usage-one-more": usage_one_more,
    "no-finish-reason": no_finish_reason,
    "no-usage": lambda events: events.pop(),
    "error-event": error_event,
}


class Misbehaving:
    def __init__(self) -> None:
        self._asked: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).json()
        fault, _, every = body["model"].partition("/")
        asked = next(self._asked[body["model"]])
        if asked % int(every or 1):
            fault = HONEST
        if fault == "sheds-most":
            fault = "sheds" if asked % 10 else HONEST
        match fault:
            case "sheds":
                await whole(send, 429, {"error": {"message": "come back later"}}, (b"retry-after", b"2"))
            case "sheds-without-a-word":
                await whole(send, 503, {})
            case "breaks":
                await whole(send, 500, {"error": {"message": "out of memory"}})
            case "redirects":
                await whole(send, 307, {}, (b"location", b"/v2/completions"))
            case "not-a-stream":
                await whole(send, 200, {"choices": [{"text": right_answer(body), "finish_reason": "length"}]})
            case "hangs":
                await asyncio.wait([asyncio.create_task(until_it_leaves(receive))], timeout=HANG_S)
            case _:
                await self._stream(fault, body, send)

    async def _stream(self, fault: str, body: dict[str, Any], send: Send) -> None:
        speaker = "somebody-else" if fault == "wrong-adapter" else body["model"]
        count = body["max_tokens"] - (fault == "one-token-less")
        events = honest_events(body, words_of(speaker, body["prompt"], count))
        if fault in EDITS:
            EDITS[fault](events)
        lines = [b"data: %b\n\n" % json.dumps(event).encode() for event in events]
        if fault == "half-an-event":
            lines[1] = lines[1][: len(lines[1]) // 2] + b"\n\n"
        if fault != "no-done":
            lines.append(b"data: [DONE]\n\n")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for place, line in enumerate(lines):
            if place == 2 and fault == "closes-early":
                return
            if place == 2 and fault == "stalls":
                await asyncio.sleep(STALL_S)
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def until_it_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(send: Send, status: int, body: object, *headers: tuple[bytes, bytes]) -> None:
    data = json.dumps(body).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": data})


@contextlib.contextmanager
def misbehaving_server() -> Iterator[str]:
    with running(Misbehaving()) as url:
        yield url


@contextlib.contextmanager
def hanging_up_server() -> Iterator[str]:
    """Takes the request and hangs up, without a byte of an answer."""

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
