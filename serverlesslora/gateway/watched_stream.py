"""A request's events on their way from the worker, with what the gateway wants to know the moment they arrive."""

from __future__ import annotations

from collections.abc import Callable

from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.worker_link import Stream, StreamEvent
from serverlesslora_ipc.messages import Delta, Finished, Spent, Started


class WatchedStream(Stream):
    """Tells of the first token and of the end when they arrive, however slowly the client reads, and counts."""

    def __init__(self, on_first_token: Callable[[], None], on_end: Callable[[Spent], None]) -> None:
        super().__init__()
        self.prompt_tokens = 0
        self.output_tokens = 0
        self._on_first_token: Callable[[], None] | None = on_first_token
        self._on_end = on_end

    def put(self, event: StreamEvent) -> None:
        super().put(event)
        match event:
            case Delta() if event.token_ids:  # the end of a request for no tokens has none
                self.output_tokens += len(event.token_ids)
                if self._on_first_token is not None:
                    self._on_first_token()
                    self._on_first_token = None
            case Started():
                self.prompt_tokens = event.prompt_tokens
            case Finished():
                self._on_end(event.spent)

    def fail(self, error: ServerlessLoraError) -> None:
        super().fail(error)
        self._on_end(self.spent or Spent())
