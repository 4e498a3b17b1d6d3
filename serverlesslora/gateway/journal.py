"""What is known of one HTTP request while it runs, for its log lines and, when it is over, its access line and trace.

It holds names that the server knows, times and counts; never what was asked or said, nor a key.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from serverlesslora.gateway.backend import Cold, ModelCard
from serverlesslora.logs import current_subject
from serverlesslora.tenancy.key import Key
from serverlesslora_ipc.messages import Finished

Outcome = Literal["finished", "refused", "failed", "aborted"]

CLIENT_LEFT = 499
REFUSED = frozenset({401, 403, 404, 408, 413, 414, 415, 422, 429, 503})


class Journal:
    """Times are seconds after the request's arrival."""

    def __init__(self, request_id: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.request_id = request_id
        self.headers = headers
        self.arrived_ns = time.time_ns()
        self._arrived = time.perf_counter()
        self.route = "none"
        self.status = 0  # what was sent; 0: nothing
        self.generation_status: int | None = None  # a stream may fail after a good status was sent
        self.function: str | None = None
        self.tenant: str | None = None
        self.key_id: str | None = None
        self.domain: str | None = None
        self.digest: str | None = None
        self.cold: Cold | None = None
        self.opened_s: float | None = None  # admitted; from now on it waits
        self.placed_s: float | None = None  # there is a worker for it
        self.sent_s: float | None = None
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.ended_s: float | None = None
        self.input_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.finish_reasons: list[str] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._arrived

    @property
    def outcome(self) -> Outcome:
        status = self.status if self.generation_status is None else self.generation_status
        if status in (0, CLIENT_LEFT):
            return "aborted"
        if status < 400:
            return "finished"
        return "refused" if status in REFUSED or status == 400 else "failed"

    # --- what happens to it

    def shown(self, key: Key) -> None:
        self.key_id = key.id
        self.tenant = key.grant.tenant

    def asks(self, card: ModelCard) -> None:
        """For a model that exists: any other name may be anything."""
        self.function = card.id
        self.tenant = card.tenant or self.tenant

    def opened(self) -> None:
        self.opened_s = self.seconds

    def queued(self, domain: str, digest: str | None) -> None:
        self.domain, self.digest = domain, digest

    def placed(self) -> None:
        self.placed_s = self.seconds

    def sent(self) -> None:
        self.sent_s = self.seconds

    def started(self, cold: Cold) -> None:
        self.cold = cold
        self.started_s = self.seconds

    def first_token(self) -> None:
        self.first_token_s = self.seconds

    def finished(self, finished: Finished) -> None:
        self.last_token_s = self.seconds
        self.input_tokens += finished.prompt_tokens
        self.cached_tokens += finished.cached_tokens
        self.output_tokens += finished.completion_tokens

    def closed(self, generation_status: int) -> None:
        self.generation_status = generation_status

    def ended(self, route: str, status: int) -> None:
        self.route = route
        self.status = status
        self.ended_s = self.seconds

    # --- how it is told

    def log_fields(self) -> dict[str, Any]:
        fields = {
            "request_id": self.request_id,
            "function": self.function,
            "tenant": self.tenant,
            "key_id": self.key_id,
            "domain": self.domain,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def access_fields(self) -> dict[str, Any]:
        """Of its one line. A generation has its numbers, anything else its route and status."""
        fields: dict[str, Any] = {
            "route": self.route,
            "status": self.status or CLIENT_LEFT,
            "outcome": self.outcome,
            "seconds": round(self.ended_s or 0.0, 4),
        }
        if self.cold is not None:
            fields["rung"] = self.cold.rung
        if self.first_token_s is not None:
            fields["ttft_s"] = round(self.first_token_s, 4)
        if self.input_tokens:
            fields |= {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
        return fields


def current_journal() -> Journal:
    """Of the request that this task works for; outside of any, one that nobody reads."""
    subject = current_subject()
    return subject if isinstance(subject, Journal) else Journal("")
