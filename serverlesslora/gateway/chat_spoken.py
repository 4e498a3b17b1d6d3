"""The answer to a chat request whose text is taken apart: calls and reasoning stand beside the content.

Reasoning has two names: `reasoning_content` is what most clients read, `reasoning` what vLLM calls it now. Logprobs and
token ids are those of all tokens, of marks and calls too, and stand in the first chunk of what their token completed.
"""

from __future__ import annotations

import secrets

import msgspec

from serverlesslora.gateway.answering import Opening
from serverlesslora.gateway.backend import Event
from serverlesslora.gateway.chat_body import Chat
from serverlesslora.gateway.chat_plain import AssistantMessage, ChatStream, ChatWhole, Function, ToolCall
from serverlesslora.gateway.logprobs import chat_logprobs
from serverlesslora.gateway.openai import CompletionTokensDetails, Usage
from serverlesslora.gateway.tools.reader import CallArguments, CallBegun, Content, Piece, Reasoning
from serverlesslora.gateway.tools.speech import Dialect, Speech, joined
from serverlesslora_ipc.messages import Delta

_encode = msgspec.json.Encoder().encode


class _Voice:
    """One choice: what it says, and how many of its tokens were reasoning."""

    def __init__(self, chat: Chat, dialect: Dialect) -> None:
        self.has_called = False
        self.reasoning_tokens = 0
        self._offer = chat.offer
        self._drops_reasoning = chat.request.include_reasoning is False
        self._speech = Speech(chat.offer, dialect)

    def hear(self, delta: Delta) -> list[Piece]:
        was_reasoning = self._speech.is_reasoning
        is_last = delta.finish_reason is not None
        pieces = self._speech.end(delta.text) if is_last else self._speech.feed(delta.text)
        if was_reasoning or self._speech.is_reasoning:
            self.reasoning_tokens += len(delta.token_ids)
        self.has_called = self.has_called or any(type(piece) is CallBegun for piece in pieces)
        if self._drops_reasoning:
            return [piece for piece in pieces if type(piece) is not Reasoning]
        return pieces

    def finish_reason(self, reason: str) -> str:
        return reason if self._offer is None else self._offer.finish_reason(reason, has_called=self.has_called)


def _with_reasoning(usage: Usage, voices: list[_Voice], dialect: Dialect) -> Usage:
    if dialect.reasoning_tags is None:
        return usage
    details = CompletionTokensDetails(sum(voice.reasoning_tokens for voice in voices))
    return msgspec.structs.replace(usage, completion_tokens_details=details)


def _call_id(dialect: Dialect) -> str:
    """Mistral's templates refuse ids that are not of nine letters and digits when the call comes back to them."""
    return secrets.token_hex(5)[:9] if dialect.tool_format == "mistral" else f"call_{secrets.token_hex(12)}"


class SpokenWhole(ChatWhole):
    def __init__(self, completion_id: str, chat: Chat, opening: Opening) -> None:
        super().__init__(completion_id, chat, opening)
        self._dialect = opening.dialect
        self._is_legacy = chat.offer is not None and chat.offer.is_legacy
        self._voices = [_Voice(chat, opening.dialect) for _ in self._choices]
        self._pieces: list[list[Piece]] = [[] for _ in self._choices]

    def add(self, prompt: int, event: Event) -> bytes:
        super().add(prompt, event)
        if isinstance(event, Delta):
            voice = self._voices[event.index]
            self._pieces[event.index] += voice.hear(event)
            if event.finish_reason is not None:
                self._choices[event.index].finish_reason = voice.finish_reason(event.finish_reason)
        return b""

    def last(self, usage: Usage) -> bytes:
        return super().last(_with_reasoning(usage, self._voices, self._dialect))

    def _message(self, index: int) -> AssistantMessage:
        said = joined(self._pieces[index])
        functions = [Function(*call) for call in said.calls]
        reasoning = said.reasoning or msgspec.UNSET
        content = self._echo + said.content
        return AssistantMessage(
            content if content or not (functions or said.reasoning) else None,
            tool_calls=(
                [ToolCall(_call_id(self._dialect), function) for function in functions]
                if functions and not self._is_legacy
                else msgspec.UNSET
            ),
            function_call=functions[0] if functions and self._is_legacy else msgspec.UNSET,
            reasoning_content=reasoning,
            reasoning=reasoning,
        )


class SpokenStream(ChatStream):
    def __init__(self, completion_id: str, chat: Chat, opening: Opening) -> None:
        super().__init__(completion_id, chat, opening)
        self._dialect = opening.dialect
        self._is_legacy = chat.offer is not None and chat.offer.is_legacy
        self._voices = [_Voice(chat, opening.dialect) for _ in range(chat.request.num_choices)]

    def last(self, usage: Usage) -> bytes:
        return super().last(_with_reasoning(usage, self._voices, self._dialect))

    def _delta(self, delta: Delta) -> bytes:
        self._completion_tokens += len(delta.token_ids)
        out = self._role(delta.index) if delta.index in self._fresh else b""
        voice = self._voices[delta.index]
        pieces = voice.hear(delta)
        bodies = [self._said(piece) for piece in pieces]
        ends = delta.finish_reason is not None
        has_details = bool(delta.logprobs) or (self._with_ids and bool(delta.token_ids))
        if (ends and not (pieces and isinstance(pieces[-1], Content))) or (has_details and not bodies):
            bodies.append(b"{}")  # the end of a call stands alone, as OpenAI sends it
        for place, body in enumerate(bodies):
            is_first, is_last = place == 0, place == len(bodies) - 1
            logprobs = _encode(chat_logprobs(delta.logprobs)) if is_first and delta.logprobs else b"null"
            extra = b',"finish_reason":null'
            if ends and is_last:
                reason = voice.finish_reason(delta.finish_reason or "")
                extra = b',"finish_reason":"%b","stop_reason":%b' % (reason.encode(), _encode(delta.stop_reason))
            if self._with_ids:
                extra += b',"token_ids":%b' % _encode(delta.token_ids if is_first else [])
            out += b'%b%d,"delta":%b,"logprobs":%b%b%b' % (self._head, delta.index, body, logprobs, extra, self._end())
        return out

    def _said(self, piece: Piece) -> bytes:
        match piece:
            case Content(text):
                return b'{"content":%b}' % _encode(text)
            case Reasoning(text):
                encoded = _encode(text)
                return b'{"reasoning_content":%b,"reasoning":%b}' % (encoded, encoded)
            case CallBegun(call, name):
                function = b'{"name":%b,"arguments":""}' % _encode(name)
                if self._is_legacy:
                    return b'{"function_call":%b}' % function
                call_id = _encode(_call_id(self._dialect))
                return b'{"tool_calls":[{"index":%d,"id":%b,"type":"function","function":%b}]}' % (
                    *(call, call_id),
                    function,
                )
            case CallArguments(call, text):
                function = b'{"arguments":%b}' % _encode(text)
                if self._is_legacy:
                    return b'{"function_call":%b}' % function
                return b'{"tool_calls":[{"index":%d,"function":%b}]}' % (call, function)
