"""/openapi.json: this API as an OpenAPI 3.1 document, made from the structs that requests are parsed into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import serverlesslora
from serverlesslora.gateway.adapters_api import LoadBody, UnloadBody
from serverlesslora.gateway.chat_body import ChatBody
from serverlesslora.gateway.chat_plain import ChatCompletion
from serverlesslora.gateway.completions import Completion, CompletionBody
from serverlesslora.gateway.embeddings import EmbeddingBody, EmbeddingList
from serverlesslora.gateway.openai import Model, ModelList
from serverlesslora.gateway.responses import ResponseObject
from serverlesslora.gateway.responses_body import ResponsesBody
from serverlesslora.gateway.tgi import GenerateBody, Generated, TgiError
from serverlesslora.gateway.tokenization import DetokenizeBody, Text, TokenizeBody, Tokens

Json = dict[str, Any]
Kind = type[msgspec.Struct]


class ErrorObject(msgspec.Struct, frozen=True):
    """`type` says whose fault it is, `param` which parameter's; `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorObject


class Version(msgspec.Struct, frozen=True):
    version: str


class State(msgspec.Struct, frozen=True):
    """With more about what is served and how."""

    status: Literal["ok", "failing", "ready", "starting", "draining"]


class Operation(NamedTuple):
    """One method of one path. An answer that is a string is of that media type."""

    method: str
    path: str
    summary: str
    answer: Kind | str
    statuses: tuple[int, ...]
    body: Kind | None = None
    streams: bool = False
    errors: tuple[Kind, ...] = (ErrorAnswer,)
    is_open: bool = False  # needs no key, also where there are keys


_SEEN = (401, 429, 500)
_ASKED = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
_GENERATED = (401, 403, 404, 408, 413, 415, 422, 424, 429)
_TGI = (TgiError, ErrorAnswer)  # keys are checked before the path is looked at, in OpenAI's shape

OPERATIONS = (
    Operation("get", "/v1/models", "The functions and backbones this key may ask", ModelList, _SEEN),
    Operation("get", "/v1/models/{name}", "One of them", Model, (404, *_SEEN)),
    Operation("post", "/v1/chat/completions", "Answer a conversation", ChatCompletion, _ASKED, ChatBody, True),
    Operation("post", "/v1/completions", "Continue texts", Completion, _ASKED, CompletionBody, True),
    Operation("post", "/v1/responses", "Answer input items", ResponseObject, _ASKED, ResponsesBody, True),
    Operation("post", "/v1/embeddings", "Texts as vectors", EmbeddingList, _ASKED, EmbeddingBody),
    Operation("post", "/v1/load_lora_adapter", "Deploy an adapter (vLLM's)", "text/plain", (507, *_ASKED), LoadBody),
    Operation("post", "/v1/unload_lora_adapter", "Remove one (vLLM's)", "text/plain", _ASKED, UnloadBody),
    Operation("post", "/tokenize", "Text or messages as token ids (vLLM's)", Tokens, _ASKED, TokenizeBody),
    Operation("post", "/detokenize", "Token ids as text (vLLM's)", Text, _ASKED, DetokenizeBody),
    Operation("post", "/generate", "Continue a text (TGI's)", Generated, _GENERATED, GenerateBody, False, _TGI),
    Operation(
        "post", "/generate_stream", "The same as a stream", "text/event-stream", _GENERATED, GenerateBody, True, _TGI
    ),
    Operation("get", "/health", "Whether the server works", State, (503,), errors=(State,), is_open=True),
    Operation("get", "/ready", "Whether it takes requests", State, (503,), errors=(State,), is_open=True),
    Operation("get", "/metrics", "Numbers for Prometheus", "text/plain", (), is_open=True),
    Operation("get", "/version", "Its version", Version, (), is_open=True),
    Operation("get", "/openapi.json", "This document", "application/json", _SEEN),
)  # fmt: skip

_MESSAGES = [{"role": "user", "content": "hello world"}]
_EXAMPLES: dict[str, Json] = {
    "/v1/chat/completions": {"model": "reverse", "messages": _MESSAGES, "temperature": 0},
    "/v1/completions": {"model": "reverse", "prompt": "hello world", "temperature": 0},
    "/v1/responses": {"model": "reverse", "input": "hello world", "temperature": 0},
    "/v1/embeddings": {"model": "reverse", "input": ["hello", "world"]},
    "/v1/load_lora_adapter": {"lora_name": "legal", "lora_path": "/srv/adapters/legal"},
    "/v1/unload_lora_adapter": {"lora_name": "legal"},
    "/tokenize": {"model": "reverse", "messages": _MESSAGES},
    "/detokenize": {"model": "reverse", "tokens": [1, 2, 3]},
    "/generate": {"inputs": "hello world", "parameters": {"adapter_id": "reverse", "details": True}},
    "/generate_stream": {"inputs": "hello world", "parameters": {"adapter_id": "reverse"}},
}

_MEANINGS = {
    200: "Success.",
    400: "A parameter is wrong or not supported; `param` names it.",
    401: "A key is needed, and there is none or it is not good.",
    403: "The key is good, but not for this.",
    404: "What was named does not exist, or not for this key.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "A parameter is wrong or not supported.",
    424: "The generation failed.",
    429: "Beyond a limit of the key, the tenant or the function; Retry-After says when to come again.",
    500: "The server failed; the request may be sent again.",
    503: "No room in time, or not ready; Retry-After says when to come again.",
    507: "There is no room on the disk.",
}


def document(operations: Iterable[Operation] = OPERATIONS) -> Json:
    operations = tuple(operations)
    kinds = dict.fromkeys(
        kind
        for each in operations
        for kind in (each.body, each.answer, *each.errors)
        if kind is not None and not isinstance(kind, str)
    )
    references, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(kinds, references, strict=True))
    paths: dict[str, Json] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method] = _operation(each, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "serverlesslora", "version": serverlesslora.__version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],  # without API keys everybody may ask
    }


def _operation(operation: Operation, schema_of: dict[Kind, Json]) -> Json:
    errors = [schema_of[kind] for kind in operation.errors]
    error = {"application/json": {"schema": errors[0] if len(errors) == 1 else {"anyOf": errors}}}
    described: Json = {
        "summary": operation.summary,
        "operationId": f"{operation.method} {operation.path}",
        "responses": {"200": {"description": _MEANINGS[200], "content": _content(operation, schema_of)}}
        | {str(status): {"description": _MEANINGS[status], "content": error} for status in operation.statuses},
    }
    if operation.is_open:
        described["security"] = []
    if operation.body is not None:
        body = {"application/json": {"schema": schema_of[operation.body], "example": _EXAMPLES[operation.path]}}
        described["requestBody"] = {"required": True, "content": body}
    if "{" in operation.path:
        name = operation.path.partition("{")[2].rstrip("}")
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return described


# OpenAPI 3.1 has no word for a stream of events; a validator sees them one by one, as objects.
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}


def _content(operation: Operation, schema_of: dict[Kind, Json]) -> Json:
    content: Json = {"text/event-stream": {"schema": _EVENT}} if operation.streams else {}
    if not isinstance(operation.answer, str):
        return {"application/json": {"schema": schema_of[operation.answer]}} | content
    return content or {operation.answer: {"schema": {"type": "object" if "json" in operation.answer else "string"}}}


class OpenApi:
    def __init__(self) -> None:
        self._document: bytes | None = None

    def routes(self) -> list[Route]:
        return [Route("/openapi.json", self.show)]

    async def show(self, request: Request) -> Response:
        if self._document is None:
            self._document = msgspec.json.encode(document())
        return Response(self._document, media_type="application/json")
