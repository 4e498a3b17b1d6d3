"""The gateway's end of one worker: requests in, their events out, and what the worker holds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from serverlesslora.errors import AdapterInvalid, ServerlessLoraError, WorkerLost
from serverlesslora.gateway.worker_state import WorkerEvent, WorkerState, advance
from serverlesslora_ipc.channel import AsyncChannel, ChannelClosed
from serverlesslora_ipc.messages import (
    Abort,
    Aborted,
    Delta,
    Embedding,
    Failed,
    Finished,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Loaded,
    PromptEcho,
    Ready,
    Refused,
    Shutdown,
    Spent,
    Started,
    Stats,
    UnloadAdapter,
    WireError,
    WorkerToGateway,
)

StreamEvent = Started | PromptEcho | Embedding | Delta | Finished


class RemoteError(ServerlessLoraError):
    """A failure reported by a worker, as it should reach the client."""

    def __init__(self, error: WireError, spent: Spent) -> None:
        super().__init__(error.message, param=error.param, code=error.code)
        self.status = error.status
        self.spent = spent
        self._type = error.type

    def to_wire(self) -> WireError:
        return WireError(status=self.status, message=self.message, type=self._type, code=self.code, param=self.param)


class Stream:
    """Events of one request on their way to its client; bounded by the request's own token limit."""

    def __init__(self) -> None:
        self.has_started = False
        self.spent: Spent | None = None  # known when its last event has arrived, even if nobody has read that
        self._events: deque[StreamEvent] = deque()
        self._error: ServerlessLoraError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: StreamEvent) -> None:
        self.has_started = self.has_started or isinstance(event, Started)
        if isinstance(event, Finished):
            self.spent = event.spent
        self._events.append(event)
        self._wake()

    def fail(self, error: ServerlessLoraError) -> None:
        self._error = self._error or error
        if isinstance(error, RemoteError):
            self.spent = error.spent
        self._wake()

    async def next(self) -> StreamEvent:
        """The next event in order; raises the stream's error once everything before it was read."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._events.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class WorkerLink:
    def __init__(
        self,
        worker_id: str,
        domain: str,
        channel: AsyncChannel[WorkerToGateway],
        *,
        adapter_bytes: int,
        end_process: Callable[[], None] = lambda: None,
    ) -> None:
        self.worker_id = worker_id
        self.domain = domain
        self.load_seconds: float | None = None  # of the last adapter
        self.backbone = ""  # told by who takes it in
        self.on_change: Callable[[WorkerLink], None] = lambda link: None  # it holds other adapters than before
        self.state = WorkerState.STARTING
        self.pid: int | None = None
        self.started_at = time.monotonic()
        self.last_used = self.started_at
        self.heard_at = self.started_at  # the worker's last sign of life
        self.stats: Stats | None = None
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting any more when it fails.
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self._adapter_bytes = adapter_bytes
        self._end_process = end_process
        self._channel = channel
        self._streams: dict[str, tuple[Stream, str | None]] = {}
        self._on_spent: dict[str, Callable[[Spent], None]] = {}  # of aborted requests whose end is not known yet
        self._adapters: OrderedDict[str, asyncio.Future[Loaded]] = OrderedDict()  # least recently used first

    # --- what the fleet asks

    @property
    def is_usable(self) -> bool:
        return self.state in (WorkerState.STARTING, WorkerState.SERVING)

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def has(self, digest: str) -> bool:
        """The adapter is loaded, not merely on its way."""
        return digest in self._adapters and self._adapters[digest].done()

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes of each adapter that is loaded, by digest."""
        return {
            digest: loading.result().size_bytes
            for digest, loading in self._adapters.items()
            if loading.done() and not loading.cancelled() and loading.exception() is None
        }

    def load(self, digest: str, path: str) -> asyncio.Future[Loaded]:
        """Start loading unless it is loaded or under way. Raises AdapterInvalid through the result.

        The result is shared: await it shielded, or one caller that leaves cancels it for all.
        """
        if digest not in self._adapters:
            future: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())
            self._adapters[digest] = future
            self._send(LoadAdapter(digest=digest, path=path))
        self._adapters.move_to_end(digest)
        return self._adapters[digest]

    def unload(self, digest: str) -> None:
        """The worker itself waits for requests that still run on the adapter."""
        loading = self._adapters.get(digest)
        if loading is not None and not loading.done():
            # Somebody waits for it, and would wait for ever if its answer found nobody to give it to.
            loading.add_done_callback(lambda _: self.unload(digest))
        elif loading is not None:
            del self._adapters[digest]
            self._send(UnloadAdapter(digest=digest))
            self.on_change(self)

    def submit(self, request: Generate, stream: Stream) -> None:
        self.last_used = time.monotonic()
        if not self._streams:  # silence of an idle worker means nothing
            self.heard_at = self.last_used
        self._streams[request.request_id] = (stream, request.adapter)
        self._send(request)

    def abort(self, request_id: str, on_spent: Callable[[Spent], None] | None = None) -> bool:
        """End a request nobody waits for; its stream gets nothing more. False: it had ended, or was never here.

        If True, `on_spent` is called exactly once, later: with what the request has cost, or with `Spent()` when
        the worker dies before it could tell. If False it is never called: `Stream.spent` knows.
        """
        if self._streams.pop(request_id, None) is None:
            return False
        self.last_used = time.monotonic()
        if on_spent is not None:
            self._on_spent[request_id] = on_spent
        self._send(Abort(request_id=request_id))
        return True

    def retire(self) -> None:
        """Ask it to leave. Only for a worker without open requests."""
        assert not self._streams
        self._advance(WorkerEvent.RETIRE)
        self._send(Shutdown())

    def kill(self) -> None:
        """End it without asking: it is stuck, or nobody will wait for it. Its requests fail."""
        if self.state is not WorkerState.GONE:  # it holds the other end of the channel, so its pid is still its own
            self._end_process()
            self._channel.close()

    # --- what the worker says

    async def main_loop(self, on_gone: Callable[[WorkerLink], None]) -> None:
        """Deliver messages until the worker is gone, then fail what it left behind."""
        try:
            async for frame in self._channel:
                self.heard_at = time.monotonic()
                for message in frame.messages:
                    self._deliver(message)
        finally:
            self._advance(WorkerEvent.GONE)
            self._channel.close()
            self.gone.set_result(None)
            try:
                on_gone(self)
            finally:
                self._fail_all()

    def _deliver(self, message: WorkerToGateway) -> None:
        match message:
            case Delta() | Started() | PromptEcho() | Embedding():
                if entry := self._streams.get(message.request_id):
                    entry[0].put(message)
            case Finished():
                if entry := self._streams.pop(message.request_id, None):
                    entry[0].put(message)
                self._ended(message.request_id, message.spent)
            case Failed():
                if entry := self._streams.pop(message.request_id, None):
                    entry[0].fail(RemoteError(message.error, message.spent))
                self._ended(message.request_id, message.spent)
            case Aborted():
                self._ended(message.request_id, message.spent)
            case Stats():
                self.stats = message
            case Loaded():
                if (loading := self._adapters.get(message.digest)) and not loading.done():
                    loading.set_result(message)
                    self.load_seconds = message.seconds
                self._shrink(keep=message.digest)
                self.on_change(self)
            case Refused():
                if (loading := self._adapters.pop(message.digest, None)) and not loading.done():
                    loading.set_exception(AdapterInvalid(message.reason, param="lora_path"))
            case Ready():
                self._advance(WorkerEvent.READY)
                self.pid = message.pid
                self.last_used = time.monotonic()  # its first request is on the way; starting was not idleness
                if not self.ready.done():
                    self.ready.set_result(message)
                self.on_change(self)

    def _ended(self, request_id: str, spent: Spent) -> None:
        """Whatever its end was: it may have finished or failed just before it heard of its abort."""
        self.last_used = time.monotonic()
        if on_spent := self._on_spent.pop(request_id, None):
            on_spent(spent)

    def _shrink(self, *, keep: str) -> None:
        """Forget least recently used adapters while they take more than this worker may hold."""
        loaded = {d: f.result().size_bytes for d, f in self._adapters.items() if f.done() and not f.cancelled()}
        total = sum(loaded.values())
        busy = {digest for _, digest in self._streams.values()}
        for digest, size in loaded.items():
            if total <= self._adapter_bytes:
                return
            if digest != keep and digest not in busy:
                self.unload(digest)
                total -= size

    def _fail_all(self) -> None:
        lost = WorkerLost("the worker serving this request ended; other functions are not affected")
        if not self.ready.done():
            self.ready.set_exception(lost)
        for loading in self._adapters.values():
            if not loading.done():
                loading.set_exception(lost)
        for stream, _ in self._streams.values():
            stream.fail(lost)
        self._streams.clear()
        while self._on_spent:
            self._on_spent.popitem()[1](Spent())

    def _advance(self, event: WorkerEvent) -> None:
        self.state = advance(self.state, event)

    def _send(self, message: GatewayToWorker) -> None:
        # A worker that has just died is reported by `main_loop`; what is said to it meanwhile is moot.
        with contextlib.suppress(ChannelClosed):
            self._channel.send([message])
