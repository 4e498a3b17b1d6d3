"""OpenAI's request and response shapes, and the checks that need no tokenizer.

Ranges live in the types, so that the decoder names the field that is wrong. Unknown fields are ignored; known features
that are not served are refused by name, because ignoring them would change what the answer means.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.parsing import converted, refuse_unserved
from serverlesslora.gateway.structured import FIELDS, grammar_of
from serverlesslora_ipc.messages import Finished, SamplingParams

MAX_TOKEN_ID = 2**31 - 1

Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
PositiveCount = Annotated[int, Meta(ge=1, le=MAX_TOKEN_ID)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat share. `None` always means the default."""

    model: Annotated[str, Meta(min_length=1, max_length=1000)]
    n: Choices | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_TOKEN_ID)] | None = None  # -1 and 0 are off
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None  # less overflows the logits
    logit_bias: dict[str, Bias] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=128)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Alternatives | None = None
    return_token_ids: bool | None = None
    # What the output must match: see `structured.FIELDS`.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return bool(self.wants_usage and self.stream_options and self.stream_options.continuous_usage_stats)


# Features we know and do not serve, except in bodies that have such a field, with the values that ask for nothing.
# `None` never asks for anything.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "suffix": ("",),
    "modalities": ([], ["text"]),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "structural_tag": (),
    "guided_whitespace_pattern": (),
    "guided_decoding_backend": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "thinking_token_budget": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "kv_transfer_params": (),
    "mm_processor_kwargs": ({},),
    "cache_salt": (),
    "moderation": (),
}

B = TypeVar("B", bound=GenerationBody)


def parse_body(body: Mapping[str, Any], kind: type[B], *, max_n: int) -> B:
    """A request of the given kind, or InvalidRequest naming the field."""
    served = kind.__struct_fields__
    refuse_unserved(body, {name: harmless for name, harmless in _UNSERVED.items() if name not in served})
    request = converted(body, kind)
    if request.num_choices > max_n:
        raise InvalidRequest(f"'n' is {request.n}; this server allows at most {max_n}.", param="n")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    return request


def _stop_strings(request: GenerationBody) -> tuple[str, ...]:
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _logit_bias(request: GenerationBody) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
            raise InvalidRequest("The keys of 'logit_bias' must be token ids.", param="logit_bias")
        bias[int(key)] = value
    return bias


def sampling_params(
    request: GenerationBody, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"'min_tokens' ({min_tokens}) is above the limit of {max_tokens}.", param="min_tokens")
    greedy = request.temperature == 0 or request.top_p == 0
    seed = secrets.randbits(63) if request.seed is None else request.seed & (2**63 - 1)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.0 if greedy else 1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if greedy or request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=_logit_bias(request),
        seed=seed,
        stop=_stop_strings(request),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens is not False,
        grammar=grammar_of({name: getattr(request, name) for name in FIELDS}),
    )


# --- responses ---------------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, finished: list[Finished]) -> Usage:
        return cls.counted(
            sum(each.prompt_tokens for each in finished),
            sum(each.completion_tokens for each in finished),
            sum(each.cached_tokens for each in finished),
        )

    @classmethod
    def counted(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(prompt, completion, prompt + completion, PromptTokensDetails(cached))


class Model(msgspec.Struct, frozen=True):
    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: str = "serverlesslora"
    permission: tuple[()] = ()


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"
