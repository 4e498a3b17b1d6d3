from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from serverlesslora_loadgen.compare import compare
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.export import COLUMNS, read_csv, vllm_keys, write_csv
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Limits
from tests.loadgen_runs import answered, failed, many, result, shed, unsent

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["null", "true", "1", "1.5", "=1+1", '"', "a,b", "a\nb", "a\r\nb", "\x00", " ", "NaN", "{}"]
)
stamps = st.none() | st.floats(-1e3, 1e9, allow_nan=False)
counts = st.integers(0, 2**53)
records = st.builds(
    Record,
    id=counts,
    model=texts,
    class_=st.none() | texts.filter(bool),
    intended_s=st.floats(0, 1e9, allow_nan=False),
    **dict.fromkeys(("started_s", "written_s", "first_byte_s", "first_token_s", "second_token_s"), stamps),
    **dict.fromkeys(("last_token_s", "done_s", "retry_after_s", "max_gap_s", "deadline_s", "server_ttft_s"), stamps),
    connected_s=stamps,
    outcome=st.sampled_from(["ok", "shed", "failed", "unsent"]),
    failure=st.none() | st.sampled_from(["stall", "wrong-answer"]),
    **dict.fromkeys(("detail", "request_id"), texts),
    cold=texts.filter(bool),
    cold_ms=st.dictionaries(texts, st.floats(0, 1e6), max_size=2),
    **dict.fromkeys(("status", "input_tokens", "cached_tokens", "output_tokens", "chunks", "bytes_in"), counts),
)


@given(st.lists(records, max_size=4))
def test_a_record_survives_its_file(tmp_path_factory: pytest.TempPathFactory, found: list[Record]) -> None:
    path = tmp_path_factory.mktemp("csv") / "requests.csv"
    write_csv(path, found)
    assert read_csv(path) == found


def test_everything_but_the_gaps_is_written(tmp_path: Path) -> None:
    write_csv(tmp_path / "r.csv", [answered(0, class_="Bursty", cold_ms={"adapter": 4.5})])
    with (tmp_path / "r.csv").open(newline="") as file:
        header, row = csv.reader(file)
    assert header == list(COLUMNS)
    assert {each.encode_name for each in fields(Record)} - set(header) == {"gaps_s"}
    found = dict(zip(header, row, strict=True))
    assert header[-1] == "connected_s"  # files of before have the columns that they had
    assert (found["class"], found["cold_ms"], found["max_gap_s"]) == ("Bursty", '{"adapter":4.5}', "0.01")
    assert read_csv(tmp_path / "r.csv") == [
        replace(answered(0, class_="Bursty", cold_ms={"adapter": 4.5}), gaps_s=()),
    ]


def test_runs_are_compared_from_their_files(tmp_path: Path) -> None:
    found = many(600)
    write_csv(tmp_path / "r.csv", found)
    again = read_csv(tmp_path / "r.csv")
    assert compare(result(found), result(found), again, again) == compare(result(found), result(found), found, found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no column id"),
        ("a,b\n1,2\n", "is not a request"),
        ("id,model,intended_s,outcome\n1,m,0.5,ok\nx,m,0.5,ok\n", ":3 is not a request"),
        ("id,model,intended_s,outcome\n1,m,0.5,great\n", ":2 is not a request"),
        ("id,model,intended_s,outcome,cold_ms\n1,m,0.5,ok,{\n", ":2 is not a request"),
        ("id,model,intended_s,outcome\n1,m,0.5,ok,too,many\n", ":2 is not a request"),
        ('id,model,intended_s,outcome\n1,"m\n', "is not a request"),
    ],
)
def test_what_is_no_file_of_requests(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(ResultError, match=said):
        read_csv(tmp_path / "r.csv")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="cannot read"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "r.csv").write_bytes(b"id,intended_s,outcome\n\xff,1,ok\n")
    with pytest.raises(ResultError):
        read_csv(tmp_path / "r.csv")


def keys(found: list[Record], **more: Any) -> dict[str, Any]:
    return vllm_keys(result(found, **more))


def test_keys_that_other_scripts_read() -> None:
    found = keys([answered(0), answered(1, ttft=0.9), shed(2), failed(3), unsent(4)], seconds=10.0)
    assert (found["completed"], found["failed"], found["num_prompts"]) == (2, 3, 5)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (14, 22)
    assert found["request_throughput"] == pytest.approx(0.2) and found["request_goodput"] == pytest.approx(0.1)
    assert found["output_throughput"] == pytest.approx(2.2) and found["total_token_throughput"] == pytest.approx(3.6)
    assert found["mean_ttft_ms"] == pytest.approx(500.0) and found["median_ttft_ms"] == pytest.approx(100.0)
    assert found["p99_ttft_ms"] == pytest.approx(900.0) and found["p99.9_e2el_ms"] == pytest.approx(1000.0)
    assert found["median_tpot_ms"] == pytest.approx(10.0) and found["p90_itl_ms"] == pytest.approx(10.0)
    assert found["duration"] == 10.0 and found["valid"] is False
    assert found["max_concurrent_requests"] >= 0


def test_no_goodput_without_limits_and_no_latency_without_answers() -> None:
    assert keys([answered(0)], limits=Limits())["request_goodput"] is None
    found = keys([shed(0)])
    assert found["completed"] == 0 and not [name for name in found if name.endswith("_ms")]
