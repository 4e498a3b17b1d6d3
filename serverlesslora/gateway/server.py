"""The gateway process: fleet, public API and admin API started in order and stopped in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from serverlesslora import logs
from serverlesslora.config import ServerConfig
from serverlesslora.errors import ConfigError
from serverlesslora.gateway.admin import create_admin_app
from serverlesslora.gateway.app import Gateway, create_app
from serverlesslora.gateway.connections import affordable_connections, watched
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.orphans import reap_orphans
from serverlesslora.gateway.quotas import Quotas, tenant_limits
from serverlesslora.gateway.tracing import start_tracer
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.store import KEYS_FILE

log = logging.getLogger("serverlesslora.server")

HEADER_TIMEOUT_S = 10.0
LAST_BYTES_S = 2.0
ADMIN_CONNECTIONS = 64


class HttpListener(uvicorn.Server):
    """A uvicorn server whose signals belong to `Server`."""

    def __init__(self, app: ASGIApp, sock: socket.socket, max_connections: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=watched(HEADER_TIMEOUT_S, max_connections),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_keep_alive=30,
                ws="none",
            )
        )
        self._socket = sock
        self._serving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup_here(self) -> None:
        self._serving = asyncio.create_task(self.serve(sockets=[self._socket]), name=f"http {self.address}")
        while not self.started and not self._serving.done():
            await asyncio.sleep(0.005)

    async def shutdown_here(self) -> None:
        self.should_exit = True
        if self._serving is not None:
            # The last bytes of an answer may still be on their way to a slow reader.
            await asyncio.wait([self._serving], timeout=LAST_BYTES_S)
            self.force_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)


def bind(host: str, port: int) -> socket.socket:
    """Raises ConfigError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return sock


class Server:
    def __init__(self, config: ServerConfig, fleet: Fleet) -> None:
        """Raises ConfigError."""
        self._config = config
        self._fleet = fleet
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._tracer = start_tracer(config.otlp_endpoint)
        self._socket = bind(config.host, config.port)
        self.keys = Keyring(Path(config.state_dir) / KEYS_FILE)
        self._app = create_app(fleet, HttpSettings(max_body_bytes=config.max_body_mb << 20), self.keys)
        gateway: Gateway = self._app.state.gateway
        gateway.quotas = Quotas(tenant_limits(config.tenants))
        if self._tracer is not None:
            gateway.on_finished = self._tracer.finish
        self.api = HttpListener(self._app, self._socket, affordable_connections(config.max_connections))
        self.admin: HttpListener | None = None
        if config.admin_port >= 0:
            admin_app = create_admin_app(fleet, self.keys)
            self.admin = HttpListener(admin_app, bind("127.0.0.1", config.admin_port), ADMIN_CONNECTIONS)

    async def run(self, on_ready: Callable[[Server], None]) -> None:
        """Serve until a signal. Raises ConfigError when a backbone or configured function cannot be served, or the
        API keys cannot be read."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(logs.report_unseen)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        listeners = [listener for listener in (self.api, self.admin) if listener]
        orphans = asyncio.create_task(reap_orphans(), name="orphans")
        try:
            self.keys.startup()  # before anybody can ask
            # Listening first: /health says "loading" instead of refusing the connection.
            for listener in listeners:
                await listener.startup_here()
            if await self._started():
                on_ready(self)
                await self._stop.wait()
                await self._drain()
        finally:
            self._app.state.gateway.drain()
            for listener in listeners:
                await listener.shutdown_here()
            await self._fleet.shutdown()
            self.keys.shutdown()
            if self._tracer is not None:
                await self._tracer.shutdown()
            orphans.cancel()

    async def _started(self) -> bool:
        """False when a signal came before everything was ready."""
        starting = asyncio.ensure_future(self._fleet.startup())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            starting.result()
            return True
        finally:
            starting.cancel()
            stopping.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)

    async def _drain(self) -> None:
        """Let what runs finish, and the port refuse what is new, for as long as the settings say; a second signal ends
        the wait. Who is not done then hears why."""
        began = time.monotonic()
        self._app.state.gateway.drain()
        log.info("draining: %d requests are open", self._fleet.num_open)
        while not self._hurry.is_set():
            passed_s = time.monotonic() - began
            is_idle = not self._fleet.num_open or passed_s >= self._config.drain_timeout_s
            if is_idle and passed_s >= self._config.drain_delay_s:
                break
            await asyncio.sleep(0.05)
        if num_open := self._fleet.num_open:
            log.warning("%d requests did not finish in time and are ended", num_open)
            self._fleet.interrupt()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()
