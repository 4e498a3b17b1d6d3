"""SGMV in Triton against float64: shapes, types, ranks and who shares an adapter with whom, in both forms."""

from __future__ import annotations

from tests.triton_interpreter import DEVICE  # before anything that holds Triton programs

# isort: split
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from serverlesslora_kernels.cuda.lora_table import LoraTables, PackedAdapter, ProjectionLayout
from serverlesslora_kernels.cuda.sgmv import Scratch, Tiles, sgmv_rows, sgmv_tiles
from serverlesslora_kernels.reference import sgmv as oracle
from serverlesslora_kernels.segments import LoraPiece

QKV = ProjectionLayout(96, ((0, 80), (80, 24), (104, 24)))
GATE_UP = ProjectionLayout(96, ((0, 136), (136, 136)))
DOWN = ProjectionLayout(1100, ((0, 64),))  # more than two parts of the inner dimension, the last not whole
DOUBLE = ProjectionLayout(1100, ((0, 40), (40, 40)))  # the same for the tiles' longer parts

# Relative to the largest output: one rounding of y (and of nothing else: t stays float32), float32 sums elsewhere.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}

Pieces = list[LoraPiece]


def pieces_of(layout: ProjectionLayout, ranks: Sequence[int], dtype: torch.dtype, seed: int) -> Pieces:
    """One rank per site; 0 leaves the site out."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LoraPiece(
            torch.randn(rank, layout.in_features, generator=generator).to(dtype) / layout.in_features**0.5,
            torch.randn(width, rank, generator=generator).to(dtype),
            0.5 + 0.25 * (seed % 5),
            first,
        )
        for rank, (first, width) in zip(ranks, layout.sites, strict=True)
        if rank
    ]


class World:
    """Adapters in slots of one projection, and a y and x to apply them to."""

    def __init__(self, layout: ProjectionLayout, dtype: torch.dtype, adapters: Sequence[Pieces], rows: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layout, self.dtype, self.adapters = layout, dtype, list(adapters)
        self.tables = LoraTables([layout], len(adapters) + 2, dtype, DEVICE)
        self.held: list[Tensor] = []
        self.max_total_rank = 0
        for slot, pieces in enumerate(adapters):
            self.assign(slot, pieces)
        self.x = torch.randn(rows, layout.in_features, generator=generator).to(DEVICE, dtype)
        self.y = torch.randn(rows, layout.width, generator=generator).to(DEVICE, dtype)

    def assign(self, slot: int, pieces: Pieces) -> None:
        packed = PackedAdapter.pack([pieces], [self.layout], self.dtype, pin=False)
        self.held.append(packed.host.to(DEVICE, copy=True))
        self.tables.assign(slot, packed.fields(self.held[-1].data_ptr()))
        self.max_total_rank = max(self.max_total_rank, packed.max_total_rank)

    def rows(self, slots: Sequence[int], y: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        y = self.y.clone() if y is None else y
        row_slots = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        scratch = Scratch.allocate(len(slots), self.layout.in_features, max(1, self.max_total_rank), DEVICE)
        scratch.memory.fill_(float("nan"))  # what nobody wrote nobody reads
        sgmv_rows(y, self.x if x is None else x, self.tables.table(0), self.layout, row_slots, scratch)
        return y

    def tiles(self, slots: Sequence[int], block_rows: int | None = None) -> Tensor:
        y = self.y.clone()
        tiles = Tiles.build(segments_of(slots), DEVICE, block_rows=block_rows)
        sgmv_tiles(y, self.x, self.tables.table(0), self.layout, tiles, self.max_total_rank)
        return y

    def expected(self, slots: Sequence[int]) -> Tensor:
        segments = [(start, end, self.adapters[slot]) for start, end, slot in segments_of(slots) if slot >= 0]
        return oracle(self.y.cpu(), self.x.cpu(), segments)

    def check(self, y: Tensor, slots: Sequence[int]) -> None:
        expected = self.expected(slots)
        error = (y.cpu().double() - expected).abs().max().item()
        assert error <= TOLERANCE[self.dtype] * expected.abs().max().item()
        bare = [row for row, slot in enumerate(slots) if slot < 0]
        assert torch.equal(y[bare], self.y[bare])


def segments_of(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    segments: list[tuple[int, int, int]] = []
    for row, slot in enumerate(slots):
        if segments and segments[-1][2] == slot:
            segments[-1] = (segments[-1][0], row + 1, slot)
        else:
            segments.append((row, row + 1, slot))
    return segments


POPULARITY = {
    "distinct": [0, 1, 2, 3],
    "identical": [2, 2, 2, 2, 2],
    "skewed": [0, 0, 0, 0, 1, 3],
    "some bare": [-1, 0, -1, 3, 1],
    "all bare": [-1, -1],
}
MIXED_RANKS: dict[ProjectionLayout, list[tuple[int, ...]]] = {
    QKV: [(1, 0, 3), (16, 16, 16), (0, 8, 0), (33, 5, 64)],
    GATE_UP: [(8, 8), (0, 1), (3, 0), (20, 40)],
    DOWN: [(1,), (8,), (16,), (70,)],
    DOUBLE: [(4, 4), (0, 16), (9, 0), (2, 30)],
}


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [QKV, DOWN], ids=["qkv", "down"])
def test_rows_of_any_popularity(layout: ProjectionLayout, dtype: torch.dtype, popularity: str) -> None:
    slots = POPULARITY[popularity]
    adapters = [pieces_of(layout, ranks, dtype, seed) for seed, ranks in enumerate(MIXED_RANKS[layout])]
    world = World(layout, dtype, adapters, len(slots))
    world.check(world.rows(slots), slots)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [QKV, GATE_UP, DOUBLE], ids=["qkv", "gate_up", "double"])
@pytest.mark.parametrize("block_rows", [16, 64])
def test_tiles_of_packed_segments(layout: ProjectionLayout, dtype: torch.dtype, block_rows: int) -> None:
    slots = [3] * 21 + [-1] * 2 + [0] + [1] * 3 + [2] * 2
    adapters = [pieces_of(layout, ranks, dtype, seed) for seed, ranks in enumerate(MIXED_RANKS[layout])]
    world = World(layout, dtype, adapters, len(slots))
    world.check(world.tiles(slots, block_rows), slots)


@pytest.mark.parametrize("form", ["rows", "tiles"])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 256])
def test_any_rank(rank: int, form: str) -> None:
    layout = ProjectionLayout(72, ((0, 40),))
    world = World(layout, torch.float32, [pieces_of(layout, (rank,), torch.float32, 3)], 2)
    world.check(getattr(world, form)([0, 0]), [0, 0])


def test_nobody_stores_a_larger_rank_of_somebody_else() -> None:
    adapters = [pieces_of(QKV, (1, 1, 1), torch.float32, 1), pieces_of(QKV, (64, 64, 64), torch.float32, 2)]
    small = PackedAdapter.pack([adapters[0]], [QKV], torch.float32, pin=False)
    large = PackedAdapter.pack([adapters[1]], [QKV], torch.float32, pin=False)
    assert small.nbytes * 6 < large.nbytes
    assert (small.total_rank(0), large.total_rank(0)) == (3, 192)


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    adapters = [pieces_of(DOWN, ranks, torch.bfloat16, seed) for seed, ranks in enumerate(MIXED_RANKS[DOWN])]
    world = World(DOWN, torch.bfloat16, adapters, 6)
    slots = [3, 0, 1, -1, 2, 3]
    together = world.rows(slots)
    for row in (0, 4, 5):
        alone = world.rows([slots[row]], world.y[row : row + 1].clone(), world.x[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_a_slot_that_changes_hands_changes_only_its_own_rows() -> None:
    adapters = [pieces_of(QKV, ranks, torch.float32, seed) for seed, ranks in enumerate(MIXED_RANKS[QKV])]
    world = World(QKV, torch.float32, adapters, 4)
    slots = [0, 1, 2, 3]
    before = world.rows(slots)
    world.tables.clear(1)
    cleared = world.rows(slots)
    assert torch.equal(cleared[1], world.y[1])
    world.adapters[1] = pieces_of(QKV, (5, 0, 7), torch.float32, 9)
    world.assign(1, world.adapters[1])
    after = world.rows(slots)
    world.check(after, slots)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("form", ["rows", "tiles"])
def test_rows_may_be_strided_and_columns_beyond_are_left_alone(form: str) -> None:
    adapters = [pieces_of(QKV, (4, 4, 4), torch.float32, 0)]
    world = World(QKV, torch.float32, adapters, 3)
    wide_y, wide_x = torch.zeros(3, 200, device=DEVICE), torch.zeros(3, 150, device=DEVICE)
    wide_y[:, : QKV.width], wide_x[:, : QKV.in_features] = world.y, world.x
    world.y, world.x = wide_y[:, : QKV.width], wide_x[:, : QKV.in_features]
    slots = [0, -1, 0]
    expected = world.expected(slots)
    if form == "rows":
        world.rows(slots, wide_y, world.x)
    else:
        sgmv_tiles(wide_y, world.x, world.tables.table(0), QKV, Tiles.build(segments_of(slots), DEVICE), 12)
    torch.testing.assert_close(wide_y[:, : QKV.width].cpu().double(), expected, atol=1e-5, rtol=0)
    assert not wide_y[:, QKV.width :].any()


def test_two_projections_of_one_adapter_share_a_buffer() -> None:
    layouts = [QKV, DOWN, GATE_UP]
    pieces = [pieces_of(QKV, (3, 0, 9), torch.float32, 1), [], pieces_of(GATE_UP, (0, 2), torch.float32, 2)]
    packed = PackedAdapter.pack(pieces, layouts, torch.float32, pin=False)
    assert [packed.total_rank(i) for i in range(3)] == [12, 0, 2]
    tables = LoraTables(layouts, 2, torch.float32, DEVICE)
    weights = packed.host.to(DEVICE, copy=True)
    fields = packed.fields(weights.data_ptr())
    tables.assign(1, fields)
    assert not tables.table(1).any(), "an adapter that does not change a projection has rank 0 there"
    end = weights.data_ptr() + packed.nbytes
    addresses = [int(row[i]) for row in fields for i in (0, 2, 6, 10) if row[i]]
    assert len(addresses) == 5
    assert all(
        weights.data_ptr() <= address < end and address % 128 == weights.data_ptr() % 128 for address in addresses
    )
    y, x = torch.zeros(1, GATE_UP.width, device=DEVICE), torch.randn(1, GATE_UP.in_features).to(DEVICE)
    slots = torch.ones(1, dtype=torch.int32, device=DEVICE)
    sgmv_rows(y, x, tables.table(2), GATE_UP, slots, Scratch.allocate(1, GATE_UP.in_features, 12, DEVICE))
    expected = oracle(torch.zeros(1, GATE_UP.width), x.cpu(), [(0, 1, pieces[2])])
    torch.testing.assert_close(y.cpu().double(), expected, atol=1e-5, rtol=0)


def test_factors_that_do_not_fit_are_named() -> None:
    piece = LoraPiece(torch.zeros(2, 96), torch.zeros(23, 2), 1.0, 80)
    with pytest.raises(ValueError, match=r"b \[23, 2\] at column 80"):
        PackedAdapter.pack([[piece]], [QKV], torch.float32, pin=False)
    with pytest.raises(ValueError, match="1 to 4 sites"):
        LoraTables([ProjectionLayout(8, ((0, 8),) * 5)], 1, torch.float32, DEVICE)
    piece = LoraPiece(torch.zeros(2, 96), torch.zeros(24, 2), 1.0, 80)
    with pytest.raises(ValueError, match="two pieces for one site"):
        PackedAdapter.pack([[piece, piece]], [QKV], torch.float32, pin=False)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_new_tokens_have_columns_of_their_own(dtype: torch.dtype) -> None:
    """Each adapter with a B as tall as its vocabulary; y is as wide as the widest, and beyond an adapter's own end
    its rows keep what they had."""
    backbone, heights, layout = 100, (100, 103, 170), ProjectionLayout(72, ((0, 100),))
    grown = [pieces_of(ProjectionLayout(72, ((0, h),)), (5 + h % 4,), dtype, h) for h in heights]
    slots = [0, 1, 1, 2, -1, 0]
    world = World(layout, dtype, grown, len(slots))
    world.y = torch.randn(len(slots), max(heights) + 4).to(DEVICE, dtype)
    y = world.tiles(slots)
    world.check(y, slots)
    for row, slot in enumerate(slots):
        end = heights[slot] if slot >= 0 else 0
        assert torch.equal(y[row, end:], world.y[row, end:])
    assert torch.equal(world.rows(slots)[:, backbone:], world.y[:, backbone:]), "rows: the backbone's columns only"


def test_random_batches() -> None:
    rng = random.Random(4)
    adapters = [pieces_of(GATE_UP, ranks, torch.float32, seed) for seed, ranks in enumerate(MIXED_RANKS[GATE_UP])]
    for _ in range(4):
        slots = [rng.randrange(-1, 4) for _ in range(rng.randint(1, 9))]
        world = World(GATE_UP, torch.float32, adapters, len(slots))
        world.check(world.rows(slots), slots)
        world.check(world.tiles(slots), slots)


def test_tiles_of_any_rank_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a program anew for an integer that 16 does not divide: a request would wait for it."""
    widths: list[object] = []
    monkeypatch.setattr("serverlesslora_kernels.cuda.sgmv.launch", lambda *given, **_: widths.append(given[8]))
    world = World(QKV, torch.float32, [pieces_of(QKV, (4, 2, 1), torch.float32, 0)], 3)
    world.tiles([0, 0, 0])
    assert widths == [16, 16]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from serverlesslora_kernels.cuda.sgmv import compile_cases

seen = set()
for case in compile_cases():
    types = case.signature
    if case.program.__name__ in seen or "*bf16" not in types.values():
        continue
    seen.add(case.program.__name__)
    # What a launch tells the compiler of tensors and row strides, and a bare signature does not.
    whole = [i for i, (name, type) in enumerate(types.items()) if type[0] == "*" or name in ("x_row", "y_row")]
    source = ASTSource(case.program, types, case.constexprs, {(i,): [["tt.divisibility", 16]] for i in whole})
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    copies = [line for line in ptx.splitlines() if "cp.async" in line and "shared" in line]
    print(case.program.__name__, ptx.count("ld.global.b16"), ptx.count("ld.global.v4"), len(copies),
          sum("0x10" in line for line in copies))
"""
