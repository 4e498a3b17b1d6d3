"""Text completions: one or many prompts, as text or as token ids, with the echo that evaluation harnesses rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import msgspec

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.answering import Answer, Opening
from serverlesslora.gateway.backend import Event, GenerationRequest
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.logprobs import CompletionLogprobs, PromptLogprobs, prompt_logprobs
from serverlesslora.gateway.openai import (
    MAX_TOKEN_ID,
    Alternatives,
    Choices,
    Count,
    GenerationBody,
    Usage,
    parse_body,
    sampling_params,
)
from serverlesslora.gateway.sse import event as sse_event
from serverlesslora_ipc.messages import Delta, PromptEcho, TextPrompt, TokensPrompt

_encode = msgspec.json.Encoder().encode

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    prompt: str | list[Any]
    max_tokens: Count | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Choices | None = None
    add_special_tokens: bool | None = None

    @property
    def add_specials(self) -> bool:
        return self.add_special_tokens is not False


def parse_completion(
    body: Mapping[str, Any], request_id: str, settings: HttpSettings
) -> tuple[CompletionBody, list[GenerationRequest], Callable[[Opening], Answer]]:
    """What to generate, one request per prompt, and how to make an answer of it."""
    request = parse_body(body, CompletionBody, max_n=settings.max_n)
    if request.best_of is not None and request.best_of != request.num_choices:
        raise InvalidRequest(
            "'best_of' other than 'n' is not supported.", param="best_of", code="unsupported_parameter"
        )
    prompts = _prompts(request.prompt, request.add_specials, settings.max_prompts)
    asked = request.logprobs if request.echo else None
    sampling = sampling_params(
        request,
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=max((each for each in (asked, request.prompt_logprobs) if each is not None), default=None),
    )
    wants_prompt = request.echo or request.return_token_ids or sampling.prompt_logprobs is not None
    requests = [
        GenerationRequest(
            request_id=request_id,
            model=request.model,
            prompt=prompt,
            # Prompts of one request must not share their random numbers.
            sampling=msgspec.structs.replace(sampling, seed=(sampling.seed + place) & (2**63 - 1)),
            n=request.num_choices,
            echo=bool(wants_prompt),
            is_batch=len(prompts) > 1,
        )
        for place, prompt in enumerate(prompts)
    ]
    kind = CompletionStream if request.stream else CompletionWhole
    return request, requests, partial(kind, f"cmpl-{request_id}", request, len(requests))


def _prompts(prompt: str | list[Any], add_special_tokens: bool, limit: int) -> list[TextPrompt | TokensPrompt]:
    """OpenAI's four shapes: text, texts, token ids, lists of token ids."""
    items = [prompt] if isinstance(prompt, str) or _is_token_ids(prompt) else prompt
    if not items:
        raise InvalidRequest("'prompt' must not be empty.", param="prompt")
    if len(items) > limit:
        raise InvalidRequest(f"{len(items)} prompts are more than the {limit} this server allows.", param="prompt")
    prompts: list[TextPrompt | TokensPrompt] = []
    for item in items:
        if isinstance(item, str):
            prompts.append(TextPrompt(item, add_special_tokens=add_special_tokens))
        elif isinstance(item, list) and _is_token_ids(item):
            prompts.append(TokensPrompt(tuple(item)))
        else:
            raise InvalidRequest(
                "'prompt' must be a string, a list of strings, a list of token ids or a list of such lists.",
                param="prompt",
            )
    return prompts


def _is_token_ids(items: list[Any]) -> bool:
    return bool(items) and set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= MAX_TOKEN_ID


