"""The admin API: what is deployed and running, and changing it. Listens on the loopback address only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serverlesslora.config import FunctionConfig
from serverlesslora.errors import InvalidRequest, ServerlessLoraError, Unauthorized
from serverlesslora.gateway.deployments import OnStep, unheard
from serverlesslora.gateway.door import AdminDoor, bearer
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.functions_view import function_view, versions_view
from serverlesslora.gateway.http_errors import CHALLENGE
from serverlesslora.gateway.telling import LINES, ChangeEvent, told
from serverlesslora.gateway.usage_api import usage_routes
from serverlesslora.registry.declared import Declared
from serverlesslora.registry.entries import ALL, Weights
from serverlesslora.registry.names import parse, parse_version
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora_ipc.messages import Loaded

T = TypeVar("T")


Percent = Annotated[int, Meta(ge=0, le=ALL)]


class Deploy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: dict[str, Any]  # a FunctionConfig; with `replace`, what is not given stays as it is
    replace: bool = False
    weight: Percent = ALL  # per cent of the requests that the new version gets


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    weights: dict[str, Percent]  # by "v3"
    canary: bool = False  # the versions that are not named keep the rest


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    to: str | None = None  # "v3"; None: what was in force before


class Apply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    functions: tuple[Declared, ...]
    dry_run: bool = False
    prune: bool = False
    revision: int | None = None  # of the difference that somebody has agreed to


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


def _wanted(deploy: Deploy, fleet: Fleet) -> FunctionConfig:
    """New weights alone do not make a function somebody else's, nor take its limits away."""
    given = deploy.function
    entry = fleet.registry.entries.get(str(given.get("name")))
    if deploy.replace and entry is not None:
        here = {backbone.name for backbone in fleet.registry.backbones()}
        kept = {"backbone": entry.stable.backbone} if entry.stable.backbone in here else {}
        given = kept | msgspec.structs.asdict(entry.settings) | given
    try:
        return msgspec.convert(given, FunctionConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"bad body: {error} (in `function`)") from error


def _number(text: str, param: str) -> int:
    number = parse_version(text)
    if number is None:
        raise InvalidRequest(f"{text[:40]!r} is no version: they are called v1, v2 and so on", param=param)
    return number


def _numbered(weights: Mapping[str, int]) -> Weights:
    return {_number(text, "weights"): weight for text, weight in weights.items()}


def create_admin_app(fleet: Fleet, keys: Keyring | None = None) -> Starlette:
    """Open to all who reach it until there is an admin key; always without `keys`."""

    deployments, registry = fleet.deployments, fleet.registry

    def who(request: Request) -> str:
        """For the history."""
        key = None if keys is None else keys.check_admin(bearer(request.scope))
        return "admin API" if key is None else f"key {key.id}"

    def view(name: str, *, number: int | None = None, status: int = 200) -> Response:
        return _answer(function_view(registry.entry(name), deployments, number), status)

    async def state(request: Request) -> Response:
        return _answer(fleet.status())

    async def functions(request: Request) -> Response:
        return _answer([function_view(entry, deployments) for entry in registry.entries.values()])

    async def deploy(request: Request) -> Response:
        wanted = await _body(request, Deploy)
        function = _wanted(wanted, fleet)
        changer = who(request)

        async def work(on_step: OnStep) -> int:
            return await deployments.deploy(
                function, replace=wanted.replace, weight=wanted.weight, who=changer, on_step=on_step
            )

        if LINES not in request.headers.get("accept", ""):
            return view(function.name, number=await work(unheard), status=201)

        async def tell(on_step: OnStep) -> ChangeEvent:
            number = await work(on_step)
            return ChangeEvent(deployed=function_view(registry.entry(function.name), deployments, number))

        return StreamingResponse(told(tell, fleet.store, {function.name: function.adapter}), media_type=LINES)

    async def remove(request: Request) -> Response:
        name = request.path_params["name"]
        asked = parse(name)
        if asked is not None and isinstance(asked.version, int):
            await deployments.remove_version(asked.function, asked.version, who=who(request))
        else:
            await deployments.remove(name, who=who(request))
        return Response(status_code=204)

    async def versions(request: Request) -> Response:
        name = request.path_params["name"]
        return _answer(versions_view(registry.entry(name), await registry.history(name), deployments))

    async def route(request: Request) -> Response:
        wanted = await _body(request, Routing)
        weights = _numbered(wanted.weights)
        await deployments.route(wanted.name, weights, who=who(request), is_canary=wanted.canary)
        return view(wanted.name)

    async def roll_back(request: Request) -> Response:
        wanted = await _body(request, Rollback)
        to = None if wanted.to is None else _number(wanted.to, "to")
        await deployments.roll_back(wanted.name, to=to, who=who(request))
        return view(wanted.name)

    async def apply(request: Request) -> Response:
        wanted = await _body(request, Apply)
        changer = who(request)

        async def tell(on_step: OnStep) -> ChangeEvent:
            difference = await deployments.apply(
                wanted.functions,
                dry_run=wanted.dry_run,
                prune=wanted.prune,
                revision=wanted.revision,
                who=changer,
                on_step=on_step,
            )
            return ChangeEvent(difference=difference)

        sources = {each.name: each.adapter for each in wanted.functions}
        return StreamingResponse(told(tell, fleet.store, sources), media_type=LINES)

    async def inspect(request: Request) -> Response:
        wanted = await _body(request, Inspect)
        backbone = fleet.registry.backbone(wanted.backbone)
        async with fleet.store.obtaining(wanted.adapter) as stored:
            facts: Loaded = await deployments.inspect(backbone.name, stored)
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
            Route("/admin/versions/{name:path}", versions, methods=["GET"]),
            Route("/admin/route", route, methods=["POST"]),
            Route("/admin/rollback", roll_back, methods=["POST"]),
            Route("/admin/apply", apply, methods=["POST"]),
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
