"""Segmented LoRA against float64, over popularity mixes, ranks, missing pieces, both layouts and both dtypes."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serverlesslora_kernels import reference, segments
from serverlesslora_kernels.segments import LoraPiece, LoraWeights, SegmentTable, TableCache, sgmv_kernels
from serverlesslora_kernels.sgmv import sgmv

GROUPS = {  # k and the (outputs, offset) of each piece
    "qkv": (100, [(96, 0), (16, 96), (16, 112)]),
    "gate_up": (64, [(200, 0), (200, 200)]),
    "down": (333, [(47, 0)]),
    "tiny": (3, [(1, 0), (33, 1)]),
}
POPULARITY = {  # rows per adapter
    "distinct": [1] * 12,
    "uniform": [4] * 4,
    "skewed": [70, 9, 3, 1, 1, 1],
    "identical": [53],
}
LAYOUTS = [  # dtype, native
    pytest.param(
        torch.bfloat16, True, marks=pytest.mark.skipif(sgmv_kernels() is None, reason="no native kernels here")
    ),
    (torch.bfloat16, False),
    (torch.float32, False),
]


def adapter(rng: random.Random, group: str, ranks: Sequence[int], dtype: torch.dtype) -> list[LoraPiece]:
    """A random subset of the group's pieces (at least one), each with its own rank."""
    k, outputs = GROUPS[group]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    kept = [piece for piece in outputs if rng.random() < 0.8] or outputs[:1]
    pieces = []
    for n, offset in kept:
        rank = rng.choice(ranks)
        a = torch.randn(rank, k, generator=generator) / k**0.5
        b = torch.randn(n, rank, generator=generator) / rank**0.5
        pieces.append(LoraPiece(a.to(dtype), b.to(dtype), rng.choice([0.25, 1.0, 2.0, 16 / 3]), offset))
    return pieces


def width(group: str) -> int:
    return sum(n for n, _ in GROUPS[group][1])


def assert_near(actual: Tensor, exact: Tensor, packed: bool) -> None:
    """Packed: one rounding of the result. Plain bf16 also rounds the intermediate and the sum."""
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8 if packed else 2.0**-6}[actual.dtype]
    floor = {torch.float32: 2e-5, torch.bfloat16: 2e-4 if packed else 0.08}[actual.dtype]
    assert actual.isfinite().all()
    assert ((actual.double() - exact).abs() <= unit * exact.abs() + floor).all()


