"""The HTTP application: routes, what their endpoints share, and the order to stop taking requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import serverlesslora
from serverlesslora.errors import ServerlessLoraError, Unavailable
from serverlesslora.gateway.adapter_id import named_by_adapter
from serverlesslora.gateway.adapters_api import AdapterApi
from serverlesslora.gateway.answering import Answer, GenerationResponse, Opening
from serverlesslora.gateway.backend import Backend, GenerationRequest, ModelCard, Models, estimated_tokens
from serverlesslora.gateway.chat import parse_chat
from serverlesslora.gateway.completions import parse_completion
from serverlesslora.gateway.door import Door, check_admin, visit_of
from serverlesslora.gateway.embeddings import Embeddings
from serverlesslora.gateway.envelope import Envelope
from serverlesslora.gateway.http_errors import answer_for
from serverlesslora.gateway.journal import Journal, current_journal
from serverlesslora.gateway.limits import HttpSettings, objective_of, read_json
from serverlesslora.gateway.live import LivePage
from serverlesslora.gateway.metrics import Metrics
from serverlesslora.gateway.openai import Model, ModelList
from serverlesslora.gateway.openapi import OpenApi
from serverlesslora.gateway.quotas import Quotas, Stay
from serverlesslora.gateway.responses import Responses
from serverlesslora.gateway.tenant_view import TenantView
from serverlesslora.gateway.tgi import TextGeneration
from serverlesslora.gateway.tokenization import Tokenization
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.rate_limits import Limiter

_encode = msgspec.json.Encoder(enc_hook=str).encode


class Gateway:
    """The endpoints and what they share."""

    def __init__(self, backend: Backend, settings: HttpSettings, keys: Keyring | None = None) -> None:
        self.backend = backend
        self.keys = keys
        self.settings = settings
        self.metrics = Metrics(backend.stats, settings.metrics_functions)
        backend.watch(self.metrics)
        self.adapters = AdapterApi(backend)
        self.draining = False
        self.in_flight = 0
        self.quotas = Quotas({})
        self.on_finished: Callable[[Journal], None] = lambda journal: None  # told of every request when it is over

    def drain(self) -> None:
        """From now on /ready says no and new generations are refused; those under way go on."""
        self.draining = True

    # --- generation ---

    async def chat(self, request: Request) -> Response:
        body = named_by_adapter(await self.asked(request), self.seen_by(request))
        parsed, generation, answer = parse_chat(body, request.state.request_id, self.settings)
        self.seen_by(request).model(parsed.model)
        return self.answer(request, [generation], answer, stream=bool(parsed.stream))

    async def complete(self, request: Request) -> Response:
        body = named_by_adapter(await self.asked(request), self.seen_by(request))
        parsed, generations, answer = parse_completion(body, request.state.request_id, self.settings)
        self.seen_by(request).model(parsed.model)
        return self.answer(request, generations, answer, stream=bool(parsed.stream))

    # --- what other families of endpoints ask for: see `front` ---

    async def asked(self, request: Request) -> dict[str, Any]:
        if self.draining:
            raise Unavailable("The server is shutting down.", retry_after_s=5)
        body = await read_json(request, self.settings)
        request.state.user = user_of(body)
        return body

    def seen_by(self, request: Request) -> Models:
        visit = visit_of(request)
        return self.backend if visit is None else TenantView(self.backend, visit.key.grant)

    def answer(
        self,
        request: Request,
        generations: Sequence[GenerationRequest],
        make_answer: Callable[[Opening], Answer],
        *,
        stream: bool = False,
    ) -> Response:
        if (slo_ttft_s := objective_of(request)) is not None:
            generations = [msgspec.structs.replace(each, slo_ttft_s=slo_ttft_s) for each in generations]
        if (user := getattr(request.state, "user", None)) is not None:
            generations = [msgspec.structs.replace(each, user=user) for each in generations]
        tokens = sum(estimated_tokens(each.prompt) for each in generations)
        if (visit := visit_of(request)) is not None:
            visit.expect(tokens)
        card = self.seen_by(request).model(generations[0].model)
        stay = self._admit(request, card)
        stay.expect(tokens)

        def used(tokens: int) -> None:
            stay.used(tokens)
            if visit is not None:
                visit.used(tokens)

        self.metrics.asked(card.name, generations)
        return GenerationResponse(
            self.seen_by(request),
            generations,
            make_answer,
            stream=stream,
            metrics=self.metrics,
            settings=self.settings,
            on_end=used,
        )

    def _admit(self, request: Request, card: ModelCard) -> Stay:
        """What it takes of its tenant's and its function's limits; `Envelope` gives it back, however this ends."""
        current_journal().asks(card)
        visit = visit_of(request)
        stay = self.quotas.enter(card, key_tenant=visit.key.grant.tenant if visit else None)
        request.state.stay = stay
        return stay

    # --- models and adapters ---

    async def models(self, request: Request) -> Response:
        return _json(ModelList([_model(card) for card in self.seen_by(request).models()]))

    async def model(self, request: Request) -> Response:
        return _json(_model(self.seen_by(request).model(request.path_params["name"])))

    async def load_adapter(self, request: Request) -> Response:
        visit = check_admin(request)
        tenant = None if visit is None else visit.key.grant.tenant
        return PlainTextResponse(await self.adapters.load(await read_json(request, self.settings), tenant))

    async def unload_adapter(self, request: Request) -> Response:
        check_admin(request)
        return PlainTextResponse(await self.adapters.unload(await read_json(request, self.settings)))

    # --- operation ---

    async def health(self, request: Request) -> Response:
        health = self.backend.health()
        detail = health.detail
        if self.keys is not None and self.keys.problem is not None:  # the log has the file's name and the reason
            detail = detail | {"keys": "the API keys cannot be read; what was read last is in force"}
        return _json({"status": "ok" if health.alive else "failing", **detail}, 200 if health.alive else 503)

    async def ready(self, request: Request) -> Response:
        ready = self.backend.health().ready and not self.draining
        return _json(
            {"status": "ready" if ready else "draining" if self.draining else "starting"}, 200 if ready else 503
        )

    async def metrics_page(self, request: Request) -> Response:
        page, content_type = self.metrics.page_for(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    async def version(self, request: Request) -> Response:
        return _json({"version": serverlesslora.__version__})


def user_of(body: dict[str, Any]) -> str | None:
    """Whom the request is for, by OpenAI's newer field or the older one."""
    for name in ("safety_identifier", "user"):
        if isinstance(value := body.get(name), str) and value:
            return value
    return None


