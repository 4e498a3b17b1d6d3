"""Asking a server's own pages (state, metrics, ledger): one blocking GET, for threads that may wait."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import TypeVar

import msgspec

from serverlesslora_loadgen.errors import TargetError

LARGEST_BYTES = 64 << 20

T = TypeVar("T")


class HasNone(TargetError):
    """The server answers, and has no such page."""


def get(url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0) -> bytes:
    """The body. Raises TargetError naming the address and what came instead.

    Proxies of the environment are not asked: load does not go through them either.
    """
    if not url.startswith(("http://", "https://")):
        raise TargetError(f"{url!r} is no address of a server; it begins with http:// or https://")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=timeout_s) as answer:
            body: bytes = answer.read(LARGEST_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(300).decode("utf-8", "replace").strip()
        kind = HasNone if error.code in (404, 405) else TargetError
        raise kind(f"{url} answered {error.code}: {said}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise TargetError(f"cannot ask {url}: {error}") from error
    if len(body) > LARGEST_BYTES:
        raise TargetError(f"{url} sent more than {LARGEST_BYTES >> 20} MiB")
    return body


def get_json(url: str, type_: type[T], *, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0) -> T:
    """Fields that are not known are ignored."""
    body = get(url, headers=headers, timeout_s=timeout_s)
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{url} is not what this program reads: {error}") from error
