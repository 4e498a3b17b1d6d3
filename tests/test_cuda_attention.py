"""The device's paged attention against the float64 loop: decode rows and prefill chunks in one packed batch."""

from tests.triton_interpreter import DEVICE  # decides how Triton is loaded: before everything else

# isort: split
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from serverlesslora_kernels.attention_reference import reference_attention
from serverlesslora_kernels.cuda import attention
from serverlesslora_kernels.cuda.attention import (
    DeviceKv,
    DevicePlan,
    Shapes,
    compile_cases,
    max_chunks,
    paged_attention,
    varlen_attention,
    write_kv,
)
from serverlesslora_kernels.cuda.plan import QUERY_TILE
from serverlesslora_kernels.cuda.triton_code import attention as programs

# (new tokens, context): decode, whole prompt, chunk in the middle, chunk that starts inside a block, one token in all
MIXED = ((1, 37), (21, 21), (9, 90), (1, 1), (5, 8))
DECODE = ((1, 5), (1, 64), (1, 129))
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ALL = (torch.float32, torch.float16, torch.bfloat16)


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


def _cases() -> Iterator[Case]:
    for dtype in ALL:
        yield Case(dtype)
    for heads in ((1, 1), (3, 3), (7, 1), (8, 2)):
        yield Case(torch.bfloat16, heads=heads, dims=(16, 16))
    for (dim_k, dim_v), dtype in zip(
        ((80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (20, 12)),
        (torch.bfloat16, torch.float32, *(torch.bfloat16,) * 3, torch.float32),
        strict=True,
    ):
        yield Case(dtype, heads=(2, 1), dims=(dim_k, dim_v), batch=((1, 37), (9, 50)))
    for block_size in (8, 32, 128):
        yield Case(torch.bfloat16, block_size=block_size, heads=(2, 2), window=13)
    for window, softcap, sinks in ((1, None, False), (20, None, True), (None, 5.0, False), (None, None, True)):
        yield Case(heads=(2, 1), dims=(16, 16), window=window, softcap=softcap, sinks=sinks)
        yield Case(torch.bfloat16, (7, 1), (32, 32), batch=DECODE, window=window, softcap=softcap, sinks=sinks)
    yield Case(torch.float16, window=33, softcap=30.0, sinks=True)
    # Several chunks of keys per decode row, and query tiles with a rest.
    yield Case(torch.bfloat16, dims=(16, 16), batch=((1, 1300), (QUERY_TILE + 22, 300), (1, 2)))
    yield Case(dims=(16, 16), heads=(2, 1), batch=((1, 1300), (1, 513), (1, 300)), window=700, sinks=True)
    yield Case(dims=(16, 16), heads=(2, 1), batch=((1, 600), (2, 600)), softcap=3.0, sinks=True)


class Batch:
    """Contexts in one layer of a pool of several, whose blocks hold NaN wherever nothing was written."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        self.case = case
        (q_heads, kv_heads), (dim_k, dim_v) = case.heads, case.dims
        self.q_lens = [q_len for q_len, _ in case.batch]
        self.contexts = [context for _, context in case.batch]
        counts = [-(-context // case.block_size) for context in self.contexts]
        free = list(range(sum(counts) + 3))
        rng.shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.free = free
        self.kv = pool(sum(counts) + 3, case)
        self.keys = [self.random(context, kv_heads, dim_k) for context in self.contexts]
        self.values = [self.random(context, kv_heads, dim_v) for context in self.contexts]
        self.q = self.random(sum(self.q_lens), q_heads, dim_k)
        self.sinks = torch.randn(q_heads, device=DEVICE).to(case.dtype) if case.sinks else None
        self.scale = dim_k**-0.5 * 1.7
        self.plan = self.plan_of(self.q_lens, self.contexts)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(self.case.dtype)

    def plan_of(self, q_lens: list[int], contexts: list[int]) -> DevicePlan:
        pin = DEVICE.type == "cuda"
        return DevicePlan.build(q_lens, contexts, self.tables, self.case.block_size, DEVICE, pin=pin)

    def write(self) -> None:
        """All tokens of all sequences as one prefill: what each held before the new ones, then the new ones too."""
        write_kv(self.kv, torch.cat(self.keys), torch.cat(self.values), self.plan_of(self.contexts, self.contexts))

    def attend(self, q: Tensor, plan: DevicePlan) -> Tensor:
        case = self.case
        return paged_attention(
            q, self.kv, plan, scale=self.scale, sliding_window=case.window, softcap=case.softcap, sinks=self.sinks
        )

    def expected(self) -> Tensor:
        case = self.case
        keys, values = [key.cpu() for key in self.keys], [value.cpu() for value in self.values]
        return reference_attention(
            self.q.cpu(),
            keys,
            values,
            self.q_lens,
            scale=self.scale,
            sliding_window=case.window,
            softcap=case.softcap,
            sinks=None if self.sinks is None else self.sinks.cpu(),
        )


def pool(num_blocks: int, case: Case, layers: int = 3) -> DeviceKv:
    """The middle layer of a pool of all layers, block first."""
    kv_heads, (dim_k, dim_v) = case.heads[1], case.dims
    k_size, v_size = (case.block_size * kv_heads * dim for dim in case.dims)
    whole = torch.full((num_blocks, layers * (k_size + v_size)), float("nan"), dtype=case.dtype, device=DEVICE)
    start = k_size + v_size
    return DeviceKv(
        whole[:, start : start + k_size].view(num_blocks, case.block_size, kv_heads, dim_k),
        whole[:, start + k_size : 2 * start].view(num_blocks, case.block_size, kv_heads, dim_v),
    )


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_matches_the_float64_loop(case: Case) -> None:
    batch = Batch(case)
    batch.write()
    out = batch.attend(batch.q, batch.plan)
    assert out.dtype is case.dtype
    torch.testing.assert_close(out.cpu().double(), batch.expected(), rtol=0, atol=TOLERANCE[case.dtype])


def test_queries_and_new_tokens_may_be_slices_of_a_fused_projection() -> None:
    case = Case(torch.bfloat16, heads=(4, 2), dims=(32, 32), batch=((1, 1), (4, 4)))
    batch = Batch(case)
    qkv = batch.random(5, 8, 32)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    write_kv(batch.kv, k, v, batch.plan)
    out = batch.attend(q, batch.plan)
    other = Batch(case)
    write_kv(other.kv, k.contiguous(), v.contiguous(), other.plan)
    assert torch.equal(out, other.attend(q.contiguous(), other.plan))
    assert torch.equal(out[0], v[0].repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Bit for bit: decode rows are cut by their own context, chunks walk their own keys."""
    batch = Batch(Case(dtype, dims=(16, 16), batch=((1, 700), (40, 150), (1, 30), (1, 300))))
    batch.write()
    whole = batch.attend(batch.q, batch.plan)
    row = 0
    for seq, q_len in enumerate(batch.q_lens):
        args = ([q_len], [batch.contexts[seq]], [batch.tables[seq]])
        plan = DevicePlan.build(*args, 16, DEVICE, pin=False)
        alone = batch.attend(batch.q[row : row + q_len], plan)
        assert torch.equal(alone, whole[row : row + q_len])
        row += q_len


@pytest.mark.parametrize("programs_wanted", [1, 9])
def test_few_programs_share_the_chunks(programs_wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(Case(torch.bfloat16, (2, 1), (16, 16), batch=((1, 1300), (1, 700), (1, 9))))
    batch.write()
    expected = batch.attend(batch.q, batch.plan)
    monkeypatch.setattr(attention, "TARGET_PROGRAMS", programs_wanted)
    assert torch.equal(batch.attend(batch.q, batch.plan), expected)


def test_static_plan_is_refilled_and_ignores_unused_rows() -> None:
    case = Case(torch.bfloat16, dims=(32, 32), batch=((1, 37), (1, 300), (1, 16), (1, 8)), window=200, sinks=True)
    batch = Batch(case)
    batch.write()
    expected = batch.attend(batch.q, batch.plan)
    plan = DevicePlan.static(6, 40, case.block_size, DEVICE)
    addresses = [tensor.data_ptr() for tensor in (plan.slots, plan.decode, plan.block_table, plan.packed)]
    q = torch.cat((batch.q, batch.random(2, 4, 32)))
    for used in ([0, 1, 2, 3], [3], [], [2, 0]):
        # Tables may be longer than needed; a row may be left empty in the middle.
        contexts = [batch.contexts[seq] for seq in used] + [0]
        plan.fill(contexts, [[*batch.tables[seq], 7] for seq in used] + [[]])
        before = [part.clone() for part in batch.kv]
        new_k, new_v = batch.random(6, 2, 32), batch.random(6, 2, 32)
        for row, seq in enumerate(used):
            new_k[row], new_v[row] = batch.keys[seq][-1], batch.values[seq][-1]
        write_kv(batch.kv, new_k, new_v, plan)
        for part, old in zip(batch.kv, before, strict=True):
            assert torch.equal(part.nan_to_num(7.5), old.nan_to_num(7.5))  # the same tokens, nothing else
        out = batch.attend(torch.cat((q[used], q[: 6 - len(used)])), plan)
        assert torch.equal(out[: len(used)], expected[used])
        assert not out[len(used) :].any()
    assert addresses == [tensor.data_ptr() for tensor in (plan.slots, plan.decode, plan.block_table, plan.packed)]


def test_a_pool_may_be_larger_than_32_bits_can_count() -> None:
    """Addresses only: nothing touches most of this memory, so it costs none on the host."""
    if DEVICE.type == "cuda":
        pytest.skip("would be real memory")
    stride = 2**31 // 8 + 64
    whole = torch.empty(9 * stride, dtype=torch.bfloat16)
    kv = DeviceKv(*(whole.as_strided((9, 8, 1, 16), (stride, 32, 16, 1), start) for start in (0, 16)))
    k, v = (torch.randn(2, 1, 16).bfloat16() for _ in range(2))
    plan = DevicePlan.build((2,), (2,), ([8],), 8, "cpu", pin=False)
    write_kv(kv, k, v, plan)
    assert torch.equal(kv.k[8, :2], k)
    assert torch.equal(paged_attention(k, kv, plan, scale=1.0)[0], v[0])
    last = DevicePlan.build((1,), (2,), ([8],), 8, "cpu", pin=False)
    assert paged_attention(k[1:], kv, last, scale=1.0).isfinite().all()


def test_plan_is_one_buffer_and_names_every_token() -> None:
    plan = DevicePlan.build((1, 150, 1, 2), (9, 160, 1, 2), ([3, 1], range(20), [5], [6]), 8, "cpu", pin=False)
    assert plan.slots.tolist() == [8, *range(10, 160), 40, 48, 49]
    assert plan.q_start.tolist() == [0, 1, 151, 152, 154]
    assert plan.decode.tolist() == [[0, 0, 9], [151, 2, 1]]
    assert plan.tiles.tolist() == [[1, 129, 22, 138], [1, 1, 128, 10], [3, 152, 2, 0]]
    assert (plan.max_q_len, plan.max_context, plan.max_decode_context) == (150, 160, 9)
    tensors = (plan.slots, plan.q_start, plan.context_len, plan.decode, plan.tiles, plan.block_table)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.storage_offset() % 4 == 0 for tensor in tensors)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks of 8"):
        DevicePlan.build((1,), (17,), ([1, 2],), 8, "cpu", pin=False)
    with pytest.raises(ValueError, match="power of two"):
        DevicePlan.build((1,), (1,), ([1],), 12, "cpu", pin=False)
    plan = DevicePlan.static(2, 4, 8, "cpu")
    with pytest.raises(ValueError, match="do not fit 2 rows of 4"):
        plan.fill([33], [range(5)])
    with pytest.raises(ValueError, match="do not fit 1 blocks"):
        plan.fill([9], [[1]])
    batch = Batch(Case(batch=((1, 1),)))
    with pytest.raises(ValueError, match="one type"):
        batch.attend(batch.q.half(), batch.plan)


@triton.jit  # type: ignore[untyped-decorator]
def cut_contexts(out, contexts, TILE: tl.constexpr, WINDOW: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, 1024)
    begin, per_chunk, chunks = programs.chunks_of(tl.load(contexts + lane), TILE, WINDOW, MIN, MAX)
    tl.store(out + lane, begin + tl.zeros([1024], tl.int32))
    tl.store(out + 1024 + lane, per_chunk)
    tl.store(out + 2048 + lane, chunks)


@pytest.mark.parametrize(("kv_heads", "window"), list(itertools.product((1, 8, 40), (0, 1, 128, 4097))))
def test_chunks_cover_what_a_row_sees_and_fit_the_scratch(kv_heads: int, window: int) -> None:
    shapes = Shapes.of(128, 128, torch.bfloat16)
    contexts = torch.cat((torch.arange(700), torch.randint(700, 200_000, (324,)))).int().to(DEVICE)
    out = torch.empty(3, 1024, dtype=torch.int32, device=DEVICE)
    most = max(16, min(128, 256 // (1 << (kv_heads - 1).bit_length())))
    cut_contexts[(1,)](out, contexts, TILE=shapes.keys, WINDOW=window, MIN=256 // shapes.keys, MAX=most)
    for context, begin, tiles, chunks in zip(contexts.tolist(), *out.tolist(), strict=True):
        assert begin % shapes.keys == 0 and begin <= max(0, context - (window or context))
        assert (chunks - 1) * tiles * shapes.keys < max(1, context - begin) <= max(1, chunks * tiles * shapes.keys)
        assert chunks <= max_chunks(context, kv_heads, shapes, window) <= max_chunks(200_000, kv_heads, shapes, window)


def test_every_program_has_cases_to_compile() -> None:
    cases = compile_cases()
    assert {case.program.__name__ for case in cases} == {"write_kv", "decode_split", "decode_combine", "attend_chunk"}
    for case in cases:
        assert list(case.signature) == case.program.arg_names
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)


def test_torchs_paged_attention_is_left_alone_where_it_cannot_be() -> None:
    batch = Batch(Case(torch.bfloat16, batch=DECODE))  # its blocks are too small for FlashAttention 2
    assert varlen_attention(batch.q, batch.kv, batch.plan, scale=1.0) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch has it for CUDA only")
def test_torchs_paged_attention_agrees() -> None:
    batch = Batch(Case(torch.bfloat16, block_size=256, batch=((1, 700), (9, 300)), window=100))
    for part in batch.kv:
        part.zero_()
    batch.write()
    theirs = varlen_attention(batch.q, batch.kv, batch.plan, scale=batch.scale, sliding_window=100)
    if theirs is None:
        pytest.skip("this torch has no paged attention")
    torch.testing.assert_close(theirs, batch.attend(batch.q, batch.plan), rtol=0, atol=1.6e-2)
