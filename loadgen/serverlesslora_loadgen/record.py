"""What became of one request: stamps of the client, what the server said, and whether it can be believed."""

from __future__ import annotations

from typing import Literal

import msgspec

Outcome = Literal["ok", "shed", "failed", "unsent"]

# Why a request counts as failed. Each has a test with a server that does it.
Failure = Literal[
    "connect",  # no connection, or it broke before an answer
    "status",  # an HTTP status that is neither 200 nor shedding
    "error-event",  # an error inside a stream that began well
    "truncated",  # the stream ended without [DONE]
    "no-finish-reason",
    "no-usage",
    "usage-mismatch",  # tokens counted in the stream are not those the server says it made
    "length-mismatch",  # an exact number of tokens was asked for, another came
    "wrong-model",  # another model's name in the answer
    "wrong-answer",  # not the golden answer of this adapter and prompt
    "stall",  # longer between two tokens than the limit
    "timeout",  # not ended within the limit
    "malformed",  # events that are not what the API promises
]

# How cold what it needed was; `warm` when the server says that nothing was missing, `unknown` when it says nothing.
ColdKind = str
WARM, UNKNOWN = "warm", "unknown"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """All stamps are seconds after the start of the run, on one monotonic clock; None: never reached.

    Latencies count from `intended_s`, so that a client that falls behind cannot flatter the server.
    """

    id: int  # position in the trace that was replayed
    model: str
    class_: str | None = msgspec.field(default=None, name="class")
    intended_s: float
    started_s: float | None = None  # the client began to work on it
    written_s: float | None = None  # its last byte was given to the socket
    first_byte_s: float | None = None  # of the answer
    first_token_s: float | None = None
    second_token_s: float | None = None
    last_token_s: float | None = None
    done_s: float | None = None  # [DONE], or the end of what came instead
    outcome: Outcome
    failure: Failure | None = None
    detail: str = ""  # what was seen, shortened, for people
    status: int = 0  # of HTTP; 0: no answer
    retry_after_s: float | None = None
    request_id: str = ""  # the server's, to search in its log
    cold: ColdKind = UNKNOWN
    cold_ms: dict[str, float] = {}  # rung → what it cost, as the server says
    input_tokens: int = 0  # as the server counts; asked for when it says nothing
    cached_tokens: int = 0
    output_tokens: int = 0
    chunks: int = 0  # events that carried tokens; fewer than output tokens: the server puts several into one
    max_gap_s: float | None = None  # longest wait between two events with tokens
    gaps_s: tuple[float, ...] = ()  # all of them, in order
    bytes_in: int = 0
    deadline_s: float | None = None  # for the first token, after `intended_s`
    server_ttft_s: float | None = None  # the null server's own: request read until first token written
    connected_s: float | None = None  # a connection opened for it was ready; None: never, or an idle one was used

    @property
    def lag_s(self) -> float | None:
        """How much later than intended the request was on its way, by the client's own fault.

        What it took to connect is the network's and the server's, and is in the latencies alone.
        """
        if self.written_s is None:
            return None
        return self.written_s - self.intended_s - (self.connect_s or 0.0)

    @property
    def connect_s(self) -> float | None:
        """What opening a connection took, TLS included; None: an idle one was used."""
        return None if self.connected_s is None or self.started_s is None else self.connected_s - self.started_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.intended_s

    @property
    def ttft_from_send_s(self) -> float | None:
        if self.first_token_s is None or self.written_s is None:
            return None
        return self.first_token_s - self.written_s

    @property
    def ttst_s(self) -> float | None:
        """Time to the second token."""
        return None if self.second_token_s is None else self.second_token_s - self.intended_s

    @property
    def e2e_s(self) -> float | None:
        """Until the last token; [DONE] comes after it."""
        return None if self.last_token_s is None else self.last_token_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (n - 1), n tokens; None below two."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)