@pytest.mark.parametrize(("dtype", "native"), LAYOUTS)
@pytest.mark.parametrize("ranks", [[1], [2, 3], [8], [16], [64], [1, 4, 7, 8, 16, 33, 64]], ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("group", GROUPS)
def test_equals_float64(group: str, popularity: str, ranks: list[int], dtype: torch.dtype, native: bool) -> None:
    rng = random.Random(f"{group} {popularity} {ranks}")
    rows_of: list[tuple[int, int, LoraWeights | None]] = []
    exact_segments: list[tuple[int, int, list[LoraPiece]]] = []
    row = 0
    for rows in POPULARITY[popularity]:
        gap = rng.choice([0, 0, 2])  # rows of the base model: a gap, or a segment of None
        rows_of += [(row, row + gap, None)] if gap and rng.random() < 0.5 else []
        row += gap
        pieces = adapter(rng, group, ranks, dtype)
        weights = LoraWeights.pack(pieces, dtype, native=native)
        rows_of += [(row, row, weights), (row, row + rows, weights)]
        exact_segments.append((row, row + rows, pieces))
        row += rows
    generator = torch.Generator().manual_seed(row)
    x = torch.randn(row + 2, GROUPS[group][0], generator=generator).to(dtype)
    y = torch.randn(row + 2, width(group), generator=generator).to(dtype)
    exact = reference.sgmv(y, x, exact_segments)
    untouched = torch.ones(row + 2, dtype=torch.bool)
    for start, end, _ in exact_segments:
        untouched[start:end] = False
    before = y.clone()
    sgmv(y, x, SegmentTable(rows_of))
    assert_near(y, exact, native)
    assert torch.equal(y[untouched], before[untouched])


@pytest.mark.parametrize(("dtype", "native"), LAYOUTS)
def test_rows_of_a_wider_tensor(dtype: torch.dtype, native: bool) -> None:
    pieces = adapter(random.Random(1), "qkv", [5, 16], dtype)
    k, n = GROUPS["qkv"][0], width("qkv")
    wide_x, wide_y = torch.randn(9, k + 7).to(dtype), torch.randn(9, n + 9).to(dtype)
    x, y = wide_x[:, 3 : 3 + k], wide_y[:, 4 : 4 + n]
    exact, before = reference.sgmv(y, x, [(2, 7, pieces)]), wide_y.clone()
    sgmv(y, x, SegmentTable([(2, 7, LoraWeights.pack(pieces, dtype, native=native))]))
    assert_near(y, exact, native)
    assert torch.equal(wide_y[:, :4], before[:, :4])
    assert torch.equal(wide_y[:, 4 + n :], before[:, 4 + n :])


@pytest.mark.skipif(sgmv_kernels() is None, reason="no native kernels here")
def test_a_row_depends_on_neither_its_batch_nor_the_threads() -> None:
    rng = random.Random(2)
    weights = [LoraWeights.pack(adapter(rng, "gate_up", [3, 16, 64], torch.bfloat16), torch.bfloat16) for _ in range(5)]
    bounds = [0, 1, 4, 60, 67, 120]
    table = SegmentTable(list(zip(bounds, bounds[1:], weights, strict=False)))
    x, y = torch.randn(120, 64).bfloat16(), torch.randn(120, 400).bfloat16()
    expected = y.clone()
    for start, end, own in table.entries:
        for row in range(start, end):
            sgmv(expected[row : row + 1], x[row : row + 1], SegmentTable([(0, 1, own)]))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = y.clone()
            sgmv(together, x, table)
            assert torch.equal(together, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "native"), LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_own_rows(dtype: torch.dtype, native: bool, value: float) -> None:
    pieces = adapter(random.Random(3), "down", [6], dtype)
    table = SegmentTable([(0, 3, LoraWeights.pack(pieces, dtype, native=native))])
    x, y = torch.randn(3, 333).to(dtype), torch.zeros(3, 47).to(dtype)
    x[1, 332] = value
    sgmv(y, x, table)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("dtype", "native"), LAYOUTS)
