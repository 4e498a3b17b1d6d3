"""The live page's own files: a few small ones, read once; their policy lets the page talk to this server only."""

from __future__ import annotations

from pathlib import Path

import xxhash
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {
    "/": "index.html",
    "/page/style.css": "style.css",
    "/page/app.js": "app.js",
    "/page/elements.js": "elements.js",
    "/page/numbers.js": "numbers.js",
    "/page/tables.js": "tables.js",
    "/page/charts.js": "charts.js",
    "/page/playground.js": "playground.js",
    "/page/icon.svg": "icon.svg",
}
PAGE_PATHS = frozenset(_FILES)  # they say nothing about this server, so nobody needs a key for them

# Nothing from elsewhere, no script or style inside the markup: a name that looks like markup stays a name.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again, and answered with 304 while they are the same
}


def page_routes() -> list[Route]:
    return [_route(path, FOLDER / name) for path, name in _FILES.items()]


def _route(path: str, file: Path) -> Route:
    content = file.read_bytes()
    headers = _HEADERS | {"etag": f'"{xxhash.xxh3_64_hexdigest(content)}"'}

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[file.suffix])

    return Route(path, send, methods=["GET"], include_in_schema=False)
