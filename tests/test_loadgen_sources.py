"""Published traces become ours: their layouts, what is assumed on the way, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen.classes import CLASSES, adapter_facts, class_of, cv
from serverlesslora_loadgen.errors import TraceError, WorkloadError
from serverlesslora_loadgen.generate.lengths import EmpiricalLengths, FixedLengths
from serverlesslora_loadgen.sources import SOURCES, USED, ImportOptions, import_trace
from serverlesslora_loadgen.sources.adapters import check_classes, names
from serverlesslora_loadgen.sources.choosing import Candidate, choose, fit
from serverlesslora_loadgen.sources.functions import _placed
from serverlesslora_loadgen.sources.jitter import clock_step_ms
from serverlesslora_loadgen.sources.servegen import Window, _drawn
from serverlesslora_loadgen.trace import TraceRequest, encode, read_trace, write_trace

LENGTHS = FixedLengths(100, 20)
HEADERS = {
    "In-Vitro's old one": ("HashFunction,HashApp,HashOwner", "minute_"),
    "In-Vitro's": ("HashOwner,HashApp,HashFunction", ""),
    "Azure's": ("HashOwner,HashApp,HashFunction,Trigger", ""),
}


def minutes_file(
    folder: Path, counts: Sequence[Sequence[int]], style: str = "Azure's", first: int = 1, trigger: str = "http"
) -> Path:
    names, prefix = HEADERS[style]
    lines = [",".join([names, *(f"{prefix}{first + at}" for at in range(len(counts[0])))])]
    for number, row in enumerate(counts):
        hashes = [f"f{number}"] * 3 + [trigger] * ("Trigger" in names)
        lines.append(",".join([*hashes, *map(str, row)]))
    path = folder / "functions.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def per_minute(requests: Sequence[TraceRequest]) -> dict[str, Counter[int]]:
    counted: dict[str, Counter[int]] = {}
    for request in requests:
        counted.setdefault(request.model, Counter())[int(request.timestamp // 60_000)] += 1
    return counted


# --- Azure Functions, 2019


@pytest.mark.parametrize("style", HEADERS)
def test_every_style_of_header_is_read(tmp_path: Path, style: str) -> None:
    path = minutes_file(tmp_path, [[0, 2, 0], [5, 0, 1]], style)
    requests = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS)).requests
    assert per_minute(requests) == {"adapter-00": {0: 5, 2: 1}, "adapter-01": {1: 2}}  # the most popular first
    assert {(each.input_length, each.output_length) for each in requests} == {(100, 20)}
    assert [each.timestamp for each in requests] == sorted(each.timestamp for each in requests)


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=6),
    begin=st.integers(0, 5),
    minutes=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_no_invocation_is_lost_or_leaves_its_minute(
    tmp_path_factory: pytest.TempPathFactory, counts: list[list[int]], begin: int, minutes: int, seed: int
) -> None:
    path = minutes_file(tmp_path_factory.mktemp("functions"), counts)
    taken = [Counter({at: n for at, n in enumerate(row[begin : begin + minutes]) if n}) for row in counts]
    taken = [each for each in taken if each]
    options = ImportOptions(lengths=LENGTHS, seed=seed, start_s=60 * begin, duration_s=60 * minutes)
    if not taken:
        with pytest.raises(WorkloadError, match="has 0"):
            import_trace("azure-functions", path, options)
        return
    found = per_minute(import_trace("azure-functions", path, options).requests)
    assert Counter(frozenset(each.items()) for each in found.values()) == Counter(
        frozenset(each.items()) for each in taken
    )


def test_the_same_seed_is_the_same_trace(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[7, 0, 30], [0, 12, 3]])

    def trace(seed: int) -> bytes:
        options = ImportOptions(lengths=FixedLengths(3, 4), seed=seed)
        return b"".join(encode(import_trace("azure-functions", path, options).requests))

    assert trace(1) == trace(1) != trace(2)


def test_a_function_is_placed_alike_whichever_others_are_taken(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[40, 0, 30], [0, 12, 3]])
    both = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS)).requests
    one = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, popularity_cap=15)).requests
    assert [each.timestamp for each in one] == [each.timestamp for each in both if each.model == "adapter-01"]
    assert len(one) == 15  # the cap itself is not too popular


def test_time_may_begin_and_end_inside_a_minute(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[600, 600, 600]])
    requests = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, start_s=30, duration_s=60)).requests
    assert 480 < len(requests) < 720
    assert 0 <= requests[0].timestamp < 1000 and 59_000 < requests[-1].timestamp <= 60_000


def test_times_count_from_the_first_minute_of_the_file(tmp_path: Path) -> None:
    imported = import_trace(
        "azure-functions", minutes_file(tmp_path, [[0, 4]], first=480), ImportOptions(lengths=LENGTHS)
    )
    assert per_minute(imported.requests) == {"adapter-00": {1: 4}}
    assert any("first minute, 480" in note for note in imported.notes)


def test_only_functions_with_the_trigger(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[9, 9]], trigger="http")
    path.write_text(path.read_text() + "x,x,x,timer,1,0\n")
    requests = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, trigger="timer")).requests
    assert per_minute(requests) == {"adapter-00": {0: 1}}
    with pytest.raises(WorkloadError, match="no trigger 'queue'; there are http, timer"):
        import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, trigger="queue"))


def regular(n: int) -> list[int]:
    """Counts per minute that come out Predictable: as nearly one as n allows."""
    return [n // 60 + (at < n % 60) for at in range(60)]


def in_one_minute(at: int, n: int) -> list[int]:
    """Bursty: everything at once but for one request at either end."""
    row = [0] * 60
    row[0] = row[59] = 1
    row[at] = n - 2
    return row


def test_adapters_are_of_the_classes_asked_for_in_their_order(tmp_path: Path) -> None:
    counts = [regular(n) for n in (60, 120, 180, 240)] + [in_one_minute(20 + n, 40 * n) for n in range(2, 6)]
    path = minutes_file(tmp_path, counts)
    imported = import_trace(
        "azure-functions", path, ImportOptions(lengths=LENGTHS, classes=("Bursty", "Predictable"), functions=5)
    )
    facts = {each.model: each for each in adapter_facts(imported.requests)}
    classes = [facts[f"adapter-{number:02d}"].class_ for number in range(5)]
    assert classes == ["Bursty"] * 3 + ["Predictable"] * 2
    assert [facts[f"adapter-{number:02d}"].n for number in range(5)] == [200, 160, 80, 240, 60]
    assert all(each.class_ == facts[each.model].class_ for each in imported.requests)
    assert any("Predictable up to 1" in note for note in imported.notes)  # the definition goes with the claim


def test_classes_with_too_few_functions_are_refused(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [regular(60), [3] + [0] * 59])
    with pytest.raises(WorkloadError, match=r"2 Predictable functions are asked for, and .* has 1 with at least 15"):
        import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, classes=("Predictable",), functions=2))
    with pytest.raises(WorkloadError, match=r"has 0 with at most 2 requests"):
        import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, popularity_cap=2))


def test_a_rate_is_met_by_passing_over_the_busiest(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [regular(n) for n in range(60, 1260, 60)])
    imported = import_trace(
        "azure-functions", path, ImportOptions(lengths=LENGTHS, classes=("Predictable",), functions=4, rate_rps=0.5)
    )
    facts = adapter_facts(imported.requests)
    assert len(imported.requests) == pytest.approx(1800, rel=0.05)
    assert all(each.n % 60 == 0 for each in facts)  # whole functions, each with all it had
    with pytest.raises(WorkloadError, match="take more functions"):
        import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, functions=2, rate_rps=2))


def test_a_class_that_does_not_hold_is_found(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [regular(120)])
    requests = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, classes=("Predictable",))).requests
    check_classes(requests)
    bunched = [msgspec.structs.replace(each, timestamp=each.timestamp**4) for each in requests]
    with pytest.raises(WorkloadError, match="adapter-00 was chosen as Predictable, and its 120 requests came out as"):
        check_classes(bunched)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HashFunction,1,2,4\nf,1,1,1\n", ":1 has a gap between its minutes"),
        ("HashFunction,1,Trigger,2\nf,1,http,1\n", ":1 has a gap between its minutes"),
        ("HashFunction,Trigger\nf,http\n", ":1 names no minutes"),
        ("HashApp,1\nf,1\n", "has no HashFunction"),
        ("HashFunction,1\nf,1\n\ng,many\n", ":4 has 'many' for a minute"),
        ("HashFunction,1\nf,-1\n", ":2 has '-1' for a minute"),
        ("HashFunction,1\nf,1.5\n", ":2 has '1.5' for a minute"),
        ("HashFunction,1,2\nf,1\n", ":2 has 2 cells"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "`git lfs pull` fetches"),
        ("", "is empty"),
    ],
)
def test_a_broken_file_of_minutes_is_told_by_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "functions.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as raised:
        import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS))
    assert str(path) in str(raised.value) and message in str(raised.value)


def test_counts_as_data_frames_write_them(tmp_path: Path) -> None:
    path = tmp_path / "functions.csv"
    path.write_text("HashFunction,1,2,3\nf,2.0,,1\n")
    requests = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS)).requests
    assert per_minute(requests) == {"adapter-00": {0: 2, 2: 1}}


def test_time_after_the_end_is_refused(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[1, 1]])
    with pytest.raises(TraceError, match="has 2 minutes, none of them after 2 min"):
        import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, start_s=120))


@pytest.mark.parametrize("kind", ["azure-functions", "azure-functions-2021", "servegen"])
def test_sources_without_lengths_want_a_law(tmp_path: Path, kind: str) -> None:
    with pytest.raises(WorkloadError, match="says nothing of the lengths"):
        import_trace(kind, tmp_path / "none.csv", ImportOptions())


def test_lengths_are_drawn_in_pairs_of_a_file(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("ContextTokens,GeneratedTokens\n10,1\n20,2\n30,3\n")
    path = minutes_file(tmp_path, [[300]])
    requests = import_trace("azure-functions", path, ImportOptions(lengths=EmpiricalLengths(str(pairs)))).requests
    assert {(each.input_length, each.output_length) for each in requests} == {(10, 1), (20, 2), (30, 3)}


# --- choosing


@given(
    requests=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    wanted=st.integers(1, 30) | st.none(),
    goal=st.floats(1, 20_000),
)
def test_the_nearest_choice_is_found_by_halving(requests: list[int], wanted: int | None, goal: float) -> None:
    group = [Candidate(place, n, None) for place, n in enumerate(sorted(requests, reverse=True))]
    if wanted is not None and wanted > len(group):
        return
    slices = [group[top:] for top in range(len(group) - (wanted or 1) + 1)]
    if wanted is not None:
        slices = [fit(each, wanted, None) for each in slices]  # evenly over what is left, without looking at a goal
    nearest = min(abs(sum(each.requests for each in one) - goal) for one in slices)
    chosen = fit(group, wanted, goal)
    assert abs(sum(each.requests for each in chosen) - goal) == nearest
    assert len(set(chosen)) == len(chosen) == (wanted or len(chosen))


@given(n=st.integers(1, 60), wanted=st.integers(1, 60))
def test_ranks_are_taken_evenly_from_the_first_to_the_last(n: int, wanted: int) -> None:
    if wanted > n:
        return
    chosen = fit([Candidate(place, n - place, None) for place in range(n)], wanted, None)
    ranks = [each.place for each in chosen]
    assert ranks[0] == 0 and (wanted == 1 or ranks[-1] == n - 1)
    gaps = np.diff(ranks)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_a_part_that_does_not_divide_goes_to_the_classes_named_first() -> None:
    group = [Candidate(place, 100, CLASSES[place % 3]) for place in range(30)]
    chosen = choose(group, ImportOptions(classes=CLASSES, functions=8), 60.0)
    assert Counter(each.class_ for each in chosen) == {"Predictable": 3, "Normal": 3, "Bursty": 2}


def test_names_sort_as_numbers_do() -> None:
    assert names(2) == ["adapter-00", "adapter-01"]
    assert sorted(names(1200)) == names(1200) and names(1200)[-1] == "adapter-1199"


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"start_s": -1.0},
        {"duration_s": 0.0},
        {"functions": 0},
        {"rate_rps": 0.0},
        {"classes": ("Sleepy",)},
        {"classes": ("Bursty", "Bursty")},
        {"classes": CLASSES, "functions": 2},
        {"jitter_ms": float("nan")},
        {"popularity_cap": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(WorkloadError):
        ImportOptions(**wrong)  # type: ignore[arg-type]


# --- Azure Functions, 2021


def test_an_invocation_begins_at_its_end_less_its_duration(tmp_path: Path) -> None:
    path = tmp_path / "2021.csv"
    path.write_text("app,func,end_timestamp,duration\na,f,12.5,2\na,f,3,1\nb,f,4,3.5\na,g,1,2\n")
    imported = import_trace("azure-functions-2021", path, ImportOptions(lengths=LENGTHS))
    # Functions of the same name in two apps are two; what began before the log did is left out, and said so.
    assert [(each.timestamp, each.model) for each in imported.requests] == [
        (500.0, "adapter-01"),
        (2000.0, "adapter-00"),
        (10_500.0, "adapter-00"),
    ]
    assert any("1 invocations that began before" in note for note in imported.notes)


# --- logs


def test_azure_llm_of_both_years(tmp_path: Path) -> None:
    old, new = tmp_path / "2023.csv", tmp_path / "2024.csv.gz"
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    old.write_text(f"{header}2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n")
    with gzip.open(new, "wt") as file:
        file.write(f"{header}2024-05-10 23:59:59.009930+00:00,374,44\n2024-05-11 00:00:03.324509+00:00,396,109\n")
    traces = [import_trace("azure-llm", path, ImportOptions(model="chat")).requests for path in (old, new)]
    assert (
        traces[0]
        == traces[1]
        == [
            TraceRequest(0.0, 374, 44, "chat"),
            TraceRequest(4314.579, 396, 109, "chat"),
        ]
    )


def test_a_log_is_cut_and_read_no_further_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "2023.csv"
    at = [f"2023-11-16 18:{minute:02d}:00,1,{minute}" for minute in (10, 12, 11, 13, 9)] + [
        "2023-11-16 23:00:00,1,1",
        "this row is never looked at",
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *at]) + "\n")
    imported = import_trace("azure-llm", path, ImportOptions(start_s=60, duration_s=120))
    assert [(each.timestamp, each.output_length) for each in imported.requests] == [(0.0, 11), (60_000.0, 12)]
    assert any(note.startswith("1 requests from before") for note in imported.notes)
    with pytest.raises(TraceError, match="has no request from 9000 s to 9001 s"):
        import_trace("azure-llm", path, ImportOptions(start_s=9000, duration_s=1))
    with pytest.raises(TraceError, match=r":8 has 'this row is never looked at' for TIMESTAMP"):
        import_trace("azure-llm", path, ImportOptions())


BURST = """Timestamp,{}Model,Request tokens,Response tokens,Total tokens,Log Type
86405,{}ChatGPT,472,18,490,Conversation log
86445,{}ChatGPT,1087,0,1087,Conversation log
86445,{}GPT-4,417,276,693,API log
172905,{}GPT-4,1,2,3,API log
"""


def test_azure_llm_is_spread_before_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "2023.csv"
    at = [f"2023-11-16 18:{number // 60:02d}:{number % 60:02d},1,{number}" for number in range(600)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *at]) + "\n")
    cut = import_trace("azure-llm", path, ImportOptions(start_s=60, duration_s=30, jitter_ms=10_000)).requests
    assert cut[0].timestamp >= 0 and cut[-1].timestamp < 30_000 and 20 <= len(cut) <= 40
    assert min(each.output_length for each in cut) in range(50, 60)  # put off into the time that is taken
    assert len({each.timestamp % 1000 for each in cut}) > 15


def test_burstgpt_is_spread_into_the_time_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    rows = [f"{number},M,{number + 1},5,{number + 6},API log" for number in range(300)]
    path.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *rows]) + "\n")
    cut = import_trace("burstgpt", path, ImportOptions(start_s=60, duration_s=30, jitter_ms=10_000)).requests
    assert cut[-1].timestamp < 30_000 and min(each.input_length for each in cut) in range(51, 60)


def burst(path: Path, *, sessions: bool) -> Path:
    cells = ["Session ID,Elapsed time,", "a,3,", "a,2,", ",1,", "b,1,"] if sessions else [""] * 5
    path.write_text(BURST.format(*cells))
    return path


@pytest.mark.parametrize("sessions", [False, True])
def test_burstgpt_of_both_layouts(tmp_path: Path, sessions: bool) -> None:
    path = burst(tmp_path / "burst.csv", sessions=sessions)
    imported = import_trace("burstgpt", path, ImportOptions(jitter_ms=0, duration_s=3600))
    assert imported.requests == [
        TraceRequest(5000.0, 472, 18, "ChatGPT", session="a" if sessions else None),
        TraceRequest(45_000.0, 417, 276, "GPT-4"),
    ]
    notes = " ".join(imported.notes)
    assert "second 86400" in notes and "1 requests that failed" in notes and "come in volleys" in notes


def test_whole_seconds_are_spread_over_their_second(tmp_path: Path) -> None:
    path = burst(tmp_path / "burst.csv", sessions=False)
    requests = import_trace("burstgpt", path, ImportOptions(seed=3)).requests
    assert [each.timestamp // 1000 for each in requests] == [5, 45, 86_505]
    assert all(each.timestamp % 1000 for each in requests)
    path.write_text(path.read_text().replace("86405,", "86405.25,"))  # a clock that is not of whole seconds
    assert import_trace("burstgpt", path, ImportOptions()).requests[0].timestamp == 5250.0


def mooncake(path: Path, times: Sequence[int]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"timestamp": at, "input_length": 700, "output_length": 5, "hash_ids": [0, number]}) + "\n"
            for number, at in enumerate(times)
        )
    )
    return path


def test_volleys_of_a_coarse_clock_are_spread_over_its_steps(tmp_path: Path) -> None:
    coarse = [3000 * (number // 10) - (number % 70 == 0 and number > 0) for number in range(400)]
    path = mooncake(tmp_path / "trace.jsonl", sorted(coarse))
    imported = import_trace("mooncake", path, ImportOptions(model="chat"))
    gaps = np.diff([each.timestamp for each in imported.requests])
    assert gaps.mean() == pytest.approx(300, rel=0.05) and (gaps > 0).mean() > 0.99 and gaps.std() < 2 * gaps.mean()
    originals = read_trace(path)
    for request in imported.requests:
        assert request.hash_ids is not None and request.model == "chat"
        assert 0 <= request.timestamp - originals[request.hash_ids[1]].timestamp <= 3000
    assert any("steps of 3 s" in note for note in imported.notes)
    raw = import_trace("mooncake", path, ImportOptions(jitter_ms=0))
    assert raw.requests == originals and any("volleys" in note for note in raw.notes)


def test_a_fine_clock_is_left_alone(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "trace.jsonl", [7 * number for number in range(500)])
    imported = import_trace("jsonl", path, ImportOptions())
    assert imported.requests == read_trace(path) and not imported.notes
    assert clock_step_ms([0.0] * 10 + [3000.0] * 10) is None  # too few to say
    assert clock_step_ms([0.0] * 100) is None
    cut = import_trace("jsonl", path, ImportOptions(start_s=0.35, duration_s=0.035)).requests
    assert [each.timestamp for each in cut] == [0, 7, 14, 21, 28]


def test_an_imported_trace_is_the_same_when_read_back(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[200, 100], [3, 0]])
    requests = import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS)).requests
    write_trace(tmp_path / "trace.jsonl.gz", requests)
    assert read_trace(tmp_path / "trace.jsonl.gz") == requests


# --- ServeGen


def clients_file(folder: Path, rows: Sequence[str]) -> Path:
    path = folder / "clients.csv"
    path.write_text("\n".join(["client,window_start_s,rate_rps,cv,pattern,p1_shape,p2_scale", *rows]) + "\n")
    return path


def test_a_client_has_the_requests_of_every_window(tmp_path: Path) -> None:
    rows = ["0,0,0.5,1,Gamma,1,1", "0,600,0.25,4,Weibull,0.3,1", "0,1800,0.00167,1,Gamma,1,1", "5,1200,1,1,Gamma,9,1"]
    path = clients_file(tmp_path, rows)
    imported = import_trace("servegen", path, ImportOptions(lengths=LENGTHS))
    counted = {
        model: Counter(int(each.timestamp // 600_000) for each in imported.requests if each.model == model)
        for model in ("adapter-00", "adapter-01")
    }
    assert counted == {"adapter-00": {2: 600}, "adapter-01": {0: 300, 1: 150, 3: 1}}
    part = import_trace("servegen", path, ImportOptions(lengths=LENGTHS, start_s=600, duration_s=600)).requests
    assert len(part) == 150 and part[-1].timestamp < 600_000
    with pytest.raises(TraceError, match="ends at 2400 s"):
        import_trace("servegen", path, ImportOptions(lengths=LENGTHS, start_s=2400))


@pytest.mark.parametrize(
    ("law", "shape", "expected"),
    [("Gamma", 0.25, 2.0), ("Gamma", 100.0, 0.1), ("Weibull", 0.5, 5**0.5), ("Weibull", 2.0, 0.5227)],
)
def test_gaps_have_the_shape_that_was_fitted(law: str, shape: float, expected: float) -> None:
    times = _drawn([Window(0.0, 50.0, law, shape)], 600.0, (1, 2, 3))
    assert len(times) == 30_000 and cv(times) == pytest.approx(expected, rel=0.05)


@given(
    law=st.sampled_from(["Gamma", "Weibull"]),
    shape=st.floats(0.005, 1e5),
    n=st.integers(1, 50),
    number=st.integers(0, 2015),
)
def test_any_shape_stays_inside_its_window(law: str, shape: float, n: int, number: int) -> None:
    start_s = 600.0 * number
    times = _drawn([Window(start_s, n / 600, law, shape)], 600.0, (0, 0, n))
    assert len(times) == n and np.all(np.diff(times) >= 0)
    assert np.all((times >= start_s) & (times < start_s + 600))


def test_servegen_s_own_files_say_the_same_as_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "m-small"
    folder.mkdir()
    (folder / "chunk-0-trace.csv").write_text("0,0.5,1.1,Gamma,0.8,0.04\n600,0,0,,0,0\n1200,0.1,2,Weibull,0.5,1\n")
    (folder / "chunk-11-trace.csv").write_text("0,0,0,,0,0\n600,0.2,1,Gamma,1,1\n1200,0,0,,0,0\n")
    (folder / "chunk-0-dataset.json").write_text("{}")
    rows = ["0,0,0.5,1.1,Gamma,0.8,0.04", "0,1200,0.1,2,Weibull,0.5,1", "11,600,0.2,1,Gamma,1,1"]
    options = ImportOptions(lengths=LENGTHS, functions=2)
    assert (
        import_trace("servegen", folder, options).requests
        == import_trace("servegen", clients_file(tmp_path, rows), options).requests
    )
    with pytest.raises(TraceError, match="has no chunk-<client>-trace"):
        import_trace("servegen", tmp_path, options)


@pytest.mark.parametrize(
    "row", ["0,0,1,1,Pareto,1,1", "0,0,1,1,Gamma,0,1", "0,0,-1,1,Gamma,1,1", "0,0,inf,1,Gamma,1,1"]
)
def test_a_client_that_cannot_be_drawn_is_told_by_its_place(tmp_path: Path, row: str) -> None:
    with pytest.raises(TraceError, match=r"clients\.csv:2 has"):
        import_trace("servegen", clients_file(tmp_path, [row]), ImportOptions(lengths=LENGTHS))


# --- all of them


def test_an_unknown_source_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="'bailian' is no source of traces; there are mooncake, jsonl"):
        import_trace("bailian", tmp_path, ImportOptions())


@pytest.mark.parametrize("kind", SOURCES)
def test_a_file_that_is_not_there_is_a_trace_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(TraceError, match=r"none\.csv"):
        import_trace(kind, tmp_path / "none.csv", options_for(kind))


def options_for(kind: str) -> ImportOptions:
    return ImportOptions(lengths=LENGTHS) if "lengths" in USED[kind] else ImportOptions()


OF_EACH: dict[str, object] = {
    "model": "m",
    "jitter_ms": 5.0,
    "lengths": LENGTHS,
    "functions": 3,
    "classes": ("Bursty",),
    "popularity_cap": 9,
    "rate_rps": 2.0,
    "trigger": "http",
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(
            (kind, "--functions --classes --rate --trigger --popularity-cap --lengths")
            for kind in ("azure-llm", "jsonl")
        ),
        *(
            (kind, "--functions --classes --rate --trigger --popularity-cap --lengths")
            for kind in ("mooncake", "burstgpt")
        ),
        ("azure-functions", "--jitter-ms --model"),
        *((kind, "--jitter-ms --model --trigger") for kind in ("azure-functions-2021", "servegen")),
    ],
)
def test_what_a_source_has_no_use_for_is_refused(tmp_path: Path, kind: str, options: str) -> None:
    refused = set()
    for name, value in OF_EACH.items():
        with pytest.raises((WorkloadError, TraceError)) as raised:
            import_trace(kind, tmp_path / "none.csv", ImportOptions(**{name: value}))  # type: ignore[arg-type]
        if (found := re.match(rf"{kind} has no use for (--[a-z-]+); leave it out", str(raised.value))) is not None:
            refused.add(found[1])
    assert refused == set(options.split())
    with pytest.raises(WorkloadError, match=r"jsonl has no use for --functions, --rate; leave them out"):
        import_trace("jsonl", tmp_path / "none.csv", ImportOptions(functions=3, rate_rps=1.0))


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in ("mooncake", "jsonl")])
def test_a_broken_archive_is_a_trace_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.csv.gz"
    packed = bytearray(gzip.compress(b"TIMESTAMP,ContextTokens\n" * 500))
    packed[20:30] = b"\xff" * 10
    path.write_bytes(packed)
    with pytest.raises(TraceError, match=r"broken\.csv\.gz"):
        import_trace(kind, path, options_for(kind))


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    path = minutes_file(tmp_path, [[1, 2]] * 9_000)
    parts: list[float] = []
    import_trace("azure-functions", path, ImportOptions(lengths=LENGTHS, functions=3), parts.append)
    assert len(parts) > 3 and parts == sorted(parts) and parts[-1] == 1 and parts[0] < 0.5


def test_placing_is_uniform_inside_the_minute() -> None:
    times = _placed(np.array([3]), np.array([20_000]), (1, 2, 3))
    assert times.min() >= 180 and times.max() < 240
    assert np.histogram(times, 10, (180, 240))[0].std() < 3 * (2000**0.5)
    found = cv(times)
    assert found is not None and class_of(found) in CLASSES and found == pytest.approx(1, abs=0.05)
