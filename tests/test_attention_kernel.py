"""Paged attention against the float64 loop: native and torch, decode and chunked prefill mixed in one packed batch."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from serverlesslora_kernels import attention, native
from serverlesslora_kernels.attention import AttentionPlan, allocate_kv, paged_attention, write_kv
from serverlesslora_kernels.attention_reference import reference_attention

# (new tokens, context): decode, whole prompt, chunk in the middle, chunk that starts inside a block, one token in all
MIXED = ((1, 37), (21, 21), (9, 50), (1, 1), (5, 8), (1, 300))
DECODE = ((1, 5), (1, 64), (1, 129))
NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.load("attention") is None, reason="no native"))


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    block_size: int = 16
    batch: tuple[tuple[int, int], ...] = MIXED
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    name: str = field(default="", compare=False)


def _cases() -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    for dtype, heads in itertools.product(dtypes, ((1, 1), (3, 3), (4, 2), (14, 2), (16, 1), (12, 4), (40, 2))):
        yield Case(dtype, heads=heads)
    for dtype, dim in itertools.product(dtypes, (72, 80, 96, 128, 256)):
        yield Case(dtype, dims=(dim, dim))
    for dtype, block_size in itertools.product(dtypes, (8, 32)):
        yield Case(dtype, block_size=block_size)
        yield Case(dtype, block_size=block_size, heads=(6, 6), window=13)
    for dtype, (window, softcap, sinks) in itertools.product(
        dtypes, ((1, None, False), (20, None, False), (None, 5.0, False), (None, None, True), (33, 30.0, True))
    ):
        yield Case(dtype, window=window, softcap=softcap, sinks=sinks)
        yield Case(dtype, window=window, softcap=softcap, sinks=sinks, batch=DECODE, heads=(14, 2))
    yield Case(dims=(48, 32))
    yield Case(torch.bfloat16, dims=(192, 128))
    yield Case(batch=((1, 4100), (1, 3)), heads=(2, 1), sinks=True)  # cut into parts on machines with several cores
    yield Case(torch.bfloat16, batch=((1, 4100), (3, 700)), heads=(7, 1))


class Batch:
    """Contexts written in two steps, so that the new tokens of `case.batch` meet older ones in the cache."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        self.case = case
        (q_heads, kv_heads), (dim_k, dim_v) = case.heads, case.dims
        self.q_lens = [q_len for q_len, _ in case.batch]
        contexts = [context for _, context in case.batch]
        counts = [-(-context // case.block_size) for context in contexts]
        free = list(range(sum(counts) + 3))
        rng.shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.plan = AttentionPlan.build(self.q_lens, contexts, self.tables, case.block_size)
        self.keys = [torch.randn(context, kv_heads, dim_k).to(case.dtype) for context in contexts]
        self.values = [torch.randn(context, kv_heads, dim_v).to(case.dtype) for context in contexts]
        self.q = torch.randn(sum(self.q_lens), q_heads, dim_k).to(case.dtype)
        self.sinks = torch.randn(q_heads) if case.sinks else None
        self.scale = dim_k**-0.5 * 1.7
        self.cache = allocate_kv(sum(counts) + 3, case.block_size, kv_heads, dim_k, dim_v, case.dtype)
        for part in self.cache:
            part.fill_(float("nan"))  # what a freed block may hold

    def write(self) -> None:
        old = [
            (c - q, c - q, t) for q, c, t in zip(self.q_lens, map(len, self.keys), self.tables, strict=True) if c > q
        ]
        if old:
            q_lens, contexts, tables = zip(*old, strict=True)
            self._write(AttentionPlan.build(q_lens, contexts, tables, self.case.block_size), slice(0, None), new=False)
        self._write(self.plan, slice(0, None), new=True)

    def _write(self, plan: AttentionPlan, heads: slice, *, new: bool) -> None:
        pieces = [
            torch.cat((k, v), dim=2)[len(k) - q :] if new else torch.cat((k, v), dim=2)[: len(k) - q]
            for k, v, q in zip(self.keys, self.values, self.q_lens, strict=True)
        ]
        fused = torch.cat(pieces)[:, heads]
        write_kv(*self.cache, fused[..., : self.case.dims[0]], fused[..., self.case.dims[0] :], plan)

    def attend(self, q: Tensor | None = None) -> Tensor:
        case = self.case
        return paged_attention(
            self.q if q is None else q,
            *self.cache,
            self.plan,
            scale=self.scale,
            sliding_window=case.window,
            softcap=case.softcap,
            sinks=self.sinks,
        )

    def expected(self) -> Tensor:
        case = self.case
        return reference_attention(
            self.q,
            self.keys,
            self.values,
            self.q_lens,
            scale=self.scale,
            sliding_window=case.window,
            softcap=case.softcap,
            sinks=self.sinks,
        )


@pytest.fixture(params=[NATIVE, "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(attention, "_library", lambda: None)
    return str(request.param)


def _assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_float64_loop(case: Case, backend: str) -> None:
    batch = Batch(case)
    batch.write()
    actual = batch.attend()
    assert actual.dtype == case.dtype
    _assert_close(actual, batch.expected(), case.dtype)


def test_half_precision_and_odd_block_sizes_use_torch() -> None:
    for case in (Case(torch.float16), Case(block_size=12)):
        batch = Batch(case)
        batch.write()
        _assert_close(batch.attend(), batch.expected(), case.dtype)


def test_bf16_is_as_close_as_torch_itself(backend: str) -> None:
    batch = Batch(Case(torch.bfloat16, heads=(14, 2), batch=((1, 700),)))
    batch.write()
    expected = batch.expected()
    k, v = (t[0].transpose(0, 1)[None].repeat_interleave(7, 1) for t in (batch.keys, batch.values))
    theirs = F.scaled_dot_product_attention(batch.q.transpose(0, 1)[None], k, v, scale=batch.scale)[0].transpose(0, 1)
    ours = (batch.attend().double() - expected).abs().mean()
    assert ours < 1.5 * (theirs.double() - expected).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_queries_and_transposed_keys(dtype: torch.dtype, backend: str) -> None:
    batch = Batch(Case(dtype))
    batch.write()
    expected = batch.attend().double()
    wide = torch.randn(batch.q.shape[0], 9, 64).to(dtype)
    wide[:, 2:6] = batch.q
    _assert_close(batch.attend(wide[:, 2:6]), expected, dtype)
    _assert_close(batch.attend(batch.q.permute(1, 0, 2).contiguous().permute(1, 0, 2)), expected, dtype)
    _assert_close(batch.attend(batch.q.permute(2, 0, 1).contiguous().permute(1, 2, 0)), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_is_the_same_in_both_backends(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for torch_only in (False, True):
        if torch_only:
            monkeypatch.setattr(attention, "_library", lambda: None)
        batch = Batch(Case(dtype))
        batch.write()
        written.append(batch.cache)
    for ours, theirs in zip(*written, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_copying_a_block_moves_its_tokens(backend: str) -> None:
    batch = Batch(Case())
    batch.write()
    before = batch.attend()
    spare = next(i for i in range(len(batch.cache.k)) if all(i not in table for table in batch.tables))
    moved = batch.tables[5][0]
    for part in batch.cache:
        part[spare] = part[moved]
        part[moved] = float("nan")
    tables = [*batch.tables[:5], [spare, *batch.tables[5][1:]]]
    batch.plan = AttentionPlan.build(batch.q_lens, [len(k) for k in batch.keys], tables, 16)
    assert torch.equal(batch.attend(), before)


def test_broken_tokens_stay_in_their_sequence(backend: str) -> None:
    batch = Batch(Case(torch.bfloat16, batch=((1, 40), (1, 41))))
    batch.keys[0][7] = float("nan")
    batch.write()
    out = batch.attend()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_company(threads: int, backend: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = Batch(Case(torch.bfloat16, heads=(7, 1), batch=((3, 700), (1, 4100), (1, 40))))
        batch.write()
        out = batch.attend()
        batch.plan = AttentionPlan.build([1], [4100], [batch.tables[1]], 16)
        alone = batch.attend(batch.q[3:4])
    finally:
        torch.set_num_threads(before)
    _assert_close(alone, out[3:4].double(), torch.bfloat16)


def test_extreme_scores_do_not_overflow(backend: str) -> None:
    batch = Batch(Case(sinks=True))
    batch.q *= 300
    batch.write()
    actual, expected = batch.attend().double(), batch.expected()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_plan_from_lists() -> None:
    plan = AttentionPlan.build([1, 5, 3], [17, 5, 20], [[7, 9], [4, 99], [3, 2]], 16)
    assert plan.q_start.tolist() == [0, 1, 6, 9]
    assert plan.context_len.tolist() == [17, 5, 20]
    assert plan.block_table.tolist() == [[7, 9], [4, 0], [3, 2]]
    assert plan.slots.tolist() == [144, 64, 65, 66, 67, 68, 33, 34, 35]
    assert plan.spans == ((0, 1, 17), (1, 6, 5), (6, 9, 20))


@pytest.mark.parametrize(("q_len", "context", "blocks"), [(0, 4, 1), (5, 4, 1), (1, 17, 1)])
def test_impossible_plans_are_refused(q_len: int, context: int, blocks: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        AttentionPlan.build([q_len], [context], [list(range(blocks))], 16)


def test_odd_sizes_of_16_bit_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        allocate_kv(4, 16, 2, 63, 64, torch.bfloat16)
