"""The answer of the Responses API: a state machine from chunks of a chat stream to typed events and output items.

It reads the chunks and not the tokens, so that tool calls and reasoning are taken apart in one place, for both APIs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

Status = Literal["in_progress", "completed", "incomplete", "failed"]

# --- output items ------------------------------------------------------------------------------------------------


class OutputText(msgspec.Struct, kw_only=True):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class ReasoningText(msgspec.Struct, kw_only=True):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputReasoning(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: Status = "in_progress"
    summary: tuple[()] = ()
    content: list[ReasoningText] = []


class OutputCall(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = OutputMessage | OutputReasoning | OutputCall


# --- chunks of a chat stream, as far as they matter here ---------------------------------------------------------


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, frozen=True):
    index: int
    id: str | None = None
    function: _Function = _Function()


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta
    finish_reason: str | None = None


class _Details(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens_details: _Details = _Details()


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Chunk).decode
Event = tuple[str, dict[str, Any]]  # its type and its fields


class Output:
    """The items so far. One is open at a time; what does not continue it closes it."""

    def __init__(self, request_id: str) -> None:
        self.items: list[OutputItem] = []
        self.is_cut = False
        self.reasoning_tokens = 0
        self._request_id = request_id
        self._open: OutputItem | None = None
        self._call = -1  # index, in the chat's terms, of the open call

    def read(self, chunks: bytes) -> Iterator[Event]:
        """What zero or more chunks, with their framing, add."""
        for line in chunks.split(b"\n\n"):
            if line.startswith(b"data: {"):
                chunk = _decode(line.removeprefix(b"data: "))
                for choice in chunk.choices:
                    yield from self._delta(choice.delta)
                    self.is_cut = self.is_cut or choice.finish_reason == "length"
                if chunk.usage is not None:
                    self.reasoning_tokens = chunk.usage.completion_tokens_details.reasoning_tokens

    def close(self, status: Status) -> Iterator[Event]:
        """The events of the end of the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        place = self._place(item)
        if isinstance(item, OutputCall):
            ending = {"arguments": item.arguments, "name": item.name}
            yield "response.function_call_arguments.done", place | ending
        else:
            part = item.content[0]
            more = {"logprobs": ()} if isinstance(part, OutputText) else {}
            yield f"response.{part.type}.done", place | {"content_index": 0, "text": part.text} | more
            yield "response.content_part.done", place | {"content_index": 0, "part": part}
        item.status = status
        yield "response.output_item.done", {"output_index": place["output_index"], "item": item}

    def _delta(self, delta: _Delta) -> Iterator[Event]:
        if delta.reasoning_content:
            yield from self._said(delta.reasoning_content, OutputReasoning)
        if delta.content:
            yield from self._said(delta.content, OutputMessage)
        for call in delta.tool_calls or ():
            yield from self._called(call)

    def _said(self, text: str, kind: type[OutputMessage] | type[OutputReasoning]) -> Iterator[Event]:
        item = self._open
        if not isinstance(item, kind):
            yield from self.close("completed")
            item = kind(id=self._new_id("msg" if kind is OutputMessage else "rs"))
            yield self._opened(item)
            part = OutputText() if isinstance(item, OutputMessage) else ReasoningText()
            item.content = [part]  # type: ignore[assignment]  # each kind has parts of one kind
            yield "response.content_part.added", self._place(item) | {"content_index": 0, "part": part}
        part = item.content[0]
        part.text += text
        more = {"logprobs": ()} if isinstance(part, OutputText) else {}
        yield f"response.{part.type}.delta", self._place(item) | {"content_index": 0, "delta": text} | more

    def _called(self, call: _ToolCall) -> Iterator[Event]:
        item = self._open
        if not isinstance(item, OutputCall) or call.index != self._call:
            yield from self.close("completed")
            item_id = self._new_id("fc")
            item = OutputCall(id=item_id, call_id=call.id or item_id, name=call.function.name or "")
            self._call = call.index
            yield self._opened(item)
        if call.function.arguments:
            item.arguments += call.function.arguments
            delta = {"delta": call.function.arguments}
            yield "response.function_call_arguments.delta", self._place(item) | delta

    def _new_id(self, kind: str) -> str:
        return f"{kind}_{self._request_id}_{len(self.items)}"

    def _opened(self, item: OutputItem) -> Event:
        self.items.append(item)
        self._open = item
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": item}

    def _place(self, item: OutputItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self.items) - 1}
