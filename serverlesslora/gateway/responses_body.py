"""What a body of OpenAI's Responses API may say, and the chat request it means.

The stateless part of that API: everything said before comes with the request, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway import structured
from serverlesslora.gateway.openai import PositiveCount, Probability, Temperature
from serverlesslora.gateway.parsing import converted, refuse_unserved
from serverlesslora.gateway.reshaping import renamed

Json = dict[str, Any]

_UNSERVED: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "include": ([],),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "context_management": ([],),
    "moderation": (),
    "stream_options": ({}, {"include_obfuscation": False}),
    # What chat requests call otherwise, or have and these do not.
    **dict.fromkeys(("messages", "max_tokens", "max_completion_tokens", "reasoning_effort", "functions"), ()),
    **dict.fromkeys(structured.FIELDS, ()),
    "n": (1,),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
}
_UNSERVED_REASONING: dict[str, tuple[Any, ...]] = {"summary": (), "generate_summary": ()}
_UNSERVED_TEXT: dict[str, tuple[Any, ...]] = {"verbosity": ("medium",)}

# Fields that mean the same in a chat request; from the second line on they are extensions of this API.
_SAME = (
    *("model", "temperature", "top_p", "stream", "parallel_tool_calls", "user", "metadata"),
    *("top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens", "chat_template_kwargs"),
    *("adapter_id", "adapter_source", "merged_adapters", "api_token"),
)

# What a chat request calls it, and what it is called here.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def name_here(param: str | None) -> str | None:
    """A parameter of the chat request by its name here, where a tool is not a function in a tool."""
    return renamed(None if param is None else param.replace("].function.", "]."), NAMES)


class FunctionTool(msgspec.Struct, frozen=True):
    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: Json | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1, max_length=1000)]
    input: str | Annotated[list[Json], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: PositiveCount | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    stream: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None


def parse_responses(body: Mapping[str, Any]) -> tuple[ResponsesBody, Json]:
    """The request, and the body of the chat request that answers it."""
    refuse_unserved(body, _UNSERVED)
    for name, unserved in (("reasoning", _UNSERVED_REASONING), ("text", _UNSERVED_TEXT)):
        if isinstance(part := body.get(name), dict):
            refuse_unserved(part, unserved, f"{name}.")
    tools = body.get("tools")
    for place, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and tool.get("type", "function") != "function":
            raise InvalidRequest(
                f"Tools of type '{tool['type']}' run on OpenAI's servers; only functions are supported here.",
                param=f"tools[{place}].type",
                code="unsupported_parameter",
            )
    request = converted(body, ResponsesBody)
    chat = {name: body[name] for name in _SAME if name in body}
    chat["messages"] = _messages(request)
    if request.max_output_tokens is not None:
        chat["max_completion_tokens"] = request.max_output_tokens
    if request.tools:
        chat["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(request.tool_choice)
    if request.text is not None and request.text.format is not None:
        chat["response_format"] = _response_format(request.text.format)
    if request.reasoning is not None and request.reasoning.effort is not None:
        chat["reasoning_effort"] = request.reasoning.effort
    return request, chat


def _tool(tool: FunctionTool) -> Json:
    function: Json = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: str | Json) -> str | Json:
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise InvalidRequest(
            "'tool_choice' must be 'auto', 'none', 'required' or a function with its name.", param="tool_choice"
        )
    return {"type": "function", "function": {"name": choice["name"]}}


def _response_format(form: Json) -> Json:
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


# --- input items as messages -------------------------------------------------------------------------------------


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Message(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_Part]


class _Call(msgspec.Struct, frozen=True):
    call_id: str
    name: str
    arguments: str


class _CallOutput(msgspec.Struct, frozen=True):
    call_id: str
    output: str | list[_Part]


class _Reasoning(msgspec.Struct, frozen=True):
    content: list[_Part] | None = None


_KINDS: dict[str, type[_Message | _Call | _CallOutput | _Reasoning]] = {
    "message": _Message,
    "function_call": _Call,
    "function_call_output": _CallOutput,
    "reasoning": _Reasoning,
}
_TEXTS = ("input_text", "output_text", "text", "reasoning_text")


def _messages(request: ResponsesBody) -> list[Json]:
    messages: list[Json] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    turn: Json | None = None  # what the assistant said in one go comes in several items and is one message
    for place, item in enumerate(request.input):
        param = f"input[{place}]"
        match _item(item, param):
            case _Message(role="assistant", content=content):
                if turn is None or "content" in turn or "tool_calls" in turn:
                    messages.append(turn := {"role": "assistant"})
                turn["content"] = _text(content, f"{param}.content")
            case _Message(role=role, content=content):
                turn = None
                messages.append({"role": role, "content": _text(content, f"{param}.content")})
            case _Call(call_id, name, arguments):
                if turn is None:
                    messages.append(turn := {"role": "assistant"})
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                turn.setdefault("tool_calls", []).append(call)
            case _CallOutput(call_id, output):
                turn = None
                text = _text(output, f"{param}.output")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case _Reasoning(content):
                if content:
                    messages.append(turn := {"role": "assistant"})
                    turn["reasoning_content"] = _text(content, f"{param}.content")
    if messages and messages[-1].keys() <= {"role", "reasoning_content"}:
        messages.pop()  # thoughts that led to nothing
    if not messages:
        raise InvalidRequest("'input' has nothing to answer.", param="input")
    return messages


def _item(item: Json, param: str) -> _Message | _Call | _CallOutput | _Reasoning:
    kind = _KINDS.get(str(item.get("type", "message")))
    if kind is None:
        raise InvalidRequest(
            f"Input items of type '{str(item['type'])[:100]}' are not supported by this server.", param=f"{param}.type"
        )
    try:
        return converted(item, kind)
    except InvalidRequest as error:
        where = f"{param}.{error.param}" if error.param else param
        raise InvalidRequest(error.message, param=where, code=error.code) from None


def _text(content: str | list[_Part], param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXTS else None
        if text is None:
            raise InvalidRequest("Only parts that are text are supported.", param=param)
        texts.append(text)
    return "\n".join(texts)
