"""Lengths of prompts and answers, drawn by law or from the files of others."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.lengths import (
    EmpiricalLengths,
    FixedLengths,
    Lengths,
    LogNormal,
    LogNormalLengths,
    UniformLengths,
    parse_lengths,
    read_pairs,
)

TRACES = Path(os.environ.get("SERVERLESSLORA_TRACES", Path(__file__).parents[1].parent / "shared" / "traces"))


def sample(law: Lengths, n: int = 5000) -> np.ndarray:
    pairs = law.sample(np.random.default_rng(1), n)
    assert pairs.shape == (n, 2) and pairs.dtype == np.int64 and pairs.min(initial=1) >= 1
    return pairs


def test_fixed_lengths() -> None:
    assert (sample(FixedLengths(7, 3)) == [7, 3]).all()
    assert sample(FixedLengths(7, 3), 0).shape == (0, 2)


def test_uniform_lengths_include_both_ends() -> None:
    pairs = sample(UniformLengths((2, 5), (9, 9)))
    assert set(pairs[:, 0]) == {2, 3, 4, 5}
    assert set(pairs[:, 1]) == {9}


def test_lognormal_lengths_have_the_mean_that_was_asked_for() -> None:
    pairs = sample(LogNormalLengths(LogNormal(1000, 0.8), LogNormal(200, 1.0, max=300)), 50_000)
    assert pairs[:, 0].mean() == pytest.approx(1000, rel=0.02)
    assert np.log(pairs[:, 0]).std() == pytest.approx(0.8, rel=0.02)
    assert pairs[:, 1].max() == 300
    assert (sample(LogNormalLengths(LogNormal(50, 0), LogNormal(8, 0))) == [50, 8]).all()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,1\nx,200,2\nx,300,0\n"),
        (
            "a.csv",
            "Timestamp,Model,Request tokens,Response tokens,Total tokens\n5,GPT-4,100,1,101\n45,ChatGPT,200,2,202\n",
        ),
        ("a.jsonl", '{"input_length": 100, "output_length": 1}\n\n{"output_length": 2, "input_length": 200}\n'),
        ("a.csv.gz", "prompt_tokens,completion_tokens\n100,1\n200,2.0\n"),
    ],
)
def test_pairs_of_a_file_are_drawn_jointly(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_pairs(path).tolist() == [[100, 1], [200, 2]]
    pairs = sample(EmpiricalLengths(str(path)))
    assert {tuple(pair) for pair in pairs.tolist()} == {(100, 1), (200, 2)}
    assert pairs[:, 0].mean() == pytest.approx(150, abs=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pair"),
        ("input_length,output_length\n", "holds no pair"),
        ("input_length,output_length\n0,5\n", "holds no pair"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("input_length,output_length\n1,2\n1,x\n", "row 2 has no number"),
        ("input_length,output_length\n1\n", "row 1 has no number"),
        ("input_length,output_length\n1,inf\n", "row 1 has no number"),
        ('{"input_length": 1, "output_length": 2}\n{"input_length": 1}\n', "row 2 has no number"),
        ('{"input_length": 1,\n', "is not JSON lines"),
    ],
)
def test_files_without_lengths(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lengths"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message):
        read_pairs(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "a.gz"
    broken.write_bytes(b"\x1f\x8bno")
    garbled = tmp_path / "b.gz"
    garbled.write_bytes(gzip.compress(b"input_length,output_length\n1,2\n")[:10] + b"\xff" * 20)
    for path in (broken, garbled, tmp_path / "none.csv"):
        with pytest.raises(WorkloadError, match="cannot read lengths"):
            read_pairs(path)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the real traces are not here")
def test_pairs_of_a_real_trace() -> None:
    pairs = read_pairs(TRACES / "AzureLLMInferenceTrace_conv.csv.gz")
    assert len(pairs) == 19_366
    assert np.percentile(pairs, [50, 90, 99], axis=0, method="inverted_cdf").tolist() == [
        [1020, 129],
        [2735, 424],
        [4142, 601],
    ]


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("fixed:128", FixedLengths(128, 128)),
        ("fixed:128/32", FixedLengths(128, 32)),
        ("uniform:16-64", UniformLengths((16, 64), (16, 64))),
        ("uniform:16-64/8", UniformLengths((16, 64), (8, 8))),
        (
            "lognormal:mean=1024,sigma=1/mean=200,sigma=0.8,max=512",
            LogNormalLengths(LogNormal(1024, 1), LogNormal(200, 0.8, 512)),
        ),
        ("empirical:a/b.csv", EmpiricalLengths("a/b.csv")),
    ],
)
def test_lengths_are_read(text: str, law: Lengths) -> None:
    assert parse_lengths(text) == law


@pytest.mark.parametrize(
    "text",
    ["", "fixed", "fixed:0", "fixed:x", "uniform:64-16", "lognormal:5", "lognormal:mean=5", "pareto:1", "empirical:"],
)
def test_lengths_that_make_no_sense_are_told_the_forms_there_are(text: str) -> None:
    with pytest.raises(WorkloadError, match="there are fixed:IN/OUT"):
        parse_lengths(text)
