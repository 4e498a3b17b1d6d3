"""How a request ended, judged by what was seen of it.

The first that holds:

    never left, or the person ended the run           → unsent
    429, 503                                          → shed
    any other status than 200                         → status
    an error among the events                         → error-event
    something that is no event of the API             → malformed
    no [DONE]                                         → malformed (not HTTP), timeout, stall, connect, truncated
    another model's name, not the golden answer       → wrong-model, wrong-answer
    ended without saying why or how much              → no-finish-reason, no-usage
    counted tokens are not the tokens of the usage    → usage-mismatch
    an exact number was asked for, another came       → length-mismatch
    too long between two tokens                       → stall
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from serverlesslora_loadgen.client.events import Usage
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.record import Failure, Outcome

SHED = (429, 503)
NO_ANSWER = ("abort", "error")  # finish reasons of SGLang and vLLM for what they gave up


class Ending(Enum):
    """How the transport came to an end."""

    COMPLETE = "the answer ended"
    LOST = "the connection was closed"
    CONNECT = "no connection"
    MALFORMED = "not HTTP"
    TIMEOUT = "not ended within the limit"
    STALL = "nothing came within the limit"
    INTERRUPTED = "the run was interrupted"
    LOCAL = "this machine could not send it"


@dataclass(slots=True)
class Seen:
    """What an answer has shown of itself so far."""

    status: int = 0
    location: str = ""  # of a redirect
    body: bytes = b""  # the beginning of what is no event stream
    is_written: bool = False
    is_done: bool = False
    error: str | None = None
    malformed: str | None = None
    wrong_model: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    counted: int = 0  # tokens
    has_ids_throughout: bool = True  # every event with tokens said which; then `counted` is exact
    gaps_s: list[float] = field(default_factory=list)
    text: str = ""


class Verdict(NamedTuple):
    outcome: Outcome
    failure: Failure | None
    detail: str


def judge(seen: Seen, planned: Planned, target: Target, ending: Ending, detail: str = "") -> Verdict:
    detail = detail or ending.value
    if ending in (Ending.INTERRUPTED, Ending.LOCAL) and not seen.is_done:
        return Verdict("unsent", None, detail)
    if seen.status in SHED:
        return Verdict("shed", None, error_text(seen))
    if seen.status not in (0, 200):
        return Verdict("failed", "status", error_text(seen))
    if seen.error is not None:
        return Verdict("failed", "error-event", seen.error)
    if seen.malformed is not None:
        return Verdict("failed", "malformed", f"{seen.malformed} {seen.body.decode(errors='replace')}")
    found = _unsound(seen, planned, target) if seen.is_done else _unfinished(seen, target, ending, detail)
    return Verdict("ok", None, "") if found is None else Verdict("failed", *found)


def _unfinished(seen: Seen, target: Target, ending: Ending, detail: str) -> tuple[Failure, str]:
    match ending:
        case Ending.MALFORMED:
            return "malformed", detail
        case Ending.TIMEOUT if not seen.is_written:
            return "connect", f"could not be sent within {target.timeout_s:g} s"
        case Ending.TIMEOUT:
            return "timeout", f"not ended after {target.timeout_s:g} s, {seen.counted} tokens came"
        case Ending.STALL:
            return "stall", f"nothing for {target.stall_s:g} s after {seen.counted} tokens"
    if seen.status == 0:
        return "connect", detail
    return "truncated", f"no [DONE] after {seen.counted} tokens; {detail}"


def _unsound(seen: Seen, planned: Planned, target: Target) -> tuple[Failure, str] | None:
    """What is wrong with an answer that came to its end."""
    if seen.wrong_model is not None:
        return "wrong-model", f"asked {planned.model}, answered as {seen.wrong_model}"
    if planned.golden is not None and seen.text != planned.golden:
        return "wrong-answer", difference(planned.golden, seen.text)
    if seen.finish_reason is None:
        return "no-finish-reason", f"{seen.counted} tokens came"
    if seen.finish_reason in NO_ANSWER:
        return "error-event", f"finish_reason {seen.finish_reason}"
    if seen.usage is None or seen.usage.completion_tokens is None:
        return "no-usage", f"{seen.counted} tokens came"
    made = seen.usage.completion_tokens
    # Without token ids an event may stand for several tokens, but no token for several events. Where the model may end
    # as it likes, no event at all may stand for an end of text that has no text.
    is_exact = seen.has_ids_throughout and (seen.counted > 0 or target.ignore_eos)
    if seen.counted > made or (seen.counted < made and is_exact):
        return "usage-mismatch", f"{seen.counted} tokens came, usage says {made}"
    if target.ignore_eos and made != planned.output_tokens:
        return "length-mismatch", f"{planned.output_tokens} tokens were asked for, {made} came"
    if (longest := max(seen.gaps_s, default=0.0)) > target.stall_s:
        return "stall", f"{longest:.3g} s between two tokens"
    return None


def error_text(seen: Seen) -> str:
    """The message of an error body, of whatever shape; else its text."""
    place = f" to {seen.location}" if seen.location else ""
    try:
        body: Any = msgspec.json.decode(seen.body)
        error = body.get("error", body) if isinstance(body, dict) else body
        message = error.get("message") if isinstance(error, dict) else error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = None
    text = message if isinstance(message, str) else seen.body.decode(errors="replace")
    return f"{seen.status}{place}: {text}" if text else f"{seen.status}{place}"


def difference(expected: str, found: str) -> str:
    """Where two texts part."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if at is None:
        at = min(len(expected), len(found))
    return f"from character {at} on: {expected[at : at + 40]!r} was expected, {found[at : at + 40]!r} came"