def test_packing_copies_and_converts(dtype: torch.dtype, native: bool) -> None:
    pieces = adapter(random.Random(4), "qkv", [7, 8], torch.float32)
    rounded = [LoraPiece(a.to(dtype), b.to(dtype), scale, offset) for a, b, scale, offset in pieces]
    transposed = [LoraPiece(a.T.contiguous().T, b.T.contiguous().T, scale, offset) for a, b, scale, offset in pieces]
    x = torch.randn(2, 100).to(dtype)
    exact = reference.sgmv(torch.zeros(2, 128), x, [(0, 2, rounded)])
    packed = [LoraWeights.pack(source, dtype, native=native) for source in (pieces, transposed)]
    assert packed[0].nbytes >= sum(a.nbytes + b.nbytes for a, b, _, _ in rounded)
    for piece in (*pieces, *transposed):
        piece.a.zero_()
        piece.b.zero_()
    for weights in packed:
        y = torch.zeros(2, 128).to(dtype)
        sgmv(y, x, SegmentTable([(0, 2, weights)]))
        assert_near(y, exact, native)


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.ones(4, 8), torch.ones(6, 4)
    weights = LoraWeights.pack([LoraPiece(a, b, 1.0)], torch.float32)
    other = LoraWeights.pack([LoraPiece(torch.ones(4, 9), b, 1.0)], torch.float32)
    with pytest.raises(ValueError, match="None in its place"):
        LoraWeights.pack([], torch.float32)
    for wrong in (
        LoraPiece(a, torch.ones(6, 5), 1.0),
        LoraPiece(torch.ones(0, 8), torch.ones(6, 0), 1.0),
        LoraPiece(a, b, 1.0, -1),
    ):
        with pytest.raises(ValueError, match="not a LoRA piece"):
            LoraWeights.pack([wrong], torch.float32)
    with pytest.raises(ValueError, match="not a LoRA piece"):
        LoraWeights.pack([LoraPiece(a, b, 1.0), LoraPiece(torch.ones(4, 9), b, 1.0, 6)], torch.float32)
    with pytest.raises(ValueError, match="disjoint columns"):
        LoraWeights.pack([LoraPiece(a, b, 1.0, 5), LoraPiece(a, b, 1.0)], torch.float32)
    for wrong_rows in ([(0, 2, weights), (1, 3, weights)], [(2, 3, weights), (0, 1, weights)], [(3, 2, weights)]):
        with pytest.raises(ValueError, match="sorted and disjoint"):
            SegmentTable(wrong_rows)
    with pytest.raises(ValueError, match="share"):
        SegmentTable([(0, 1, weights), (1, 2, other)])
    table = SegmentTable([(0, 2, weights)])
    for y, x in (
        (torch.ones(2, 6), torch.ones(2, 7)),
        (torch.ones(2, 5), torch.ones(2, 8)),
        (torch.ones(8), torch.ones(8)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            sgmv(y, x, table)
    with pytest.raises(ValueError, match="reach row 2"):
        sgmv(torch.ones(1, 6), torch.ones(2, 8), table)


@pytest.mark.skipif(sgmv_kernels() is None, reason="no native kernels here")
def test_packed_weights_refuse_other_memory() -> None:
    weights = LoraWeights.pack([LoraPiece(torch.ones(4, 8), torch.ones(6, 4), 1.0)], torch.bfloat16)
    table = SegmentTable([(0, 2, weights)])
    x = torch.ones(2, 8).bfloat16()
    for y in (torch.ones(2, 6), torch.ones(6, 2).bfloat16().T):
        with pytest.raises(ValueError, match="bf16 x and y"):
            sgmv(y, x, table)


def test_no_segments_is_nothing_to_do() -> None:
    y = torch.ones(2, 3)
    for table in (SegmentTable([]), SegmentTable([(0, 2, None)])):
        sgmv(y, torch.ones(2, 4), table)
    assert (y == 1).all()


def test_cache_returns_the_same_table_until_something_changes() -> None:
    first, second = (
        LoraWeights.pack([LoraPiece(torch.ones(1, 2), torch.ones(3, 1), 1.0)], torch.float32) for _ in range(2)
    )
    cache = TableCache(capacity=2)
    table = cache.table([(0, 1, first), (1, 2, second)])
    assert cache.table(((0, 1, first), (1, 2, second))) is table
    assert cache.table([(0, 1, second), (1, 2, first)]) is not table
    assert cache.table([(0, 1, first), (1, 2, second)]) is table  # now the latest
    cache.table([(0, 1, None)])
    assert cache.table([(0, 1, first), (1, 2, second)]) is table
    cache.clear()
    assert cache.table([(0, 1, first), (1, 2, second)]) is not table


def test_with_the_kernels_switched_off_packing_falls_back() -> None:
    """The plain layout is tested above; here only that a machine without a compiler gets it, end to end."""
    code = """
import torch
from serverlesslora_kernels import reference
from serverlesslora_kernels.segments import LoraPiece, LoraWeights, SegmentTable
from serverlesslora_kernels.sgmv import sgmv
pieces = [LoraPiece(torch.randn(4, 32).bfloat16() / 6, torch.randn(8, 4).bfloat16() / 2, 2.0, 3)]
weights = LoraWeights.pack(pieces, torch.bfloat16)
assert weights.buffer is None and weights.a is not None
x, y = torch.randn(5, 32).bfloat16(), torch.zeros(5, 16).bfloat16()
exact = reference.sgmv(y, x, [(1, 4, pieces)])
sgmv(y, x, SegmentTable([(0, 1, None), (1, 4, weights)]))
torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
"""
    kernels = Path(segments.__file__).parents[1]
    env = {**os.environ, "SERVERLESSLORA_NATIVE": "0", "PYTHONPATH": str(kernels)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
