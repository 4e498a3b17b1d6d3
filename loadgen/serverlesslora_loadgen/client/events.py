"""Events of OpenAI-compatible streams, as far as a client measures them.

The union of what vLLM, SGLang, LoRAX, llama.cpp and OpenAI send for completions and chat. Fields that say nothing
about tokens, names or endings are not decoded at all.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]  # more is no count, and fits into no file

_NOTHING = msgspec.Raw()  # in unions with None it would not be raw


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # vLLM and SGLang with a reasoning parser, llama.cpp
    reasoning: str | None = None  # newer vLLM, and routers
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw = _NOTHING


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: Count | None = None


class Usage(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None  # null while it runs, of some
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct):
    id: str | None = None
    object: str | None = None
    model: str | None = None
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = _NOTHING
    message: str | None = None  # of older error objects, which have no `error` around them

    @property
    def is_error(self) -> bool:
        return self.object == "error" or _says_something(self.error)


def text_of(choice: Choice) -> str:
    """What a person would read of it, in the order it was thought."""
    delta = choice.delta
    if delta is None:
        return choice.text or ""
    return (delta.reasoning_content or delta.reasoning or "") + (delta.content or delta.refusal or "")


def bears_tokens(choice: Choice) -> bool:
    """Whether at least one token stands behind it. A role alone, or only the end, does not count."""
    if choice.token_ids or choice.text:
        return True
    delta = choice.delta
    return delta is not None and bool(
        delta.content
        or delta.reasoning_content
        or delta.reasoning
        or delta.tool_calls
        or delta.refusal
        or _says_something(delta.function_call)
    )


def _says_something(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in (b"", b"null", b"false", b'""')
