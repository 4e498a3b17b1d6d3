"""What a client makes of an answer, byte by byte and without a socket."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen.client.stream import AFTER_DONE_S, Reading
from serverlesslora_loadgen.client.timing import parse_cold
from serverlesslora_loadgen.client.verdict import Ending
from serverlesslora_loadgen.plan import Planned, Target
from serverlesslora_loadgen.record import Record

TARGET = Target(url="http://127.0.0.1:1", stall_s=5.0, timeout_s=60.0)
PLANNED = Planned(id=7, at_s=2.0, model="tea", body=b"{}", input_tokens=4, output_tokens=3, class_="Bursty")
STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"),)
START = 100.0  # of the run, on the clock that feeds the reading


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "cmpl-1", "model": "tea", **fields}).encode() + b"\n\n"


def token(text: str, ids: Sequence[int] | None = (1,), reason: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
    return event(choices=[choice if ids is None else {**choice, "token_ids": list(ids)}])


def delta(reason: str | None = None, **fields: Any) -> bytes:
    return event(object="chat.completion.chunk", choices=[{"index": 0, "delta": fields, "finish_reason": reason}])


def usage(tokens: int, prompt: int = 4, **more: Any) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": tokens, **more})


def lorax(text: str, reason: str | None = None, prompt: int = 0, made: int = 0) -> bytes:
    """As its router writes them: no name, no id, no space, and a usage that says nothing before the end."""
    fields = {
        "id": "null", "object": "text_completion", "created": 0, "model": "null",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}],
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made},
    }  # fmt: skip
    return b"data:" + json.dumps(fields).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
GOOD = (token("a"), token("b"), token("c", reason="length"), usage(3), DONE)


def read(
    pieces: Sequence[bytes],
    *,
    planned: Planned = PLANNED,
    target: Target = TARGET,
    status: int = 200,
    headers: Sequence[tuple[bytes, bytes]] = STREAM,
    ending: Ending = Ending.COMPLETE,
    detail: str = "",
    gap_s: float = 0.1,
) -> Record:
    """Sent at 102 s, first piece 0.5 s later, one piece every `gap_s`."""
    reading = Reading(planned, target, start_at=START, intended=START + planned.at_s)
    reading.started = reading.written = at = START + planned.at_s
    at += 0.5
    reading.first_byte = at
    if status:
        reading.head(status, headers)
    for number, piece in enumerate(pieces):
        reading.feed(piece, at + gap_s * number)
    return reading.finish(ending, at + gap_s * len(pieces), detail)


def test_an_answer_with_all_its_stamps() -> None:
    record = read(GOOD)
    assert (record.outcome, record.failure, record.id, record.class_) == ("ok", None, 7, "Bursty")
    assert record.intended_s == pytest.approx(2.0)
    assert record.ttft_s == pytest.approx(0.5) and record.ttst_s == pytest.approx(0.6)
    assert record.last_token_s == pytest.approx(2.7) and record.done_s == pytest.approx(
        2.9
    )  # [DONE] is the fifth piece
    assert record.gaps_s == pytest.approx((0.1, 0.1)) and record.max_gap_s == pytest.approx(0.1)
    assert (record.chunks, record.output_tokens, record.input_tokens) == (3, 3, 4)
    assert record.request_id == "cmpl-1" and record.cold == "unknown"


@given(cuts=st.lists(st.integers(0, len(b"".join(GOOD))), max_size=12), line_end=st.sampled_from([b"\n", b"\r\n"]))
def test_where_the_bytes_are_cut_does_not_matter(cuts: list[int], line_end: bytes) -> None:
    data = b"".join(GOOD).replace(b"\n", line_end)
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    whole = read([data], gap_s=0.0)
    assert read(pieces, gap_s=0.0) == whole
    assert whole.outcome == "ok"


DEALS: dict[str, tuple[list[bytes], str]] = {
    "vLLM": ([event(choices=[{"index": 0, "text": "", "prompt_token_ids": [1], "token_ids": None}]), *GOOD], "abc"),
    "vLLM reasoning": (
        [delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="a"), delta(content="b")]
        + [delta("stop"), usage(3, prompt_tokens_details={"cached_tokens": 2}), DONE],
        "hmab",
    ),
    "SGLang": (
        [delta(role="assistant", content="", reasoning_content=None, tool_calls=None), delta(content="ab")]
        + [delta(content="c"), delta("length", content=None, matched_stop=None), usage(3), DONE],
        "abc",
    ),
    "LoRAX": (
        [lorax("a"), lorax("b"), lorax("c", "length", 4, 3), b"data:[DONE]\n\n"],
        "abc",
    ),
    "llama.cpp": (
        [delta(role="assistant", content=None), delta(content="a"), delta(content="b"), delta(content="c")]
        + [delta("length"), event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 3}, timings={}), DONE],
        "abc",
    ),
    "tool calls": (
        [delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{"}}])]
        + [delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]), delta("tool_calls"), usage(3), DONE],
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("server", DEALS)
def test_dialects(server: str) -> None:
    pieces, text = DEALS[server]
    planned = msgspec.structs.replace(PLANNED, golden=text)
    record = read(pieces, planned=planned)
    assert (record.outcome, record.detail) == ("ok", "")
    assert record.output_tokens == 3
    assert record.ttft_s == pytest.approx(0.5 if server in ("LoRAX", "tool calls") else 0.6)  # a role is no token


def test_a_name_that_says_nothing_is_no_other_model() -> None:
    assert read(DEALS["LoRAX"][0]).request_id == ""
    unnamed = [part.replace(b'"tea"', b'""') for part in GOOD]
    assert read(unnamed).outcome == "ok"


def test_running_usage_and_cached_tokens() -> None:
    pieces = [token("a"), usage(1), token("b"), usage(2), token("c", reason="length")]
    record = read([*pieces, usage(3, prompt=9, prompt_tokens_details={"cached_tokens": 8}), DONE])
    assert (record.outcome, record.input_tokens, record.cached_tokens) == ("ok", 9, 8)
    not_yet = event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": None})
    assert read([not_yet, *GOOD[:3], usage(3), not_yet, DONE]).outcome == "ok"
    assert read([not_yet, *GOOD[:3], DONE]).failure == "no-usage"


def test_several_tokens_in_one_event() -> None:
    record = read([token("ab", (1, 2)), token("c", (3,), "length"), usage(3), DONE])
    assert (record.outcome, record.chunks, record.output_tokens) == ("ok", 2, 3)
    assert record.second_token_s == record.first_token_s
    without_ids = read([token("ab", None), token("c", None, "length"), usage(3), DONE])
    assert (without_ids.outcome, without_ids.chunks) == ("ok", 2)


def test_text_that_was_held_back_is_no_token_of_its_own() -> None:
    pieces = [token("", (1,)), token("", (2,)), token("ab", ()), token("c", (3,), "length"), usage(3), DONE]
    record = read(pieces, planned=msgspec.structs.replace(PLANNED, golden="abc"))
    assert (record.outcome, record.chunks, record.output_tokens) == ("ok", 3, 3)
    assert record.ttft_s == pytest.approx(0.5)


FAILURES: dict[str, tuple[list[bytes], str]] = {
    "error-event": ([token("a"), event(error={"message": "out of memory"}), DONE], "out of memory"),
    "error-event, named": ([token("a"), b"event: error\ndata: it broke\n\n"], "it broke"),
    "error-event, bare": ([b'data: {"object":"error","message":"no such adapter"}\n\n', DONE], "no such adapter"),
    "error-event, aborted": ([token("a", reason="abort"), usage(1), DONE], "abort"),
    "truncated": (list(GOOD[:-1]), "no [DONE]"),
    "truncated, early": ([token("a")], "after 1 tokens"),
    "truncated, at once": ([], "after 0 tokens"),
    "no-finish-reason": ([token("a"), token("b"), token("c"), usage(3), DONE], "3 tokens"),
    "error-event, alone": ([token("a"), b'error: {"code":500,"message":"boom"}\n\n'], "boom"),
    "error-event, cut off": ([token("a"), b'data: {"error":{"message":"boom"}}\n'], "boom"),
    "error-event, named and cut off": ([token("a"), b"event: error\ndata: it bro"], "it bro"),
    "truncated, a token cut off": ([*GOOD[:2], GOOD[2][:-1]], "after 2 tokens"),
    "no-finish-reason, an empty one": (
        [event(choices=[{"text": "a", "token_ids": [1], "finish_reason": ""}])] * 3 + [usage(3), DONE],
        "3 tokens",
    ),
    "usage-mismatch, nothing came": ([delta("length"), usage(3), DONE], "0 tokens came, usage says 3"),
    "malformed, a count beyond counting": ([*GOOD[:3], usage(2**70), DONE], "completion_tokens"),
    "malformed, too large a count": ([*GOOD[:3], usage(2**53), DONE], "completion_tokens"),
    "malformed, less than nothing": ([*GOOD[:3], usage(3, prompt=-1), DONE], "prompt_tokens"),
    "malformed, too deep": ([b"data: " + b'{"choices":' + b"[" * 100_000 + b"\n\n", DONE], ""),
    "malformed, a stamp": ([b": stamp=nan\n", *GOOD], "stamp"),
    "malformed, JSON alone": ([b'{"error": "boom"}\n\n'], "boom"),
    "no-usage": ([*GOOD[:3], DONE], "3 tokens"),
    "usage-mismatch": ([*GOOD[:3], usage(4), DONE], "usage says 4"),
    "usage-mismatch, a token lost": ([GOOD[0], *GOOD[2:]], "2 tokens came, usage says 3"),
    "usage-mismatch, more than counted": ([token("a", None)] * 4 + [token("", None, "length"), usage(3), DONE], "4 t"),
    "length-mismatch": ([token("a"), token("b", reason="stop"), usage(2), DONE], "3 tokens were asked for, 2 came"),
    "wrong-model": ([part.replace(b'"tea"', b'"coffee"') for part in GOOD], "asked tea, answered as coffee"),
    "wrong-model, once": ([GOOD[0], GOOD[1].replace(b'"tea"', b'"coffee"'), *GOOD[2:]], "coffee"),
    "malformed": ([token("a"), b"data: {not json\n\n", DONE], "not json"),
    "malformed, type": ([event(choices=[{"text": 5}]), DONE], "Expected"),
    "malformed, after the end": ([*GOOD, token("d")], "after [DONE]"),
    "malformed, no field": ([b"<html>\n\n"], "<html>"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case: str) -> None:
    pieces, seen = FAILURES[case]
    record = read(pieces)
    assert (record.outcome, record.failure) == ("failed", case.partition(",")[0])
    assert seen in record.detail


def test_another_text_than_the_golden_one() -> None:
    planned = msgspec.structs.replace(PLANNED, golden="abd")
    record = read(GOOD, planned=planned)
    assert record.failure == "wrong-answer" and "from character 2 on: 'd' was expected, 'c' came" in record.detail
    longer = read(GOOD, planned=msgspec.structs.replace(PLANNED, golden="abcd"))
    assert longer.failure == "wrong-answer"


def test_a_stall_between_tokens_counts_even_when_it_went_on() -> None:
    assert read(GOOD, gap_s=5.5).failure == "stall"
    assert read(GOOD, gap_s=4.5).failure is None


def test_without_exact_lengths_an_early_end_is_fine() -> None:
    target = msgspec.structs.replace(TARGET, ignore_eos=False)
    assert read([token("a"), token("b", reason="stop"), usage(2), DONE], target=target).outcome == "ok"
    for made in (0, 1):  # an end of text at once is a token to some, but no event
        at_once = [delta(role="assistant", content=""), delta("stop"), usage(made), DONE]
        assert read(at_once, target=target).outcome == "ok"
    lost = [token("a"), token("", (), "stop"), usage(3), DONE]
    assert read(lost, target=target).failure == "usage-mismatch"


def test_what_the_standard_lets_pass() -> None:
    assert read([b"\xef\xbb", b"\xbf" + GOOD[0], *GOOD[1:]]).outcome == "ok"
    assert read([b"x-foo: 1\nretry: 5\nid\n" + GOOD[0], *GOOD[1:]]).outcome == "ok"
    assert read([GOOD[0], b"\xef\xbb\xbf" + GOOD[1], *GOOD[2:]]).failure == "malformed"  # only one, in front


@pytest.mark.parametrize("value", [False, None, ""])
def test_no_error_is_no_error(value: object) -> None:
    assert read([event(error=value, choices=[]), *GOOD]).outcome == "ok"
    assert read([event(error={}, choices=[]), *GOOD]).failure == "error-event"


ENDINGS: list[tuple[Ending, int, list[bytes], str, str | None]] = [
    (Ending.CONNECT, 0, [], "failed", "connect"),
    (Ending.LOST, 0, [], "failed", "connect"),
    (Ending.LOST, 200, [GOOD[0]], "failed", "truncated"),
    (Ending.LOST, 200, list(GOOD), "ok", None),  # an answer may be as long as its connection
    (Ending.TIMEOUT, 0, [], "failed", "timeout"),
    (Ending.TIMEOUT, 200, [GOOD[0]], "failed", "timeout"),
    (Ending.STALL, 200, [GOOD[0]], "failed", "stall"),
    (Ending.MALFORMED, 0, [], "failed", "malformed"),
    (Ending.INTERRUPTED, 200, [GOOD[0]], "unsent", None),
    (Ending.INTERRUPTED, 200, list(GOOD), "ok", None),
    (Ending.LOCAL, 0, [], "unsent", None),
    (Ending.LOST, 503, [b"busy"], "shed", None),
    (Ending.TIMEOUT, 500, [b"oh"], "failed", "status"),
]


@pytest.mark.parametrize(("ending", "status", "pieces", "outcome", "failure"), ENDINGS)
def test_endings(ending: Ending, status: int, pieces: list[bytes], outcome: str, failure: str | None) -> None:
    record = read(pieces, status=status, ending=ending)
    assert (record.outcome, record.failure) == (outcome, failure)
    assert record.outcome == "ok" or record.detail


def test_a_timeout_before_anything_was_sent_is_a_connection_that_never_was() -> None:
    reading = Reading(PLANNED, TARGET, start_at=START, intended=START)
    reading.started = START
    assert reading.overdue(START + 59) is None
    assert reading.overdue(START + 61) is Ending.TIMEOUT
    assert reading.finish(Ending.TIMEOUT, START + 61).failure == "connect"


def test_how_long_one_waits() -> None:
    reading = Reading(PLANNED, TARGET, start_at=START, intended=START)
    reading.started = reading.written = START
    reading.head(200, STREAM)
    assert reading.overdue(START + 50) is None  # the first token may take long
    reading.feed(GOOD[0], START + 50)
    assert reading.overdue(START + 54) is None
    assert reading.overdue(START + 56) is Ending.STALL
    for piece in GOOD[1:]:
        reading.feed(piece, START + 54)
    assert reading.overdue(START + 54) is None
    assert reading.overdue(START + 54 + 2 * AFTER_DONE_S) is Ending.COMPLETE  # [DONE] is the end, whatever HTTP says


DATE = b"Sat, 21 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (429, [(b"retry-after", b"7")], b'{"error":{"message":"too many"}}', ("shed", None, 7.0, "429: too many")),
        (503, [], b"busy", ("shed", None, None, "503: busy")),
        (
            503,
            [(b"date", b"Sat, 21 Nov 2026 10:00:00 GMT"), (b"retry-after", b"Sat, 21 Nov 2026 10:00:09 GMT")],
            b"",
            ("shed", None, 9.0, "503"),
        ),
        (503, [(b"retry-after", b"soon")], b"", ("shed", None, None, "503")),
        (503, [(b"retry-after", b"1e999")], b"", ("shed", None, None, "503")),
        (503, [(b"retry-after", b"nan")], b"", ("shed", None, None, "503")),
        (
            429,
            [(b"date", DATE), (b"retry-after", DATE.replace(b"GMT", b"+99999999999999999"))],
            b"",
            ("shed", None, None, "429"),
        ),
        (500, [], b'{"detail":"oops"}', ("failed", "status", None, '500: {"detail":"oops"}')),
        (404, [], b'{"message":"no such model"}', ("failed", "status", None, "404: no such model")),
        (404, [], b'{"error":"no such model"}', ("failed", "status", None, "404: no such model")),
        (302, [(b"location", b"http://b/")], b"", ("failed", "status", None, "302 to http://b/")),
        (204, [], b"", ("failed", "status", None, "204")),
        (500, [], b"\xff\xfe", ("failed", "status", None, "500: ��")),
    ],
)
def test_other_statuses(
    status: int,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    expected: tuple[str, str | None, float | None, str],
) -> None:
    record = read([body], status=status, headers=headers)
    assert (record.outcome, record.failure, record.retry_after_s, record.detail) == expected
    assert record.status == status


def test_not_an_event_stream() -> None:
    record = read([b'{"choices":[]}'], headers=[(b"content-type", b"application/json")])
    assert record.failure == "malformed" and "application/json" in record.detail and "choices" in record.detail
    packed = read(GOOD, headers=[*STREAM, (b"content-encoding", b"gzip")])
    assert packed.failure == "malformed" and "gzip" in packed.detail


def test_what_the_server_says_of_itself() -> None:
    headers = [*STREAM, (b"x-serverlesslora-cold", b"worker;dur=16.4, adapter;dur=4.3"), (b"x-request-id", b"r-9")]
    record = read([b": ping\n\n: stamp=0.0125\n", *GOOD], headers=headers)
    assert (record.cold, record.cold_ms, record.request_id) == ("worker", {"worker": 16.4, "adapter": 4.3}, "r-9")
    assert record.server_ttft_s == 0.0125 and record.outcome == "ok"


def test_how_cold_it_was_may_come_as_a_comment_after_a_ping() -> None:
    late = b": ping\n\n: x-serverlesslora-cold: worker;dur=2900\n: x-serverlesslora-adapter: 1f\n\n"
    record = read([late, *GOOD], headers=STREAM)
    assert (record.cold, record.cold_ms, record.outcome) == ("worker", {"worker": 2900.0}, "ok")


def test_a_body_too_deep_to_be_read_is_told_as_it_came() -> None:
    record = read([b"[" * 100_000], status=500)
    assert record.failure == "status" and "[[[[" in record.detail


def test_lag_is_without_what_it_took_to_connect() -> None:
    record = msgspec.structs.replace(read(GOOD), started_s=2.001, connected_s=2.031, written_s=2.033)
    assert record.lag_s == pytest.approx(0.003) and record.connect_s == pytest.approx(0.03)
    kept = msgspec.structs.replace(record, connected_s=None)
    assert kept.lag_s == pytest.approx(0.033) and kept.connect_s is None


def test_details_stay_short() -> None:
    record = read([b"x" * 100_000], status=500)
    assert len(record.detail) <= 300


def test_what_follows_done_may_lack_its_empty_line() -> None:
    assert read([*GOOD[:-1], b"data: [DONE]"]).outcome == "ok"
    assert read([*GOOD[:-1], b"data: [DONE]\n"]).outcome == "ok"


@given(st.binary(max_size=200), st.integers(0, 4))
def test_any_bytes_end_in_a_record(junk: bytes, position: int) -> None:
    pieces = [*GOOD[:position], junk, *GOOD[position:]]
    record = read(pieces)
    assert record.outcome in ("ok", "failed")
    assert (record.failure is None) == (record.outcome == "ok")


@pytest.mark.parametrize(
    ("header", "kind", "parts"),
    [
        (None, "unknown", {}),
        ("hot;dur=0.0", "warm", {}),
        ("warm", "warm", {}),
        ("", "warm", {}),
        ("adapter-disk;dur=4", "adapter-disk", {"adapter-disk": 4.0}),
        ("backbone", "backbone", {"backbone": 0.0}),
        ('worker;desc="a, b;dur=9";dur=1.5,adapter; dur="2"', "worker", {"worker": 1.5, "adapter": 2.0}),
        (" , worker ;DUR=.5e1 , ", "worker", {"worker": 5.0}),
    ],
)
def test_cold_header(header: str | None, kind: str, parts: dict[str, float]) -> None:
    assert parse_cold(header) == (kind, parts)


@given(st.text(alphabet='abc;="\\, dur.19', max_size=60))
def test_no_cold_header_breaks_a_run(header: str) -> None:
    assert parse_cold(header).kind
