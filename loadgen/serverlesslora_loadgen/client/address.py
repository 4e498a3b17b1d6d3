"""Where requests go, and the part of them that is the same for all."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from serverlesslora_loadgen.errors import TargetError
from serverlesslora_loadgen.plan import Target

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Address(NamedTuple):
    host: str
    port: int
    tls: bool
    host_header: str
    path: str


def address_of(target: Target) -> Address:
    """Raises TargetError when the URL is none, or not one of HTTP, or has more than can be kept."""
    url = urlsplit(target.url)
    try:
        port = url.port
    except ValueError as error:
        raise TargetError(f"{target.url!r} has no usable port: {error}") from error
    if url.scheme not in ("http", "https") or not url.hostname:
        raise TargetError(f"{target.url!r} is not the address of a server, such as http://127.0.0.1:8000")
    if url.query or url.fragment:  # not shown: some put keys there
        raise TargetError(
            f"{url.scheme}://{url.netloc}{url.path} is followed by a ?query or #fragment, which would not be sent; "
            "leave it out, and give what the server must know as a header"
        )
    tls = url.scheme == "https"
    prefix = url.path.rstrip("/").removesuffix("/v1")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return Address(
        url.hostname, port or (443 if tls else 80), tls, host if port is None else f"{host}:{port}",
        prefix + PATHS[target.endpoint],
    )  # fmt: skip


def head_of(target: Target) -> bytes:
    """What all requests have in common. Raises TargetError, as `address_of` and `header_lines` do."""
    address = address_of(target)
    headers = {
        "host": address.host_header,
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "user-agent": "serverlesslora-loadgen",
        **{name.lower(): value for name, value in target.headers.items()},
    }
    return f"POST {address.path} HTTP/1.1\r\n".encode() + header_lines(headers)


def header_lines(headers: dict[str, str]) -> bytes:
    """Raises TargetError for a header that would break the request."""
    for name, value in headers.items():
        if not name.isascii() or any(c in name + value for c in "\r\n\0") or not name or ":" in name:
            raise TargetError(f"{name!r} with {value!r} is no header of HTTP")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1", "replace")
