"""Reading traces: rows, minute counts, which functions are chosen, and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from serverlesslora.errors import ConfigError
from serverlesslora.simulator.trace import Choice, read_lengths, read_trace


def write_counts(path: Path, rows: list[list[int]], *, first: int = 1) -> Path:
    header = ["HashFunction", *(f"minute_{first + i}" for i in range(len(rows[0])))]
    lines = [",".join(header), *(",".join(["h", *map(str, row)]) for row in rows)]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def write_rows(path: Path, rows: list[tuple[float, str, int, int]]) -> Path:
    keys = ("timestamp", "model", "input_length", "output_length")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def test_rows_are_sorted_and_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [(2500, "b", 3, 4), (1000, "a", 1, 2), (2500, "a", 5, 6)])
    trace = read_trace(path)
    assert trace.times.tolist() == [1.0, 2.5, 2.5]
    assert [trace.names[f] for f in trace.functions] == ["a", "b", "a"]  # of one instant: as in the file
    assert trace.prompt_tokens.tolist() == [1, 3, 5] and trace.output_tokens.tolist() == [2, 4, 6]
    assert trace.duration_s == 2.5 and "3 requests" in trace.description


def test_a_window_of_rows_begins_at_zero(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [(3600e3 * h, "ab"[h % 2], 1, 1) for h in range(6)])
    trace = read_trace(path, Choice(start_hour=2, hours=1))
    assert trace.times.tolist() == [0.0, 3600.0]
    assert trace.duration_s == 3600.0 and trace.day_offset_s == 7200.0


def test_every_invocation_lies_in_its_minute(tmp_path: Path) -> None:
    rows = [[0, 3, 1, 0], [5, 0, 0, 2]]
    trace = read_trace(write_counts(tmp_path / "c.csv.gz", rows), lengths="10,20")
    for function, row in enumerate(rows):
        minutes = (trace.times[trace.functions == function] // 60).astype(int)
        assert np.bincount(minutes, minlength=4).tolist() == row
    assert (np.diff(trace.times) >= 0).all()
    assert set(trace.prompt_tokens) == {10} and set(trace.output_tokens) == {20}
    assert trace.duration_s == 240.0


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    path = write_counts(tmp_path / "c.csv.gz", [[i, 2 * i, 3] for i in range(1, 40)])
    first, again, other = (read_trace(path, Choice(functions=7, seed=seed)) for seed in (3, 3, 4))
    assert first.names == again.names and (first.times == again.times).all()
    assert first.names != other.names


def test_functions_are_chosen_whole(tmp_path: Path) -> None:
    # 1440 minutes are a day, so the bound applies as it stands; nobody's calls are thinned.
    rows = [[k] + [0] * 1439 for k in (1, 10, 100, 0)]
    trace = read_trace(write_counts(tmp_path / "c.csv.gz", rows), Choice(max_per_day=10))
    assert trace.names == ("fn-00000", "fn-00001")
    assert np.bincount(trace.functions).tolist() == [1, 10]


def test_a_bound_is_scaled_to_the_length_of_the_file(tmp_path: Path) -> None:
    path = write_counts(tmp_path / "c.csv.gz", [[1] * 144, [2] * 144])  # a tenth of a day: 1440 and 2880 a day
    assert read_trace(path, Choice(max_per_day=1440)).names == ("fn-00000",)


def test_a_window_of_counts_keeps_the_time_of_day(tmp_path: Path) -> None:
    path = write_counts(tmp_path / "c.csv.gz", [[1] * 180], first=480)
    trace = read_trace(path, Choice(start_hour=1, hours=1))
    assert trace.num_requests == 60 and trace.day_offset_s == (480 + 60) * 60


def test_only_rows_of_a_trigger(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("HashFunction,Trigger,1,2\na,http,1,1\nb,timer,5,5\nc,http,0,1\n")
    assert read_trace(path, Choice(trigger="http")).num_requests == 3
    with pytest.raises(ConfigError, match="no request"):
        read_trace(path, Choice(trigger="queue"))


def test_lengths_are_drawn_in_pairs(tmp_path: Path) -> None:
    lengths = tmp_path / "l.csv"
    lengths.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,1\nx,200,2\nx,300,3\n")
    path = write_counts(tmp_path / "c.csv.gz", [[200]])
    trace = read_trace(path, lengths=str(lengths))
    assert (trace.prompt_tokens == 100 * trace.output_tokens).all()
    assert set(trace.output_tokens) == {1, 2, 3}
    assert read_lengths("7,9").tolist() == [[7, 9]]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("t.txt", "", "must end in"),
        ("t.jsonl", '{"timestamp": 1, "model": "a", "input_length": 1}\n', "line 1.*output_length"),
        ("t.jsonl", "nonsense\n", "line 1"),
        ("t.jsonl", '{"timestamp": -1, "model": "a", "input_length": 1, "output_length": 1}\n', "negative"),
        ("t.jsonl", "", "no request"),
        ("t.csv", "a,b\n1,2\n", "minute"),
        ("t.csv", "HashFunction,1,2\na,x,1\n", "line 2"),
        ("t.csv", "HashFunction,1,2\na,1\n", "line 2"),
        ("t.csv", "HashFunction,1,2\na,-1,2\n", "negative"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_trace(path)
    assert name in caught.value.message


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*gone.jsonl"):
        read_trace(tmp_path / "gone.jsonl")
    path = write_counts(tmp_path / "c.csv.gz", [[1], [1]])
    with pytest.raises(ConfigError, match="3 functions were asked for and 2 qualify"):
        read_trace(path, Choice(functions=3))
    with pytest.raises(ConfigError, match="Trigger"):
        read_trace(path, Choice(trigger="http"))
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(broken)
    bad = tmp_path / "l.csv"
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="ContextTokens"):
        read_trace(path, lengths=str(bad))
