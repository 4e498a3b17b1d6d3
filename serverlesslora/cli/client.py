"""A client of the admin API for the command line."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.text import Text

from serverlesslora.errors import ConfigError, ServerlessLoraError, Unavailable
from serverlesslora.tenancy.secret import id_of
from serverlesslora_ipc.messages import WireError

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8001"
KEY_VARIABLE = "SERVERLESSLORA_ADMIN_KEY"


class Refusal(msgspec.Struct, frozen=True):
    error: WireError


class RefusedByServer(ServerlessLoraError):
    def __init__(self, error: WireError) -> None:
        super().__init__(error.message, param=error.param, code=error.code)
        self.status = error.status


def plain_console() -> Console:
    """Prints names as they are: a function may be called `[red]` or `:mask:`."""
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def plain(text: str) -> Text:
    """Names come from users: neither markup nor an escape sequence of theirs reaches the terminal."""
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", default=DEFAULT_URL, metavar="URL", help=f"admin API of the server [{DEFAULT_URL}]")
    parser.add_argument(
        "--admin-key",
        metavar="KEY",
        help=f"admin key, where the server needs one [${KEY_VARIABLE}, which other users cannot see in `ps`]",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def call(
    arguments: argparse.Namespace,
    method: str,
    path: str,
    body: object = None,
    *,
    type: type[T] | Any = None,
    timeout_s: float = 120.0,
) -> T:
    """The decoded answer. Raises Unavailable when nobody answers, RefusedByServer when the server says no."""
    server: str = arguments.server
    data = None if body is None else msgspec.json.encode(body)
    request = urllib.request.Request(server + path, data=data, headers=_authorization(arguments), method=method)
    with _asked(server, request, timeout_s) as response:
        try:
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{server} ended its answer early ({error})") from None
    result: T = msgspec.json.decode(content, type=type) if content else None  # type: ignore[assignment]
    return result


def stream(
    arguments: argparse.Namespace, path: str, body: object, *, type: type[T], timeout_s: float = 600.0
) -> Iterator[T]:
    """The lines of an answer as they come. Raises as `call`; `timeout_s` is for each line."""
    server: str = arguments.server
    headers = _authorization(arguments) | {"accept": "application/x-ndjson"}
    request = urllib.request.Request(server + path, data=msgspec.json.encode(body), headers=headers, method="POST")
    with _asked(server, request, timeout_s) as response:
        try:
            for line in response:
                yield msgspec.json.decode(line, type=type)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{server} ended its answer early ({error}); nothing or all may have changed") from None


@contextlib.contextmanager
def _asked(server: str, request: urllib.request.Request, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        try:
            raise RefusedByServer(msgspec.json.decode(error.read(), type=Refusal).error) from None
        except msgspec.DecodeError:
            raise Unavailable(f"{server} answered {error.code}; is it the admin address?") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"no server at {server} ({reason}); start one with `serverlesslora serve`") from None
    with response:
        yield response


def _authorization(arguments: argparse.Namespace) -> dict[str, str]:
    """Raises ConfigError for what is no key. It is not shown: it may be one all the same, but for a slip."""
    key = (arguments.admin_key or os.environ.get(KEY_VARIABLE, "")).strip()
    if not key:
        return {}
    if id_of(key) is None:
        source = "--admin-key" if arguments.admin_key else KEY_VARIABLE
        raise ConfigError(f"what {source} holds is not an API key: they look like sk-slora-0123456789abcdef-…")
    return {"authorization": f"Bearer {key}"}
