"""Requests of a trace as the bytes that will be sent, all before the run.

What a trace gives in words (`messages`, `prompt`) is sent as it is. What it gives as lengths alone is made up, from the
seed and the position in the trace: token ids, or words. With `hash_ids`, as in Mooncake's traces, each id is a block
of the same made-up tokens wherever it appears, so that prefixes are shared as they were in the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from serverlesslora_loadgen.client.golden import Content, Goldens
from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.trace import Message, TraceRequest

# Short, common, and one token each in most vocabularies, with the space before them.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other time new some could these two may first then do any like my now "
    "over such our man me even most made after also did many off before must well back through years where much "
    "your way down should because long each just state those people too mr how little good world make very year "
    "still see work life"
)
WORDS = tuple(_TEXT.split())
_OWN, _BLOCK = 0, 1  # two families of random numbers: of one request, of one block


def plan(
    requests: Sequence[TraceRequest], target: Target, *, seed: int = 0, goldens: Goldens | None = None
) -> list[Planned]:
    """In the order given; a request's id is its position. The same arguments give the same bytes.

    Raises WorkloadError naming the request that cannot be sent to this target.
    """
    if goldens is not None and target.temperature != 0:
        raise WorkloadError(
            f"answers at temperature {target.temperature:g} differ from each other; golden ones need temperature 0"
        )
    made_up = MadeUp(requests, target, seed)
    common = _common_fields(target, seed)
    return [_planned(i, request, target, made_up, common, goldens) for i, request in enumerate(requests)]


def _planned(
    number: int,
    request: TraceRequest,
    target: Target,
    made_up: MadeUp,
    common: dict[str, Any],
    goldens: Goldens | None,
) -> Planned:
    if not request.model:
        raise WorkloadError(
            f"request {number} of the trace names no adapter; say which one is asked (--model or --map)"
        )
    content = _content(number, request, target, made_up)
    tokens = max(1, request.output_length)  # 0 is refused by servers
    body: dict[str, Any] = {"model": request.model}
    if target.endpoint == "chat":
        body["messages"] = content
    else:
        body["prompt"] = content
    body["max_tokens"] = tokens
    if target.ignore_eos:
        body["min_tokens"] = tokens
    body |= common
    headers = {}
    if target.deadline_header is not None and request.deadline_ms is not None:
        headers[target.deadline_header] = str(round(request.deadline_ms))
    return Planned(
        id=number,
        at_s=request.timestamp / 1000,
        model=request.model,
        class_=request.class_,
        body=msgspec.json.encode(body),
        input_tokens=max(1, request.input_length),
        output_tokens=tokens,
        headers=headers,
        deadline_s=None if request.deadline_ms is None else request.deadline_ms / 1000,
        golden=None if goldens is None else goldens.text(request.model, content, tokens),
    )


def _common_fields(target: Target, seed: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": target.temperature,
        "seed": seed,
    }
    if target.ignore_eos:
        fields["ignore_eos"] = True
    if target.token_counts:
        fields["return_token_ids"] = True
    return fields


def _content(number: int, request: TraceRequest, target: Target, made_up: MadeUp) -> Content:
    if target.endpoint == "chat":
        if request.messages is not None:
            return request.messages
        text = request.prompt if request.prompt is not None else made_up.text(number, request)
        return (Message("user", text),)
    if request.prompt is not None:
        return request.prompt
    if request.messages is not None:
        raise WorkloadError(f"request {number} of the trace is a conversation; only the chat endpoint takes those")
    return made_up.ids(number, request) if target.prompt == "ids" else made_up.text(number, request)


class MadeUp:
    """Prompts of the right length for requests that only have a length."""

    def __init__(self, requests: Sequence[TraceRequest], target: Target, seed: int) -> None:
        low, high = target.token_ids
        if not 0 <= low < high:
            raise WorkloadError(f"token ids from {low} up to {high} are none; give a range such as 300 4000")
        if not 0 < target.tokens_per_word < math.inf:
            raise WorkloadError(f"{target.tokens_per_word:g} tokens per word: give a finite number, more than 0")
        self._range, self._seed = (low, high), seed
        self._tokens_per_word = target.tokens_per_word
        self._block = block_length(requests)
        self._blocks: dict[tuple[str, int], list[Any]] = {}

    def ids(self, number: int, request: TraceRequest) -> tuple[int, ...]:
        low, high = self._range
        return tuple(
            self._pieces(
                "ids",
                number,
                request,
                max(1, request.input_length),
                self._block,
                lambda random, n: random.integers(low, high, n).tolist(),
            )
        )

    def text(self, number: int, request: TraceRequest) -> str:
        """Its length in tokens depends on the server's tokenizer; `tokens_per_word` is what is believed of it."""
        words = self._pieces(
            "text",
            number,
            request,
            max(1, round(request.input_length / self._tokens_per_word)),
            self._block / self._tokens_per_word,
            lambda random, n: [WORDS[i] for i in random.integers(0, len(WORDS), n)],
        )
        return " ".join(words)

    def _pieces(
        self,
        kind: str,
        number: int,
        request: TraceRequest,
        length: int,
        block: float,
        draw: Callable[[np.random.Generator, int], list[Any]],
    ) -> list[Any]:
        pieces: list[Any] = []
        longest = int(block) + 2
        for position, hash_id in enumerate(request.hash_ids or ()):
            key = (kind, hash_id)
            if key not in self._blocks:
                # Ids may be hashes of 64 bits and more, signed or not.
                random = np.random.default_rng([self._seed, _BLOCK, hash_id & (2**64 - 1)])
                self._blocks[key] = draw(random, longest)
            size = round((position + 1) * block) - round(position * block)
            pieces += self._blocks[key][:size]
            if len(pieces) >= length:
                return pieces[:length]
        own = np.random.default_rng([self._seed, _OWN, number])
        return pieces + draw(own, length - len(pieces))


def block_length(requests: Sequence[TraceRequest]) -> float:
    """Tokens that one hash id stands for, in the lengths as they are here.

    Traces cut prompts into blocks of one length and leave the last one short, so the longest tokens per id comes
    nearest to it; when lengths were scaled, it was scaled with them, and need not be whole.
    """
    ratios = [request.input_length / len(request.hash_ids) for request in requests if request.hash_ids]
    return max(ratios, default=0.0)
