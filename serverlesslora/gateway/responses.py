"""OpenAI's Responses API, /v1/responses: a chat request in other words, whole or as a stream of typed events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.adapter_id import named_by_adapter
from serverlesslora.gateway.answering import Answer, Opening
from serverlesslora.gateway.backend import Event
from serverlesslora.gateway.chat import parse_chat
from serverlesslora.gateway.front import Front
from serverlesslora.gateway.http_errors import answer_for
from serverlesslora.gateway.openai import Usage
from serverlesslora.gateway.reshaping import Refusal, Renaming, Reshaped
from serverlesslora.gateway.responses_body import NAMES, FunctionTool, ResponsesBody, name_here, parse_responses
from serverlesslora.gateway.responses_output import Event as OutputEvent
from serverlesslora.gateway.responses_output import Output, OutputItem, Status

_encode = msgspec.json.Encoder().encode

# The chat stream is what the answer is made of, also of one that is sent whole.
_AS_CHUNKS = {"stream": True, "stream_options": {"include_usage": True}}


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Incomplete(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(msgspec.Struct, frozen=True):
    message: str
    code: Literal["server_error"] = "server_error"


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False


class ResponsesAnswer:
    """The whole answer is what the last event of the stream has inside."""

    def __init__(self, request_id: str, request: ResponsesBody, chat: Answer, opening: Opening) -> None:
        self._request = request
        self._chat = chat
        self._id = f"resp_{request_id}"
        self._created = opening.created
        self._output = Output(request_id)
        self._number = 0

    def add(self, prompt: int, event: Event) -> bytes:
        return self._begun() + self._told(self._output.read(self._chat.add(prompt, event)))

    def last(self, usage: Usage) -> bytes:
        out = self._begun() + self._told(self._output.read(self._chat.last(usage)))
        status: Status = "incomplete" if self._output.is_cut else "completed"
        out += self._told(self._output.close(status))
        response = self._response(status, usage)
        return out + self._event(f"response.{status}", response=response) if self._request.stream else _encode(response)

    def failed(self, reason: str) -> bytes:
        out = self._told(self._output.close("incomplete"))
        return out + self._event("response.failed", response=self._response("failed", error=ResponseError(reason)))

    def _begun(self) -> bytes:
        if self._number or not self._request.stream:
            return b""
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _told(self, events: Iterable[OutputEvent]) -> bytes:
        return b"".join([self._event(kind, **fields) for kind, fields in events])

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._request.stream:
            return b""
        body = _encode({"type": kind, "sequence_number": self._number} | fields)
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    def _response(
        self, status: Status, usage: Usage | None = None, error: ResponseError | None = None
    ) -> ResponseObject:
        request = self._request
        reasoning = request.reasoning
        form = request.text.format if request.text is not None else None
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            error=error,
            incomplete_details=Incomplete() if status == "incomplete" else None,
            model=request.model,
            output=self._output.items,
            usage=None if usage is None else self._usage(usage),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": reasoning.effort if reasoning is not None else None, "summary": None},
            temperature=1.0 if request.temperature is None else request.temperature,
            text={"format": form or {"type": "text"}},
            tool_choice="auto" if request.tool_choice is None else request.tool_choice,
            tools=request.tools or [],
            top_p=1.0 if request.top_p is None else request.top_p,
        )

    def _usage(self, usage: Usage) -> ResponsesUsage:
        return ResponsesUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(self._output.reasoning_tokens),
            usage.total_tokens,
        )


class ResponsesShape(Renaming):
    """Errors name the parameters as they are called here; a stream that breaks ends with the response as it is."""

    def __init__(self, make_answer: Callable[[Opening], ResponsesAnswer]) -> None:
        super().__init__(**NAMES)
        self._make_answer = make_answer
        self._answer: ResponsesAnswer | None = None

    def answer(self, opening: Opening) -> Answer:
        self._answer = self._make_answer(opening)
        return self._answer

    def refused(self, status: int, refusal: Refusal) -> tuple[int, bytes]:
        return super().refused(status, msgspec.structs.replace(refusal, param=name_here(refusal.param)))

    def failed(self, refusal: Refusal) -> bytes:
        if self._answer is not None:
            return self._answer.failed(refusal.message)
        error = {"type": "error", "sequence_number": 0} | {
            "code": refusal.code,
            "message": refusal.message,
            "param": name_here(refusal.param),
        }
        return b"event: error\ndata: %b\n\n" % _encode(error)


class Responses:
    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [Route("/v1/responses", self.respond, methods=["POST"])]

    async def respond(self, request: Request) -> Response:
        models = self._front.seen_by(request)
        body = named_by_adapter(await self._front.asked(request), models)
        parsed, chat_body = parse_responses(body)
        request_id = request.state.request_id
        try:
            chat, generation, make_chat = parse_chat(chat_body | _AS_CHUNKS, request_id, self._front.settings)
            models.model(chat.model)
        except ServerlessLoraError as error:
            error.param = name_here(error.param)
            return answer_for(error).response()
        shape = ResponsesShape(lambda opening: ResponsesAnswer(request_id, parsed, make_chat(opening), opening))
        inner = self._front.answer(request, [generation], shape.answer, stream=bool(parsed.stream))
        return Reshaped(inner, shape)