# --- answers -----------------------------------------------------------------------------------------------------


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class _Piece:
    """Part of a choice, or all of it: text with its tokens. `offset` is where its first token begins."""

    def __init__(self, request: CompletionBody, offset: int = 0) -> None:
        self._request = request
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs = CompletionLogprobs() if request.logprobs is not None else None
        self.offset = offset
        self.prompt: PromptEcho | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def echo(self, echo: PromptEcho) -> None:
        self.prompt = echo
        if not self._request.echo:
            return
        self.text.append(echo.text)
        if self.logprobs is not None:
            # Nothing predicts the first token, so its text is what the others leave of the prompt.
            known = sum(len(each.token) for each in echo.logprobs or () if each is not None)
            first = echo.text[: max(0, len(echo.text) - known)]
            self.offset = self.logprobs.extend(echo.logprobs or (), self.offset, first)

    def delta(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if self.logprobs is not None:
            self.offset = self.logprobs.extend(delta.logprobs or (), self.offset)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    def choice(self, index: int) -> CompletionChoice:
        request, prompt = self._request, self.prompt
        with_ids = request.return_token_ids
        with_prompt_logprobs = prompt and prompt.logprobs and request.prompt_logprobs is not None
        return CompletionChoice(
            index=index,
            text="".join(self.text),
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            token_ids=self.token_ids if with_ids else msgspec.UNSET,
            prompt_logprobs=prompt_logprobs(prompt.logprobs)
            if prompt and prompt.logprobs and with_prompt_logprobs
            else msgspec.UNSET,
            prompt_token_ids=list(prompt.token_ids) if prompt and with_ids else msgspec.UNSET,
        )


class CompletionWhole:
    def __init__(self, completion_id: str, request: CompletionBody, num_prompts: int, opening: Opening) -> None:
        self._id = completion_id
        self._request = request
        self._opening = opening
        self._choices = [_Piece(request) for _ in range(num_prompts * request.num_choices)]

    def add(self, prompt: int, event: Event) -> bytes:
        first = prompt * self._request.num_choices
        if isinstance(event, PromptEcho):
            for choice in self._choices[first : first + self._request.num_choices]:
                choice.echo(event)
        elif isinstance(event, Delta):
            self._choices[first + event.index].delta(event)
        return b""

    def last(self, usage: Usage) -> bytes:
        for choice in self._choices:
            choice.finish_reason = choice.finish_reason or "length"
        return _encode(
            Completion(
                id=self._id,
                created=self._opening.created,
                model=self._request.model,
                choices=[choice.choice(index) for index, choice in enumerate(self._choices)],
                usage=usage,
            )
        )


class CompletionStream:
    """As for chat, plain chunks are put together from parts that are encoded once."""

    def __init__(self, completion_id: str, request: CompletionBody, num_prompts: int, opening: Opening) -> None:
        self._request = request
        self._prompt_tokens = opening.prompt_tokens
        self._completion_tokens = 0
        self._running_usage = request.wants_running_usage
        self._plain = request.logprobs is None and not request.return_token_ids
        self._offsets = [0] * (num_prompts * request.num_choices)
        self._envelope = b'{"id":%b,"object":"text_completion","created":%d,"model":%b,' % (
            _encode(completion_id),
            opening.created,
            _encode(request.model),
        )
        self._head = b"data: " + self._envelope + b'"choices":['
        self._tail = b'],"usage":null}\n\n' if request.wants_usage else b"]}\n\n"

    def add(self, prompt: int, event: Event) -> bytes:
        if type(event) is Delta:
            self._completion_tokens += len(event.token_ids)
            index = prompt * self._request.num_choices + event.index
            if not self._plain:
                return self._rich(index, event)
            reason = event.finish_reason
            if not event.text and reason is None:
                return b""
            ending = (
                b"null" if reason is None else b'"%b","stop_reason":%b' % (reason.encode(), _encode(event.stop_reason))
            )
            return b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b}%b' % (
                self._head,
                index,
                _encode(event.text),
                ending,
                self._end(),
            )
        if type(event) is PromptEcho:
            first = prompt * self._request.num_choices
            return b"".join(self._rich(index, event) for index in range(first, first + self._request.num_choices))
        return b""

    def _rich(self, index: int, event: Delta | PromptEcho) -> bytes:
        piece = _Piece(self._request, self._offsets[index])
        if isinstance(event, PromptEcho):
            piece.echo(event)
        else:
            piece.delta(event)
        self._offsets[index] = piece.offset
        return b"%b%b%b" % (self._head, _encode(piece.choice(index)), self._end())

    def _end(self) -> bytes:
        if self._running_usage:
            return b'],"usage":%b}\n\n' % _encode(Usage.counted(self._prompt_tokens, self._completion_tokens, 0))
        return self._tail

    def last(self, usage: Usage) -> bytes:
        if not self._request.wants_usage:
            return b""
        return sse_event(b'%b"choices":[],"usage":%b}' % (self._envelope, _encode(usage)))
