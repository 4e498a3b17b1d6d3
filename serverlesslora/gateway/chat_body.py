"""What a chat request may say, and the generation it becomes. Rendering the template is the worker's business.

Stop strings are looked for in all a model writes, calls and reasoning included, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.openai import Alternatives, GenerationBody, PositiveCount, parse_body, sampling_params
from serverlesslora.gateway.tools.offer import (
    FunctionCallChoice,
    Functions,
    Offer,
    ToolChoice,
    Tools,
    legacy_offer,
    offer_of,
)
from serverlesslora_ipc.messages import ChatPrompt, SamplingParams

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """OpenAI's older form of a call."""

    name: str
    arguments: str


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Meta(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None  # of an assistant; `reasoning` is what vLLM calls it now
    reasoning: str | None = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_tokens: PositiveCount | None = None
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionCallChoice | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None


class Chat(NamedTuple):
    """A request as its answer needs it."""

    request: ChatBody
    generation: GenerationRequest
    echo: str  # text to show before the answer
    offer: Offer | None  # what the model may call


# What the worker itself passes to the template.
_OWN_KWARGS = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


def chat_of(body: Mapping[str, Any], request_id: str, settings: HttpSettings) -> Chat:
    request = parse_body(body, ChatBody, max_n=settings.max_n)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    continues = bool(request.continue_final_message)
    add_generation_prompt = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    if continues and add_generation_prompt:
        raise InvalidRequest(
            "'add_generation_prompt' and 'continue_final_message' cannot both be true.", param="continue_final_message"
        )
    offer = _offer(request)
    prompt = ChatPrompt(
        messages=[_flat(message, place) for place, message in enumerate(request.messages)],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continues,
        tools=None if offer is None else list(offer.tools),
        template_kwargs=_template_kwargs(request),
    )
    _check_sendable(prompt)
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    generation = GenerationRequest(
        request_id=request_id,
        model=request.model,
        prompt=prompt,
        sampling=_constrained(
            sampling_params(
                request,
                max_tokens=limit,
                logprobs=(request.top_logprobs or 0) if request.logprobs else None,
                prompt_logprobs=request.prompt_logprobs,
            ),
            offer,
        ),
        n=request.num_choices,
        echo=request.prompt_logprobs is not None or bool(request.return_token_ids),
    )
    final = prompt.messages[-1]
    echo = final["content"] if request.echo and final["role"] == "assistant" else ""
    return Chat(request, generation, echo, offer)


def _offer(request: ChatBody) -> Offer | None:
    if request.tools and request.functions:
        raise InvalidRequest("'functions' is the older name of 'tools'; give one of them.", param="functions")
    if request.functions or request.function_call is not None:
        return legacy_offer(request.functions, request.function_call)
    return offer_of(request.tools, request.tool_choice, parallel=request.parallel_tool_calls is not False)


def _constrained(sampling: SamplingParams, offer: Offer | None) -> SamplingParams:
    if offer is None:
        return sampling
    grammar, own = offer.grammar, sampling.grammar
    if own is not None:
        param = (own.param or "response_format").split(".")[0]
        if own.kind != "json_schema":
            raise InvalidRequest(
                "Only an answer in JSON can have calls beside it. Leave this out, or set 'tool_choice' to \"none\".",
                param=param,
                code="unsupported_parameter",
            )
        if not offer.is_certain:  # a call that must come leaves no answer to be held to the schema
            grammar = offer.grammar_with(msgspec.json.decode(own.text), (grammar and grammar.param) or param)
    return msgspec.structs.replace(sampling, grammar=grammar)


def _template_kwargs(request: ChatBody) -> dict[str, Any]:
    """Variables of the template; the worker refuses those that it does not read."""
    kwargs = request.chat_template_kwargs or {}
    if own := _OWN_KWARGS.intersection(kwargs):
        raise InvalidRequest(f"'{min(own)}' cannot be set this way.", param="chat_template_kwargs")
    return kwargs if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort} | kwargs


def _flat(message: ChatMessage, place: int) -> dict[str, Any]:
    """The message as a template sees it: text only, `developer` as the older word `system`, arguments as objects."""
    param = f"messages[{place}]"
    flat: dict[str, Any] = {"role": _ROLES.get(message.role, message.role)}
    if isinstance(message.content, list):
        flat["content"] = "\n".join(_text(part, param) for part in message.content)
    elif message.content is not None:
        flat["content"] = message.content
    elif message.role in ("assistant", "function"):
        flat["content"] = ""
    else:
        raise InvalidRequest(f"A message of role '{message.role}' must have content.", param=f"{param}.content")
    if message.name is not None:
        flat["name"] = message.name
    if message.tool_call_id is not None:
        flat["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        flat["tool_calls"] = [_tool_call(call, f"{param}.tool_calls") for call in message.tool_calls]
    if message.function_call is not None:
        called = {"name": message.function_call.name, "arguments": message.function_call.arguments}
        call = {"id": _OLD_CALL_ID, "type": "function", "function": called}
        flat["tool_calls"] = [_tool_call(call, f"{param}.function_call")]
    if message.role == "function":
        flat["tool_call_id"] = _OLD_CALL_ID
    if reasoning := message.reasoning_content or message.reasoning:
        flat["reasoning_content"] = reasoning
    return flat


# The words that templates know. A call in the older form has no id; some templates insist on one of nine characters.
_ROLES = {"developer": "system", "function": "tool"}
_OLD_CALL_ID = "function0"


def _text(part: ContentPart, param: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if text is None:
        raise InvalidRequest("Only content parts of type 'text' are supported.", param=f"{param}.content")
    return text


def _tool_call(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("Every tool call must have a function with a name.", param=param)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise InvalidRequest("The arguments of a tool call must be JSON.", param=param) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _check_sendable(prompt: ChatPrompt) -> None:
    """Free-form parts may hold integers that no frame can carry."""
    if prompt.tools or prompt.template_kwargs or any("tool_calls" in message for message in prompt.messages):
        try:
            msgspec.msgpack.encode(prompt)
        except (OverflowError, RecursionError):
            raise InvalidRequest(
                "A number in the messages is out of range, or they are nested too deeply.", param="messages"
            ) from None
