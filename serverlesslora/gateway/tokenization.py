"""vLLM's /tokenize and /detokenize: text as token ids and back, as one function's tokenizer sees it.

The gateway has no tokenizer, and a function may bring its own. So both are generations of no token with their prompt
sent back: they wait, start workers, are limited, isolated and counted as any other request, and compute nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.adapter_id import named_by_adapter
from serverlesslora.gateway.answering import Opening
from serverlesslora.gateway.backend import Event, GenerationRequest
from serverlesslora.gateway.chat import parse_chat
from serverlesslora.gateway.front import Front
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.openai import Count, Usage
from serverlesslora.gateway.parsing import converted, refuse_unserved
from serverlesslora.gateway.reshaping import Renaming, Reshaped
from serverlesslora_ipc.messages import Prompt, PromptEcho, SamplingParams, TextPrompt, TokensPrompt

_encode = msgspec.json.Encoder().encode

ModelName = Annotated[str, Meta(min_length=1, max_length=1000)]


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Either `prompt` or `messages`, with what goes with them in a chat request."""

    model: ModelName
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


# vLLM's, which would change the tokens.
_UNSERVED: dict[str, tuple[Any, ...]] = {"chat_template": (), "mm_processor_kwargs": ({},), "documents": ([],)}


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int | None
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelName
    tokens: Annotated[list[Count], Meta(min_length=1)]


class Text(msgspec.Struct, frozen=True):
    prompt: str


class Tokenization:
    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        models = self._front.seen_by(request)
        asked = named_by_adapter(await self._front.asked(request), models)
        refuse_unserved(asked, _UNSERVED)
        body = converted(asked, TokenizeBody)
        card = models.model(body.model)
        prompt = _prompt(body, request.state.request_id, self._front.settings)
        generation = _echo(request, body.model, prompt, token_strs=bool(body.return_token_strs))
        return self._front.answer(request, [generation], partial(TokensAnswer, card.max_model_len, body))

    async def detokenize(self, request: Request) -> Response:
        models = self._front.seen_by(request)
        body = converted(named_by_adapter(await self._front.asked(request), models), DetokenizeBody)
        models.model(body.model)
        generation = _echo(request, body.model, TokensPrompt(tuple(body.tokens)))
        return Reshaped(self._front.answer(request, [generation], TextAnswer), Renaming(prompt="tokens"))


def _prompt(body: TokenizeBody, request_id: str, settings: HttpSettings) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give 'prompt' or 'messages', and not both.", param="prompt")
    if body.prompt is not None:
        return TextPrompt(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise InvalidRequest(
            "A chat template writes its own special tokens; leave 'add_special_tokens' out.", param="add_special_tokens"
        )
    # What a chat request with these fields would run, so that the count is the one it is charged for.
    fields = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    chat = {"model": body.model} | {name: getattr(body, name) for name in fields}
    return parse_chat(chat, request_id, settings)[1].prompt


def _echo(request: Request, model: str, prompt: Prompt, *, token_strs: bool = False) -> GenerationRequest:
    return GenerationRequest(
        request_id=request.state.request_id,
        model=model,
        prompt=prompt,
        sampling=SamplingParams(max_tokens=0),
        echo=True,
        token_strs=token_strs,
    )


class TokensAnswer:
    def __init__(self, max_model_len: int | None, body: TokenizeBody, opening: Opening) -> None:
        self._max_model_len = max_model_len
        self._with_strs = bool(body.return_token_strs)
        self._echo: PromptEcho | None = None

    def add(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, PromptEcho):
            self._echo = event
        return b""

    def last(self, usage: Usage) -> bytes:
        assert self._echo is not None, "a generation that echoes ended without its prompt"
        ids = self._echo.token_ids
        strs = self._echo.token_strs if self._with_strs else None
        return _encode(Tokens(count=len(ids), max_model_len=self._max_model_len, tokens=ids, token_strs=strs))


class TextAnswer:
    def __init__(self, opening: Opening) -> None:
        self._text = ""

    def add(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, PromptEcho):
            self._text = event.text
        return b""

    def last(self, usage: Usage) -> bytes:
        return _encode(Text(self._text))
