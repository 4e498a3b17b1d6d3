"""What the client costs: trials are judged by the records, and the search finds where it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen.analysis.calibrated import differences
from serverlesslora_loadgen.calibrate import (
    BEARABLE_S,
    CADENCES,
    PRECISION,
    RATE_RPS,
    Cadence,
    Kind,
    Trial,
    calibrate,
    largest,
    measure,
    missed,
    peak,
    percentile,
    read_calibration,
    requests_of,
    summarise,
    write_calibration,
)
from serverlesslora_loadgen.client.drive import Driven
from serverlesslora_loadgen.environment import environment
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Calibration


def record(number: int, *, sent: float, lag: float = 0.0, added: float = 0.0, lasts: float = 1.0) -> Record:
    return Record(
        id=number,
        model="a",
        intended_s=sent - lag,
        written_s=sent,
        first_token_s=sent + 0.02 + added,
        server_ttft_s=0.02,
        done_s=sent + lasts,
        chunks=16,
        outcome="ok",
    )


def driven(records: list[Record]) -> Driven:
    return Driven(records, began_at=0.0, began_unix=0.0, seconds=2.0, cpu_s=1.0, processes=1, late_sockets=0)


def calibration(**found: float) -> Calibration:
    good = {"added_ttft_p50_s": 0.0001, "added_ttft_p99_s": 0.0005, "lag_p99_s": 0.001, "rate_rps": 300.0}
    return msgspec.convert({"measured_at": "2026-01-01T00:00:00+00:00", **good, **found}, Calibration)


# --- the search


@given(st.integers(0, 200_000), st.integers(1, 5000), st.integers(1, 150_000))
def test_the_search_ends_close_to_the_edge(edge: int, start: int, limit: int) -> None:
    start = min(start, limit)
    asked: list[int] = []

    async def is_borne(number: int) -> bool:
        asked.append(number)
        return number <= edge

    found = asyncio.run(largest(is_borne, start, limit=limit))
    assert found <= edge
    assert all(1 <= number <= limit for number in asked)
    assert len(set(asked)) == len(asked) < 40
    if found == 0:
        assert edge < max(1, start // 8) * 2
    elif found < limit:
        assert min(edge, limit) < max(found * PRECISION, found + 1)


# --- what a trial is judged by


def test_lag_and_added_time_are_told_apart() -> None:
    records = [record(i, sent=i / 100, lag=0.001 * i, added=0.0001 * i) for i in range(1, 101)]
    trial = summarise("rate", 100, driven(records), server_cpu_s=0.5)
    assert trial.lag_p50_s == pytest.approx(0.05) and trial.lag_p99_s == pytest.approx(0.099)
    assert trial.added_p50_s == pytest.approx(0.005) and trial.added_p99_s == pytest.approx(0.0099)
    assert (trial.client_cpu, trial.server_cpu, trial.events_per_s) == (0.5, 0.25, 800.0)
    assert not trial.is_borne


def test_a_client_that_keeps_up_is_borne() -> None:
    records = [record(i, sent=i / 100, lag=BEARABLE_S / 2, added=BEARABLE_S / 2) for i in range(100)]
    assert summarise("rate", 100, driven(records), server_cpu_s=0.0).is_borne


@pytest.mark.parametrize("late", [{"lag": 2 * BEARABLE_S}, {"added": 2 * BEARABLE_S}])
def test_two_late_ones_in_a_hundred_are_too_many(late: dict[str, float]) -> None:
    records = [record(i, sent=i / 100) for i in range(98)]
    assert summarise("rate", 100, driven(records), server_cpu_s=0.0).is_borne
    records += [record(i, sent=i / 100, **late) for i in (98, 99)]
    assert not summarise("rate", 100, driven(records), server_cpu_s=0.0).is_borne


def test_one_answer_that_is_not_right_is_not_borne() -> None:
    records = [record(i, sent=i / 100) for i in range(100)]
    records[3] = msgspec.structs.replace(records[3], outcome="failed", failure="truncated")
    records[4] = msgspec.structs.replace(records[4], outcome="unsent")
    trial = summarise("rate", 100, driven(records), server_cpu_s=0.0)
    assert trial.faults == {"truncated": 1, "unsent": 1}
    assert not trial.is_borne


def test_nothing_answered_is_not_borne() -> None:
    lost = Record(id=0, model="a", intended_s=0.0, outcome="failed", failure="connect")
    trial = summarise("rate", 1, driven([lost]), server_cpu_s=0.0)
    assert (trial.lag_p99_s, trial.added_p99_s, trial.peak_streams, trial.is_borne) == (None, None, 0, False)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=30))
def test_the_peak_is_the_most_that_are_open_at_any_instant(spans: list[tuple[int, int]]) -> None:
    records = [record(i, sent=sent, lasts=lasts) for i, (sent, lasts) in enumerate(spans)]
    open_at = [sum(sent <= at < sent + lasts for sent, lasts in spans) for at in range(61)]
    assert peak(records) == max(open_at)


@given(st.lists(st.integers(0, 100), min_size=1), st.floats(0, 1))
def test_percentiles_are_values_that_were_seen(values: list[int], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) <= max(share * len(values), 0)


@pytest.mark.parametrize(("kind", "count"), [("rate", 600), ("streams", 300)])
def test_trials_ask_what_they_say(kind: Kind, count: int) -> None:
    requests = requests_of(kind, 300, CADENCES[kind], seconds=2.0)
    assert len(requests) == count
    last_s = requests[-1].timestamp / 1e3
    assert last_s <= (2.0 if kind == "rate" else CADENCES[kind].seconds)
    assert requests == requests_of(kind, 300, CADENCES[kind], seconds=2.0)
    assert [each.timestamp for each in requests] == sorted(each.timestamp for each in requests)


# --- what is said of it


def test_promises_that_do_not_hold_are_said() -> None:
    assert missed(calibration()) == []
    assert missed(calibration(max_rps=1000.0, max_streams=2000)) == []
    assert "leaves 6.00 ms late" in missed(calibration(lag_p99_s=0.006))[0]
    assert "adds 1.50 ms" in missed(calibration(added_ttft_p99_s=0.0015))[0]
    assert missed(calibration(max_rps=999.0, max_streams=0)) == [
        "the client bears 999 requests/s; 1000 are promised",
        "the client bears 0 streams at once; 2000 are promised",
    ]


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration(max_streams=7))
    assert read_calibration(path) == calibration(max_streams=7)


@pytest.mark.parametrize("content", [None, b"{}", b"nothing"])
def test_what_is_no_calibration_is_said(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultError, match="calibration"):
        read_calibration(path)


@pytest.mark.parametrize("seconds", [0.0, 0.5, -1.0, float("nan")])
def test_one_request_is_no_rate(seconds: float) -> None:
    with pytest.raises(ResultError, match="1 s or more"):
        asyncio.run(calibrate(seconds=seconds, search=False))


# --- for real, and short


def test_the_client_against_the_null_server() -> None:
    seen: list[Trial] = []
    found = asyncio.run(calibrate(seconds=1.0, search=False, on_trial=seen.append))
    assert [(trial.kind, trial.asked, trial.requests, trial.faults) for trial in seen] == [
        ("rate", RATE_RPS, RATE_RPS, {})
    ]
    assert differences(found, environment(), 1) == []
    assert differences(found, environment(), 2) == ["client processes: 1, not 2"]
    assert found.max_rps is found.max_streams is None
    assert found.setup["trials"] == msgspec.to_builtins(seen)
    assert found.added_ttft_p50_s <= found.added_ttft_p99_s < 1
    assert 0 <= found.lag_p99_s < 1


def test_all_streams_are_open_at_one_time() -> None:
    cadence = Cadence(ttft_ms=1, tpot_ms=100, tokens=12)
    trial = asyncio.run(measure("streams", 40, cadence, processes=2, seconds=0.0))
    assert (trial.requests, trial.peak_streams, trial.faults) == (40, 40, {})
