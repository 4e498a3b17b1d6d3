"""Changes of the registry that take long, told line by line: what is done for which function, how far its adapter is,
and at the end what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

import msgspec

from serverlesslora.adapters.sources import shown
from serverlesslora.adapters.store import AdapterStore
from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.deployments import OnStep
from serverlesslora.gateway.functions_view import FunctionView
from serverlesslora.registry.declared import Difference
from serverlesslora_ipc.messages import WireError

log = logging.getLogger("serverlesslora.admin")

LINES = "application/x-ndjson"
TELL_EVERY_S = 0.5


class ChangeEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line. The last one has the result, or why there is none."""

    function: str | None = None
    step: str | None = None  # "fetching", "inspecting", "ready"
    done_bytes: int | None = None  # of a transfer under way
    total_bytes: int | None = None  # None: not known
    difference: Difference | None = None  # that was applied
    deployed: FunctionView | None = None
    error: WireError | None = None

    @property
    def is_last(self) -> bool:
        return self.difference is not None or self.deployed is not None or self.error is not None


async def told(
    work: Callable[[OnStep], Awaitable[ChangeEvent]], store: AdapterStore, sources: Mapping[str, str]
) -> AsyncIterator[bytes]:
    """`sources`: of adapters, by function. Who leaves before the last line has changed nothing, or everything."""
    events: asyncio.Queue[ChangeEvent] = asyncio.Queue()

    def on_step(name: str, step: str) -> None:
        events.put_nowait(ChangeEvent(function=name, step=step))

    async def run() -> None:
        try:
            events.put_nowait(await work(on_step))
        except ServerlessLoraError as error:
            events.put_nowait(ChangeEvent(error=error.to_wire()))
        except Exception:  # the status is sent already
            log.exception("a change failed")
            unexpected = ServerlessLoraError("The server had an unexpected error; its log has the details.")
            events.put_nowait(ChangeEvent(error=unexpected.to_wire()))

    task = asyncio.create_task(run(), name="change")
    try:
        while True:
            try:
                async with asyncio.timeout(TELL_EVERY_S):
                    event = await events.get()
            except TimeoutError:
                for event in _transfers(store, sources):
                    yield msgspec.json.encode(event) + b"\n"
                continue
            yield msgspec.json.encode(event) + b"\n"
            if event.is_last:
                return
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _transfers(store: AdapterStore, sources: Mapping[str, str]) -> Iterator[ChangeEvent]:
    under_way = {each.source: each for each in store.fetching()}
    for name, source in sources.items():
        if (transfer := under_way.get(shown(source))) is not None:
            yield ChangeEvent(
                function=name, step="fetching", done_bytes=transfer.done_bytes, total_bytes=transfer.total_bytes
            )
