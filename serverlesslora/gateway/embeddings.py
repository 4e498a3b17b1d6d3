"""/v1/embeddings: the pooled hidden state of each input, by a function's adapter or by the bare backbone."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.adapter_id import named_by_adapter
from serverlesslora.gateway.answering import Opening
from serverlesslora.gateway.backend import Event, GenerationRequest
from serverlesslora.gateway.front import Front
from serverlesslora.gateway.openai import MAX_TOKEN_ID, PositiveCount, Usage
from serverlesslora.gateway.parsing import converted, refuse_unserved
from serverlesslora.gateway.reshaping import Renaming, Reshaped
from serverlesslora_ipc.messages import Embedding, SamplingParams, TextPrompt, TokensPrompt

_encode = msgspec.json.Encoder().encode


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's, and how the hidden states of an input become one vector: that of the last token, or their mean."""

    model: Annotated[str, Meta(min_length=1, max_length=1000)]
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveCount | None = None
    pooling: Literal["last", "mean"] | None = None


# vLLM's, with the values that ask for what is done here anyway.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "messages": ([],),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
    "normalize": (True,),
    "priority": (0,),
}


class EmbeddingItem(msgspec.Struct, frozen=True):
    index: int
    embedding: str | list[float]
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class Embeddings:
    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [Route("/v1/embeddings", self.embed, methods=["POST"])]

    async def embed(self, request: Request) -> Response:
        models = self._front.seen_by(request)
        asked = named_by_adapter(await self._front.asked(request), models)
        body, generations = parse_embedding(asked, request.state.request_id, self._front.settings.max_prompts)
        models.model(body.model)
        answer = self._front.answer(request, generations, partial(EmbeddingAnswer, body, len(generations)))
        return Reshaped(answer, Renaming(prompt="input"))


def parse_embedding(
    body: Mapping[str, Any], request_id: str, max_inputs: int
) -> tuple[EmbeddingBody, list[GenerationRequest]]:
    refuse_unserved(body, _UNSERVED)
    request = converted(body, EmbeddingBody)
    inputs = _inputs(request.input, max_inputs)
    generations = [
        GenerationRequest(
            request_id=request_id,
            model=request.model,
            prompt=prompt,
            sampling=SamplingParams(max_tokens=0),
            is_batch=len(inputs) > 1,
            pooling=request.pooling or "last",
        )
        for prompt in inputs
    ]
    return request, generations


def _inputs(value: str | list[Any], limit: int) -> list[TextPrompt | TokensPrompt]:
    """OpenAI's four shapes: text, texts, token ids, lists of token ids."""
    items = [value] if isinstance(value, str) or _is_token_ids(value) else value
    if not items:
        raise InvalidRequest("'input' must not be empty.", param="input")
    if len(items) > limit:
        raise InvalidRequest(f"{len(items)} inputs are more than the {limit} this server allows.", param="input")
    inputs: list[TextPrompt | TokensPrompt] = []
    for place, item in enumerate(items):
        if isinstance(item, str) and item:
            inputs.append(TextPrompt(item))
        elif isinstance(item, list) and _is_token_ids(item):
            inputs.append(TokensPrompt(tuple(item)))
        else:
            raise InvalidRequest(
                "'input' must be text, a list of texts, a list of token ids or a list of such lists, none of them "
                f"empty; number {place} is something else.",
                param="input",
            )
    return inputs


def _is_token_ids(items: list[Any]) -> bool:
    return bool(items) and set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= MAX_TOKEN_ID


class EmbeddingAnswer:
    def __init__(self, request: EmbeddingBody, num_inputs: int, opening: Opening) -> None:
        self._request = request
        self._vectors: list[bytes] = [b""] * num_inputs

    def add(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, Embedding):
            size, asked = len(event.vector) // 4, self._request.dimensions
            if asked is not None and asked != size:
                raise InvalidRequest(
                    f"Embeddings of '{self._request.model}' have {size} dimensions; 'dimensions' cannot be {asked}.",
                    param="dimensions",
                )
            self._vectors[prompt] = event.vector
        return b""

    def last(self, usage: Usage) -> bytes:
        assert all(self._vectors), "a generation with pooling ended without its embedding"
        shown = _base64 if self._request.encoding_format == "base64" else floats
        data = [EmbeddingItem(index, shown(vector)) for index, vector in enumerate(self._vectors)]
        tokens = usage.prompt_tokens
        return _encode(EmbeddingList(data, self._request.model, EmbeddingUsage(tokens, tokens)))


def floats(vector: bytes) -> list[float]:
    """Of float32, little endian."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()
