"""A client of the admin API for the command line."""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from typing import Any, TypeVar

import msgspec
from rich.console import Console

from serverlesslora.errors import ServerlessLoraError, Unavailable
from serverlesslora_ipc.messages import WireError

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8001"


class Refusal(msgspec.Struct, frozen=True):
    error: WireError


class RefusedByServer(ServerlessLoraError):
    def __init__(self, error: WireError) -> None:
        super().__init__(error.message, param=error.param, code=error.code)
        self.status = error.status


def plain_console() -> Console:
    """Prints names as they are: a function may be called `[red]` or `:mask:`."""
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", default=DEFAULT_URL, metavar="URL", help=f"admin API of the server [{DEFAULT_URL}]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def call(
    server: str, method: str, path: str, body: object = None, *, type: type[T] | Any = None, timeout_s: float = 120.0
) -> T:
    """The decoded answer. Raises Unavailable when nobody answers, RefusedByServer when the server says no."""
    data = None if body is None else msgspec.json.encode(body)
    request = urllib.request.Request(server + path, data=data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        try:
            raise RefusedByServer(msgspec.json.decode(error.read(), type=Refusal).error) from None
        except msgspec.DecodeError:
            raise Unavailable(f"{server} answered {error.code}; is it the admin address?") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"no server at {server} ({reason}); start one with `serverlesslora serve`") from None
    result: T = msgspec.json.decode(content, type=type) if content else None  # type: ignore[assignment]
    return result
