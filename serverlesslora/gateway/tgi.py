"""Text Generation Inference's POST /generate and /generate_stream, with LoRAX's `adapter_id`, for clients of those."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serverlesslora.errors import InvalidRequest, ServerlessLoraError
from serverlesslora.gateway.adapter_id import UNSERVED_ADAPTERS, function_named
from serverlesslora.gateway.answering import Opening
from serverlesslora.gateway.backend import Event, GenerationRequest, Models
from serverlesslora.gateway.front import Front
from serverlesslora.gateway.http_errors import answer_for
from serverlesslora.gateway.openai import PositiveCount, StopString, Usage
from serverlesslora.gateway.parsing import converted, refuse_unserved
from serverlesslora.gateway.reshaping import Refusal, Reshaped
from serverlesslora.gateway.sse import event as sse_event
from serverlesslora_ipc.messages import ChatPrompt, Delta, Prompt, SamplingParams, TextPrompt

_encode = msgspec.json.Encoder().encode

DEFAULT_MAX_NEW_TOKENS = 20  # TGI's

_UNSERVED: dict[str, tuple[Any, ...]] = UNSERVED_ADAPTERS | {
    "best_of": (1,),
    "typical_p": (1,),
    "truncate": (),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "return_k_alternatives": (0,),
    "top_n_tokens": (0,),
    "response_format": (),
    "schema": (),
    "grammar": (),
}


# --- what may be asked -------------------------------------------------------------------------------------------


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    adapter_id: str | None = None
    adapter_source: str | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Meta(gt=0, le=2)] | None = None
    top_k: Annotated[int, Meta(gt=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    max_new_tokens: PositiveCount | None = None
    ignore_eos_token: bool | None = None
    stop: Annotated[list[StopString], Meta(max_length=4)] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    apply_chat_template: bool | None = None

    @property
    def is_greedy(self) -> bool:
        """As there: anything that shapes the distribution asks to sample from it."""
        asked = (self.temperature not in (None, 1.0), self.top_k, self.top_p not in (None, 1.0))
        return not (self.do_sample or any(asked))


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    inputs: Annotated[str, Meta(min_length=1)]
    parameters: Parameters | None = None
    stream: bool | None = None

    @property
    def chosen(self) -> Parameters:
        return self.parameters or Parameters()


def parse_generate(
    body: Mapping[str, Any], request_id: str, models: Models, *, stream: bool
) -> tuple[GenerateBody, GenerationRequest]:
    if isinstance(parameters := body.get("parameters"), dict):
        refuse_unserved(parameters, _UNSERVED, "parameters.")
    request = converted(body, GenerateBody)
    asked = request.chosen
    model = function_named(asked.adapter_id, models, "parameters.adapter_id") if asked.adapter_id else _backbone(models)
    prompt: Prompt = TextPrompt(request.inputs)
    if asked.apply_chat_template:
        prompt = ChatPrompt([{"role": "user", "content": request.inputs}])
    sampling = SamplingParams(
        max_tokens=asked.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        temperature=0.0 if asked.is_greedy else asked.temperature or 1.0,
        top_p=1.0 if asked.is_greedy else asked.top_p or 1.0,
        top_k=0 if asked.is_greedy else asked.top_k or 0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        stop=tuple(asked.stop or ()),
        include_stop_str_in_output=True,  # as there
        ignore_eos=bool(asked.ignore_eos_token),
        logprobs=0 if asked.details or stream else None,
    )
    return request, GenerationRequest(request_id, model, prompt, sampling)


def _backbone(models: Models) -> str:
    names = [card.id for card in models.models() if card.parent is None]
    if len(names) != 1:
        raise InvalidRequest("Name a function with 'parameters.adapter_id'.", param="parameters.adapter_id")
    return names[0]


# --- answers -----------------------------------------------------------------------------------------------------

Ending = Literal["length", "eos_token", "stop_sequence"]


class Token(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float | None
    special: bool


class Details(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: Ending
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: tuple[()] = ()
    tokens: list[Token]


class StreamDetails(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: Ending
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class Generated(msgspec.Struct, frozen=True, omit_defaults=True):
    generated_text: str
    details: Details | None = None


class StreamToken(msgspec.Struct, frozen=True):
    token: Token
    generated_text: str | None
    details: StreamDetails | None


class _Output:
    """What has been generated so far."""

    def __init__(self, request: GenerateBody, generation: GenerationRequest) -> None:
        sampling = generation.sampling
        self.seed = None if sampling.temperature == 0 else sampling.seed
        self.text: list[str] = [request.inputs] if request.chosen.return_full_text else []
        self.tokens: list[Token] = []
        self.num_tokens = 0
        self.ending: Ending = "length"

    def add(self, delta: Delta) -> list[Token]:
        """The text of a step belongs to its last token: those before it completed no character."""
        ends_at_eos = delta.finish_reason == "stop" and delta.stop_reason is None
        if delta.finish_reason == "stop":
            self.ending = "eos_token" if ends_at_eos else "stop_sequence"
        self.text.append(delta.text)
        self.num_tokens += len(delta.token_ids)
        last = len(delta.token_ids) - 1
        scores = [each.logprob for each in delta.logprobs or ()]
        return [
            Token(
                token_id,
                delta.text if place == last else "",
                scores[place] if place < len(scores) else None,
                ends_at_eos and place == last,
            )
            for place, token_id in enumerate(delta.token_ids)
        ]


class Whole:
    def __init__(self, request: GenerateBody, generation: GenerationRequest, opening: Opening) -> None:
        self._output = _Output(request, generation)
        self._with_details = bool(request.chosen.details)

    def add(self, prompt: int, event: Event) -> bytes:
        if isinstance(event, Delta):
            self._output.tokens += self._output.add(event)
        return b""

    def last(self, usage: Usage) -> bytes:
        output, details = self._output, None
        if self._with_details:
            details = Details(
                finish_reason=output.ending,
                prompt_tokens=usage.prompt_tokens,
                generated_tokens=usage.completion_tokens,
                seed=output.seed,
                tokens=output.tokens,
            )
        return _encode(Generated("".join(output.text), details))


class Stream:
    """One event per token; that of the last one has the whole text."""

    def __init__(self, request: GenerateBody, generation: GenerationRequest, opening: Opening) -> None:
        self._output = _Output(request, generation)
        self._prompt_tokens = opening.prompt_tokens

    def add(self, prompt: int, event: Event) -> bytes:
        if not isinstance(event, Delta):
            return b""
        output = self._output
        events = [StreamToken(token, None, None) for token in output.add(event)]
        if event.finish_reason is not None:
            details = StreamDetails(
                finish_reason=output.ending,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=output.num_tokens,
                seed=output.seed,
            )
            last = events.pop().token if events else Token(0, event.text, None, True)
            events.append(StreamToken(last, "".join(output.text), details))
        return b"".join(sse_event(_encode(each)) for each in events)

    def last(self, usage: Usage) -> bytes:
        return b""


# --- errors ------------------------------------------------------------------------------------------------------


class TgiError(msgspec.Struct, frozen=True):
    error: str
    error_type: str


# Our status: theirs, and their name for it.
_ERRORS = {
    400: (422, "validation"),
    404: (404, "validation"),
    429: (429, "overloaded"),
    500: (424, "generation"),
    503: (429, "overloaded"),
}


class TgiShape:
    def refused(self, status: int, refusal: Refusal) -> tuple[int, bytes]:
        status, kind = _ERRORS.get(status, (status, "validation" if status < 500 else "generation"))
        return status, _encode(TgiError(refusal.message, kind))

    def failed(self, refusal: Refusal) -> bytes:
        return sse_event(_encode(TgiError(refusal.message, "generation")))


class TextGeneration:
    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [
            Route("/generate", self.generate, methods=["POST"]),
            Route("/generate_stream", self.generate_stream, methods=["POST"]),
        ]

    async def generate(self, request: Request) -> Response:
        return Reshaped(await self._answer(request, stream=False), TgiShape())

    async def generate_stream(self, request: Request) -> Response:
        return Reshaped(await self._answer(request, stream=True), TgiShape())

    async def _answer(self, request: Request, *, stream: bool) -> Response:
        try:
            body = await self._front.asked(request)
            models = self._front.seen_by(request)
            parsed, generation = parse_generate(body, request.state.request_id, models, stream=stream)
            kind = Stream if stream else Whole
            return self._front.answer(request, [generation], partial(kind, parsed, generation), stream=stream)
        except (ServerlessLoraError, HTTPException) as error:
            return answer_for(error).response()
