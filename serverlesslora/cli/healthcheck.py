"""`serverlesslora healthcheck`: the exit status says whether a server is well, for containers that have no curl.

It is asked every few seconds, so it imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 5.0
DEFAULT_PORT = "8000"
EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server that listens there is asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="of the server, or of the page to ask [where SERVERLESSLORA_HOST and _PORT say]")
    parser.add_argument("--ready", action="store_true", help="ask whether it takes requests, not only whether it lives")
    parser.set_defaults(run=run)


def add_parsers(commands: Any) -> None:
    add_arguments(commands.add_parser("healthcheck", help="exit 0 if a server is well, else 1"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="serverlesslora healthcheck")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def run(arguments: argparse.Namespace) -> int:
    url = arguments.url or default_url(os.environ)
    try:
        status = _status(url, "/ready" if arguments.ready else "/health")
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"serverlesslora healthcheck: {url}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"serverlesslora healthcheck: {url}: status {status}", file=sys.stderr)
    return 0 if status == 200 else 1


def default_url(environment: Mapping[str, str]) -> str:
    host = environment.get("SERVERLESSLORA_HOST", "")
    host = EVERYWHERE.get(host, host)
    port = environment.get("SERVERLESSLORA_PORT", DEFAULT_PORT)
    # Kubernetes gives every container such a variable with an address in it, if a service is called so.
    return f"http://{f'[{host}]' if ':' in host else host}:{port if port.isdecimal() else DEFAULT_PORT}"


def _status(url: str, path: str) -> int:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http:// or https:// address")
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connect(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path.rstrip("/") or path)
        return connection.getresponse().status
    finally:
        connection.close()
