"""One answer as it comes in, and the record of it: bytes and times go in, nothing here touches a socket or a clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from email.utils import parsedate_to_datetime

import msgspec

from serverlesslora_loadgen.client.events import Event, bears_tokens, text_of
from serverlesslora_loadgen.client.sse import BROKEN, COMMENT, EventSource, Item
from serverlesslora_loadgen.client.timing import parse_cold
from serverlesslora_loadgen.client.verdict import Ending, Seen, judge
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.record import Record

DETAIL_CHARACTERS = 300
MAX_BODY_BYTES = 4096  # kept of an answer that is no stream
AFTER_DONE_S = 1.0  # how long the HTTP answer may stay open after [DONE] before its connection is given up
SILENCE = (None, "", "null")  # in place of a name; "null", as a text, is what LoRAX writes there
STAMP = b"stamp="  # a comment of the null server: its own time to first token, seconds
KEPT_HEADERS = frozenset(
    (b"content-encoding", b"content-type", b"date", b"location", b"retry-after", b"x-request-id")
)  # fmt: skip

_decoder = msgspec.json.Decoder(Event)
_NO_EVENT = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Reading:
    """Stamps are on the clock of whoever feeds it; the record counts from `start_at`."""

    __slots__ = (
        "_chunks",
        "_cold_header",
        "_done",
        "_event_id",
        "_first_token",
        "_headers",
        "_is_stream",
        "_last_token",
        "_pieces",
        "_planned",
        "_second_token",
        "_seen",
        "_server_ttft",
        "_source",
        "_start_at",
        "_target",
        "bytes_in",
        "connected",
        "first_byte",
        "intended",
        "started",
        "written",
    )

    def __init__(
        self, planned: Planned, target: Target, *, start_at: float, intended: float, keep_text: bool = False
    ) -> None:
        self._planned, self._target, self._start_at = planned, target, start_at
        self.intended = intended
        self.started: float | None = None
        self.connected: float | None = None
        self.written: float | None = None
        self.first_byte: float | None = None
        self.bytes_in = 0
        self._seen = Seen()
        self._source = EventSource()
        self._headers: dict[bytes, str] = {}
        self._cold_header = target.cold_header.lower().encode()
        self._is_stream = False
        self._event_id = ""
        self._chunks = 0
        self._first_token: float | None = None
        self._second_token: float | None = None
        self._last_token: float | None = None
        self._done: float | None = None
        self._server_ttft: float | None = None
        self._pieces: list[str] | None = [] if keep_text or planned.golden is not None else None

    @property
    def text(self) -> str:
        """Only kept when asked for, or held against a golden answer."""
        return "".join(self._pieces or ())

    @property
    def is_done(self) -> bool:
        """Whether [DONE] has come."""
        return self._done is not None

    def head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Names of headers in lower case."""
        seen, kept = self._seen, {*KEPT_HEADERS, self._cold_header}
        found = {name: value.decode("latin-1") for name, value in headers if name in kept}
        self._headers = found
        seen.status, seen.location = status, found.get(b"location", "")
        kind = found.get(b"content-type", "").partition(";")[0].strip().lower()
        encoding = found.get(b"content-encoding", "").strip().lower()
        if status == 200:
            if kind != "text/event-stream":
                self._spoil(f"not an event stream but {kind or 'of no named type'}")
            elif encoding not in ("identity", ""):
                self._spoil(f"{encoding} though identity was asked for")
            self._is_stream = seen.malformed is None

    def feed(self, data: bytes, at: float) -> None:
        """A piece of the body."""
        if self._is_stream:
            for item in self._source.feed(data):
                self._item(item, at)
        elif len(self._seen.body) < MAX_BODY_BYTES:
            self._seen.body += data[:MAX_BODY_BYTES]

    def overdue(self, now: float) -> Ending | None:
        """Whether waiting has to end, and as what."""
        if self._done is not None:
            return Ending.COMPLETE if now - self._done > AFTER_DONE_S else None
        if self.started is not None and now - self.started > self._target.timeout_s:
            return Ending.TIMEOUT
        if self._last_token is not None and now - self._last_token > self._target.stall_s:
            return Ending.STALL
        return None

    def finish(self, ending: Ending, at: float, detail: str = "") -> Record:
        planned, seen = self._planned, self._seen
        for item in self._source.end():
            # Of anything else it is not known whether it came whole.
            if item.data == b"[DONE]" or (self._done is None and _is_error(item)):
                self._item(item, at)
        seen.is_written, seen.is_done, seen.text = self.written is not None, self._done is not None, self.text
        verdict = judge(seen, planned, self._target, ending, detail)
        cold = parse_cold(self._headers.get(self._cold_header))
        usage = seen.usage
        cached = usage.prompt_tokens_details if usage else None
        return Record(
            id=planned.id,
            model=planned.model,
            class_=planned.class_,
            intended_s=self.intended - self._start_at,
            started_s=self._since_start(self.started),
            connected_s=self._since_start(self.connected),
            written_s=self._since_start(self.written),
            first_byte_s=self._since_start(self.first_byte),
            first_token_s=self._since_start(self._first_token),
            second_token_s=self._since_start(self._second_token),
            last_token_s=self._since_start(self._last_token),
            done_s=self._since_start(at if self._done is None else self._done),
            outcome=verdict.outcome,
            failure=verdict.failure,
            detail=shorten(verdict.detail),
            status=seen.status,
            retry_after_s=_retry_after(self._headers) if verdict.outcome == "shed" else None,
            request_id=self._headers.get(b"x-request-id", self._event_id),
            cold=cold.kind,
            cold_ms=cold.parts_ms,
            input_tokens=planned.input_tokens if usage is None or usage.prompt_tokens is None else usage.prompt_tokens,
            cached_tokens=(cached.cached_tokens or 0) if cached else 0,
            output_tokens=seen.counted if usage is None or usage.completion_tokens is None else usage.completion_tokens,
            chunks=self._chunks,
            max_gap_s=max(seen.gaps_s, default=None),
            gaps_s=tuple(seen.gaps_s),
            bytes_in=self.bytes_in,
            deadline_s=planned.deadline_s,
            server_ttft_s=self._server_ttft,
        )

    def give_up(self, at: float, error: Exception) -> Record:
        """In place of `finish`, when that has failed."""
        return spoilt(
            self._planned,
            error,
            intended_s=self.intended - self._start_at,
            started_s=self._since_start(self.started),
            connected_s=self._since_start(self.connected),
            written_s=self._since_start(self.written),
            done_s=at - self._start_at,
        )

    def _item(self, item: Item, at: float) -> None:
        name, data = item
        if name == COMMENT:
            if data.startswith(STAMP):
                self._stamp(data)
            elif (header := data.partition(b":")[0].lower()) == self._cold_header:
                # The headers left with a ping, before the server knew.
                self._headers[header] = data.partition(b":")[2].strip().decode("latin-1")
        elif name == BROKEN:
            self._spoil("no line of an event stream", data)
        elif self._done is not None:
            self._spoil("an event after [DONE]", data)
        elif data == b"[DONE]":
            self._done = at
        else:
            try:
                event = _decoder.decode(data)
            except _NO_EVENT as error:
                if name == "error":
                    self._seen.error = self._seen.error or data.decode(errors="replace")
                else:
                    self._spoil(str(error), data)
                return
            if event.is_error or name == "error":
                self._seen.error = self._seen.error or event.message or data.decode(errors="replace")
            else:
                self._event(event, at)

    def _event(self, event: Event, at: float) -> None:
        seen = self._seen
        if event.model != self._planned.model and event.model not in SILENCE and seen.wrong_model is None:
            seen.wrong_model = event.model
        if not self._event_id and event.id not in SILENCE:
            self._event_id = event.id or ""
        if event.usage is not None and event.usage.completion_tokens is not None:
            seen.usage = event.usage
        tokens = 0
        for choice in event.choices or ():
            if choice.finish_reason:
                seen.finish_reason = choice.finish_reason
            if bears_tokens(choice):
                if choice.token_ids is None:
                    seen.has_ids_throughout = False
                    tokens += 1
                else:
                    tokens += len(choice.token_ids)
                if self._pieces is not None:
                    self._pieces.append(text_of(choice))
        if tokens:
            self._tokens(tokens, at)

    def _tokens(self, count: int, at: float) -> None:
        self._chunks += 1
        if self._last_token is None:
            self._first_token = at
        else:
            self._seen.gaps_s.append(at - self._last_token)
        self._last_token = at
        self._seen.counted += count
        if self._second_token is None and self._seen.counted >= 2:
            self._second_token = at

    def _stamp(self, comment: bytes) -> None:
        try:
            stamp = float(comment[len(STAMP) :])
        except ValueError:
            stamp = math.nan
        if math.isfinite(stamp):
            self._server_ttft = stamp
        else:
            self._spoil("a stamp that is no number", comment)

    def _spoil(self, why: str, seen: bytes = b"") -> None:
        if self._seen.malformed is None:
            self._seen.malformed = f"{why}: {seen[:100].decode(errors='replace')}" if seen else why

    def _since_start(self, at: float | None) -> float | None:
        return None if at is None else at - self._start_at