def _model(card: ModelCard) -> Model:
    return Model(card.id, card.created, card.root, card.parent, card.max_model_len)


def _json(value: Any, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    return Response(_encode(value), status, headers, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    return answer_for(error).response()


def create_app(backend: Backend, settings: HttpSettings | None = None, keys: Keyring | None = None) -> Starlette:
    """The application; `app.state.gateway` has `drain()`, `in_flight` and `metrics`. Without `keys` all may ask."""
    gateway = Gateway(backend, settings or HttpSettings(), keys)
    door = [] if keys is None else [Middleware(Door, keys=keys, limiter=Limiter())]
    app = Starlette(
        routes=[
            Route("/v1/models", gateway.models),
            Route("/v1/models/{name:path}", gateway.model),
            Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
            Route("/v1/completions", gateway.complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", gateway.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", gateway.unload_adapter, methods=["POST"]),
            *Responses(gateway).routes(),
            *Embeddings(gateway).routes(),
            *Tokenization(gateway).routes(),
            *TextGeneration(gateway).routes(),
            *OpenApi().routes(),
            Route("/health", gateway.health),
            Route("/ready", gateway.ready),
            Route("/metrics", gateway.metrics_page),
            Route("/version", gateway.version),
            *LivePage(backend, gateway.metrics.history).routes(),
        ],
        middleware=[Middleware(Envelope, gateway=gateway), *door],
        exception_handlers={HTTPException: _refuse, ServerlessLoraError: _refuse, ClientDisconnect: _refuse},
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app
