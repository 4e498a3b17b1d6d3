"""The plain answer to a chat request, whole or as a stream of chunks: all the model's text is content."""

from __future__ import annotations

from typing import Literal

import msgspec

from serverlesslora.gateway.answering import Opening
from serverlesslora.gateway.backend import Event
from serverlesslora.gateway.chat_body import Chat
from serverlesslora.gateway.logprobs import ChatLogprobs, PromptLogprobs, chat_logprobs, prompt_logprobs
from serverlesslora.gateway.openai import Usage
from serverlesslora.gateway.sse import event as sse_event
from serverlesslora_ipc.messages import Delta, PromptEcho, TokenLogprob

_encode = msgspec.json.Encoder().encode


# --- the whole answer --------------------------------------------------------------------------------------------


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: Function
    type: Literal["function"] = "function"


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: Function | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class _Choice:
    """What one choice has said so far."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = "length"
        self.stop_reason: str | int | None = None


class ChatWhole:
    def __init__(self, completion_id: str, chat: Chat, opening: Opening) -> None:
        self._id = completion_id
        self._request = request = chat.request
        self._echo = chat.echo
        self._created = opening.created
        self._prompt: PromptEcho | None = None
        self._choices = [_Choice() for _ in range(request.num_choices)]

    def add(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, PromptEcho):
            self._prompt = event
        elif isinstance(event, Delta):
            choice = self._choices[event.index]
            choice.text.append(event.text)
            choice.token_ids.extend(event.token_ids)
            choice.logprobs.extend(event.logprobs or ())
            if event.finish_reason is not None:
                choice.finish_reason = event.finish_reason
                choice.stop_reason = event.stop_reason
        return b""

    def last(self, usage: Usage) -> bytes:
        request, echo = self._request, self._prompt
        with_ids = bool(request.return_token_ids)
        return _encode(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=request.model,
                choices=[
                    ChatChoice(
                        index=index,
                        message=self._message(index),
                        logprobs=chat_logprobs(choice.logprobs) if request.logprobs else None,
                        finish_reason=choice.finish_reason,
                        stop_reason=choice.stop_reason,
                        token_ids=choice.token_ids if with_ids else msgspec.UNSET,
                    )
                    for index, choice in enumerate(self._choices)
                ],
                usage=usage,
                prompt_logprobs=prompt_logprobs(echo.logprobs) if echo and echo.logprobs else msgspec.UNSET,
                prompt_token_ids=list(echo.token_ids) if echo and with_ids else msgspec.UNSET,
            )
        )

    def _message(self, index: int) -> AssistantMessage:
        return AssistantMessage(self._echo + "".join(self._choices[index].text))


# --- the stream --------------------------------------------------------------------------------------------------


class ChatStream:
    """Chunks put together from parts that are encoded once: this runs for every token of every stream."""

    def __init__(self, completion_id: str, chat: Chat, opening: Opening) -> None:
        self._request = request = chat.request
        self._echo = chat.echo
        self._fresh = set(range(request.num_choices))  # choices that have not said their role
        self._prompt_tokens = opening.prompt_tokens
        self._completion_tokens = 0
        self._running_usage = request.wants_running_usage
        self._with_ids = bool(request.return_token_ids)
        self._envelope = b'{"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,' % (
            _encode(completion_id),
            opening.created,
            _encode(request.model),
        )
        self._head = b"data: " + self._envelope + b'"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if request.wants_usage else b"}]}\n\n"
        self._prompt_fields = b""

    def add(self, prompt: int, event: Event) -> bytes:
        if type(event) is Delta:
            return self._delta(event)
        if type(event) is PromptEcho:
            self._echoed(event)
        return b""

    def _delta(self, delta: Delta) -> bytes:
        self._completion_tokens += len(delta.token_ids)
        out = self._role(delta.index) if delta.index in self._fresh else b""
        reason = delta.finish_reason
        if not delta.text and reason is None and not delta.logprobs and not (self._with_ids and delta.token_ids):
            return out
        content = b'{"content":%b}' % _encode(delta.text) if delta.text or reason is None else b"{}"
        logprobs = _encode(chat_logprobs(delta.logprobs)) if delta.logprobs else b"null"
        extra = b',"token_ids":%b' % _encode(delta.token_ids) if self._with_ids else b""
        if reason is None:
            extra = b',"finish_reason":null' + extra
        else:
            extra = b',"finish_reason":"%b","stop_reason":%b' % (reason.encode(), _encode(delta.stop_reason)) + extra
        return b'%b%b%d,"delta":%b,"logprobs":%b%b%b' % (
            out,
            self._head,
            delta.index,
            content,
            logprobs,
            extra,
            self._end(),
        )

    def _role(self, index: int) -> bytes:
        self._fresh.remove(index)
        delta = b'{"role":"assistant","content":%b}' % _encode(self._echo)
        tail = self._end(self._prompt_fields)
        self._prompt_fields = b""
        return b'%b%d,"delta":%b,"logprobs":null,"finish_reason":null%b' % (self._head, index, delta, tail)

    def _end(self, fields: bytes = b"") -> bytes:
        if self._running_usage:
            usage = _encode(Usage.counted(self._prompt_tokens, self._completion_tokens, 0))
            return b'}]%b,"usage":%b}\n\n' % (fields, usage)
        return b"}]" + fields + self._tail[2:] if fields else self._tail

    def _echoed(self, echo: PromptEcho) -> None:
        """vLLM's prompt fields go with the first chunk."""
        if echo.logprobs is not None:
            self._prompt_fields += b',"prompt_logprobs":' + _encode(prompt_logprobs(echo.logprobs))
        if self._with_ids:
            self._prompt_fields += b',"prompt_token_ids":' + _encode(echo.token_ids)

    def last(self, usage: Usage) -> bytes:
        if not self._request.wants_usage:
            return b""
        return sse_event(b'%b"choices":[],"usage":%b}' % (self._envelope, _encode(usage)))