def spoilt(
    of: Planned | Record,
    error: Exception,
    *,
    intended_s: float,
    started_s: float | None,
    connected_s: float | None,
    written_s: float | None,
    done_s: float | None,
) -> Record:
    """Of an answer that no record could be made of: no more than what this side knows by itself."""
    return Record(
        id=of.id,
        model=of.model,
        class_=of.class_,
        intended_s=intended_s,
        started_s=started_s,
        connected_s=connected_s,
        written_s=written_s,
        done_s=done_s,
        outcome="failed",
        failure="malformed",
        detail=shorten(f"an answer that cannot be recorded: {error!a}"),
        deadline_s=of.deadline_s,
    )


def _is_error(item: Item) -> bool:
    if item.name in ("error", COMMENT, BROKEN):
        return item.name == "error"
    try:
        return _decoder.decode(item.data).is_error
    except _NO_EVENT:
        return False


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= DETAIL_CHARACTERS else line[: DETAIL_CHARACTERS - 1] + "…"


def _retry_after(headers: dict[bytes, str]) -> float | None:
    """Seconds. A date counts from the answer's own date (RFC 9110, section 10.2.3), and as 0 when that is missing."""
    value = headers.get(b"retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - parsedate_to_datetime(headers[b"date"])).total_seconds())
    except KeyError:
        return 0.0
    except (ValueError, TypeError, OverflowError):
        return None
