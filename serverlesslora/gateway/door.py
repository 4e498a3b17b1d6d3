"""The door of both APIs: who asks is known, and within its limits, before anything else looks at the request."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serverlesslora.errors import Forbidden, RateLimited, ServerlessLoraError
from serverlesslora.gateway.http_errors import answer_for
from serverlesslora.gateway.journal import current_journal
from serverlesslora.gateway.page_files import PAGE_PATHS
from serverlesslora.tenancy.key import Key, Limits
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.rate_limits import Limiter, Permit, Refusal

# Probes and scrapers carry no key. /metrics names functions and counts their requests, of all tenants, and nothing that
# was said; who may not know even that is kept from the path by the proxy in front, as for any Prometheus exporter.
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"}) | PAGE_PATHS
# Who watches needs a key, but an open page must not use up what its key may ask: one reading serves many viewers.
UNCOUNTED_PATHS = frozenset({"/live"})


class Visit:
    """One request of one key."""

    def __init__(self, key: Key, permit: Permit) -> None:
        self.key = key
        self._permit = permit

    def expect(self, tokens: int) -> None:
        """Raises RateLimited when the key's minute does not have so many left."""
        if refusal := self._permit.expect(tokens):
            raise _limited(refusal)

    def used(self, tokens: int) -> None:
        self._permit.used(tokens)

    def leave(self) -> None:
        self._permit.leave()


def visit_of(request: Request) -> Visit | None:
    """None: nobody needs a key."""
    visit: Visit | None = getattr(request.state, "visit", None)
    return visit


def check_admin(request: Request) -> Visit | None:
    """Raises Forbidden when keys are needed and this one is not an admin's."""
    visit = visit_of(request)
    if visit is not None and not visit.key.grant.admin:
        raise Forbidden("This needs an admin key: `serverlesslora keys create --admin`.")
    return visit


class Door:
    """Of the public API. Refuses before the body is read; lets go of what the key holds when the answer is over."""

    def __init__(self, app: ASGIApp, keys: Keyring, limiter: Limiter) -> None:
        self._app = app
        self._keys = keys
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            visit = self._enter(scope)
        except ServerlessLoraError as error:
            await answer_for(error).response()(scope, receive, send)
            return
        scope.setdefault("state", {})["visit"] = visit
        if visit is not None:
            current_journal().shown(visit.key)
        try:
            await self._app(scope, receive, send)
        finally:
            if visit is not None:
                visit.leave()

    def _enter(self, scope: Scope) -> Visit | None:
        key = self._keys.check(bearer(scope))
        if key is None:
            return None
        if scope["path"] in UNCOUNTED_PATHS:
            permit = self._limiter.enter(f"{key.id} watches", Limits())
        else:
            permit = self._limiter.enter(key.id, key.grant.limits)
        if isinstance(permit, Refusal):
            raise _limited(permit)
        return Visit(key, permit)


class AdminDoor:
    """Of the admin API, whose errors have a shape of their own."""

    def __init__(self, app: ASGIApp, keys: Keyring, refuse: Callable[[ServerlessLoraError], Response]) -> None:
        self._app = app
        self._keys = keys
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._keys.check_admin(bearer(scope))
            except ServerlessLoraError as error:
                await self._refuse(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def bearer(scope: Scope) -> str | None:
    """What the request presents as its key, whatever it is. Two headers are none: a proxy may have read the other."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, text = values[0].decode("latin-1").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else None


def _limited(refusal: Refusal) -> RateLimited:
    return RateLimited(refusal.reason, retry_after_s=refusal.retry_after_s)
