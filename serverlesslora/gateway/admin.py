"""The admin API: what is deployed and running, and changing it. Listens on the loopback address only."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serverlesslora.config import FunctionConfig
from serverlesslora.errors import InvalidRequest, ServerlessLoraError, Unauthorized
from serverlesslora.gateway.door import AdminDoor
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.http_errors import CHALLENGE
from serverlesslora.gateway.usage_api import usage_routes
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora_ipc.messages import Loaded

T = TypeVar("T")


class Deploy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: FunctionConfig
    replace: bool = False


class Inspect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    adapter: str
    backbone: str | None = None


class Inspection(msgspec.Struct, frozen=True):
    """What a dry run found: the adapter can be served on this backbone."""

    digest: str
    backbone: str
    size_bytes: int
    rank: int
    modules: int
    kinds: tuple[str, ...]
    load_s: float


def _answer(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerlessLoraError)
    return _refusal(error)


def _refusal(error: ServerlessLoraError) -> Response:
    response = _answer({"error": error.to_wire()}, error.status)
    if isinstance(error, Unauthorized):
        response.headers.append(*CHALLENGE)
    return response


async def _body(request: Request, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.body(), type=type_)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"bad body: {error}") from error


def create_admin_app(fleet: Fleet, keys: Keyring | None = None) -> Starlette:
    """Open to all who reach it until there is an admin key; always without `keys`."""

    async def state(request: Request) -> Response:
        return _answer(fleet.status())

    async def functions(request: Request) -> Response:
        return _answer(list(fleet.registry.functions()))

    async def deploy(request: Request) -> Response:
        wanted = await _body(request, Deploy)
        await fleet.deploy(wanted.function, replace=wanted.replace)
        return _answer(fleet.registry.function(wanted.function.name), 201)

    async def remove(request: Request) -> Response:
        await fleet.unload_adapter(request.path_params["name"])
        return Response(status_code=204)

    async def inspect(request: Request) -> Response:
        wanted = await _body(request, Inspect)
        backbone = fleet.registry.backbone(wanted.backbone)
        stored = await fleet.store.obtain(wanted.adapter)
        facts: Loaded = await fleet.inspect(backbone.name, stored)
        return _answer(
            Inspection(
                digest=stored.digest,
                backbone=backbone.name,
                size_bytes=facts.size_bytes,
                rank=facts.rank,
                modules=facts.modules,
                kinds=facts.kinds,
                load_s=facts.seconds,
            )
        )

    async def plan(request: Request) -> Response:
        return _answer(fleet.plan())

    async def profile(request: Request) -> Response:
        return _answer(fleet.control.profile())

    async def verify(request: Request) -> Response:
        verified = await fleet.verify(request.path_params["name"])
        return _answer({"content_digest": verified.content_digest, "intact": verified.intact})

    return Starlette(
        routes=[
            Route("/admin/state", state, methods=["GET"]),
            Route("/admin/functions", functions, methods=["GET"]),
            Route("/admin/functions", deploy, methods=["POST"]),
            Route("/admin/functions/{name:path}", remove, methods=["DELETE"]),
            Route("/admin/verify/{name:path}", verify, methods=["POST"]),
            Route("/admin/inspect", inspect, methods=["POST"]),
            Route("/admin/plan", plan, methods=["GET"]),
            Route("/admin/profile", profile, methods=["GET"]),
            *usage_routes(
                fleet.control.accounts.ledger, fleet.control.accounts.prices, up_to_now=fleet.control.write_down
            ),
        ],
        middleware=[] if keys is None else [Middleware(AdminDoor, keys=keys, refuse=_refusal)],
        exception_handlers={ServerlessLoraError: _failed},
    )
