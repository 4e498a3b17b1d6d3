"""Servers for tests: the real one as a process, or any application in a thread, each on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import uvicorn
from starlette.types import ASGIApp

ROOT = Path(__file__).parent.parent


class Target(NamedTuple):
    """Where the demo functions are served, and an adapter directory that this server can load."""

    url: str
    adapter_path: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(is_true: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """For things outside of this process that announce nothing."""
    end = time.monotonic() + deadline_s
    while not is_true():
        assert time.monotonic() < end, "waited too long"
        threading.Event().wait(0.01)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def serving(*arguments: str, deadline_s: float = 120.0) -> Iterator[str]:
    """`serverlesslora serve` with these arguments in a process of its own; yields its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc", "kernels", "loadgen"))
    command = [sys.executable, "-m", "serverlesslora", "serve", "--port", str(port), "--admin-port", "-1", *arguments]
    # The default state directory may hold API keys of whoever runs the tests.
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    process = subprocess.Popen(
        [*command, "--state-dir", scratch.name],
        env=os.environ | {"PYTHONPATH": roots},
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: process.poll() is not None or is_healthy(url), deadline_s)
        assert process.poll() is None, f"the server ended with status {process.returncode}"
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        scratch.cleanup()


@contextlib.contextmanager
def running(app: ASGIApp, http: type[asyncio.Protocol] | None = None) -> Iterator[str]:
    """The application on a real uvicorn in a thread; yields its address."""
    config = uvicorn.Config(
        app, http=http or "auto", log_level="error", access_log=False, lifespan="off", ws="none", timeout_keep_alive=30
    )
    server = uvicorn.Server(config)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        wait_until(lambda: server.started or not thread.is_alive())
        assert thread.is_alive()
        yield url
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        sock.close()
