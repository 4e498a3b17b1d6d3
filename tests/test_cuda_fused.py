"""The device's fused programs against the modules of transformers they stand for."""

from tests.triton_interpreter import DEVICE  # decides how Triton is loaded: before everything else

# isort: split
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from serverlesslora_kernels.cuda import fused
from serverlesslora_kernels.cuda.attention import DeviceKv, DevicePlan, write_kv

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype, times: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * times).to(dtype)


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-6, rare: float = 4e-3) -> None:
    """float32: 1e-6. Half: equal but for the rare value that sits on a rounding edge, and that by one step."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype is torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=atol)
        return
    torch.testing.assert_close(actual, expected, rtol=STEP[actual.dtype], atol=atol)
    assert (actual != expected).float().mean() < rare


@DTYPES
@pytest.mark.parametrize(
    ("shape", "offset"), list(itertools.product(((1, 896), (5, 2048), (1, 7, 72), (50, 100)), (False, True)))
)
def test_rms_norm_is_the_modules(shape: tuple[int, ...], offset: bool, dtype: torch.dtype) -> None:
    module = (Gemma2RMSNorm if offset else Qwen2RMSNorm)(shape[-1], eps=1e-5).to(DEVICE, dtype)
    module.weight.data = random(shape[-1], dtype=dtype)
    x = random(*shape, dtype=dtype, times=3)
    with torch.no_grad():
        assert_same(fused.rms_norm(x, module.weight, 1e-5, offset=offset), module(x))


def test_rms_norm_of_wide_rows() -> None:
    weight, x = random(16384, dtype=torch.bfloat16), random(2, 16384, dtype=torch.bfloat16)
    module = Qwen2RMSNorm(16384, eps=1e-5).to(DEVICE, torch.bfloat16)
    module.weight.data = weight
    with torch.no_grad():
        assert_same(fused.rms_norm(x, weight, 1e-5), module(x))
    with pytest.raises(ValueError, match="does not fit"):
        fused.rms_norm(torch.empty(1, 1 << 17), torch.empty(1 << 17), 1e-5)


@DTYPES
def test_rms_norm_of_slices(dtype: torch.dtype) -> None:
    weight = random(32, dtype=dtype)
    qkv = random(1, 6, 5 * 32 + 7, dtype=dtype)
    heads = qkv[..., 7:].view(1, 6, 5, 32)
    for view in (qkv[0, :, 16:48], heads, heads[:, :, 1:4], heads.transpose(1, 2), heads.transpose(2, 3)[..., :32]):
        expected = weight[: view.shape[-1]]
        assert_same(fused.rms_norm(view, expected, 1e-6), fused.rms_norm(view.clone().contiguous(), expected, 1e-6))


def test_a_wider_weight_widens_the_norm_as_in_torch() -> None:
    module = Qwen2RMSNorm(64, eps=1e-5).to(DEVICE)
    module.weight.data = random(64, dtype=torch.float32)
    x = random(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        # One step of bfloat16 before the weight is applied shows in float32.
        torch.testing.assert_close(fused.rms_norm(x, module.weight, 1e-5), module(x), rtol=2**-7, atol=1e-6)
        gemma = fused.rms_norm(x, module.weight, 1e-5, offset=True)
    assert gemma.dtype is torch.bfloat16


@DTYPES
@pytest.mark.parametrize("offset", [False, True])
def test_add_rms_norm_is_the_sum_then_the_norm(offset: bool, dtype: torch.dtype) -> None:
    x, residual, weight = random(1, 5, 896, dtype=dtype), random(1, 5, 896, dtype=dtype), random(896, dtype=dtype)
    total = residual + x
    normed = fused.add_rms_norm(x, residual, weight, 1e-6, offset=offset)
    assert torch.equal(residual, total)
    assert torch.equal(normed, fused.rms_norm(total, weight, 1e-6, offset=offset))
    strided = random(5, 2, 896, dtype=dtype)[:, 1]
    flat = residual[0].clone()
    fused.add_rms_norm(strided, flat, weight, 1e-6)
    assert torch.equal(flat, residual[0] + strided)
    with pytest.raises(ValueError, match="same shape"):
        fused.add_rms_norm(x[:, :1], residual, weight, 1e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 9728), (3, 2 * 37), (1, 4, 2400)], ids=str)
def test_gated_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = random(*shape, dtype=dtype, times=4)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_same(fused.silu_mul(gate_up), F.silu(gate) * up)
    # In torch's float32 1 + tanh cancels for negative gates; sigmoid, here, does not: float64 is the judge.
    wide = gate.double()
    exact = (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(dtype) * up
    assert_same(fused.gelu_tanh_mul(gate_up), exact)
    torch.testing.assert_close(
        fused.gelu_tanh_mul(gate_up), F.gelu(gate, approximate="tanh") * up, rtol=STEP.get(dtype, 1e-6), atol=1e-5
    )
    part = random(*shape[:-1], shape[-1] + 6, dtype=dtype)[..., 6:]
    assert torch.equal(fused.silu_mul(part), fused.silu_mul(part.contiguous()))


def test_gated_activations_far_out() -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 200.0, 1e4, float("nan")], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    for ours, theirs in (
        (fused.silu_mul(gate_up), F.silu(gate)),
        (fused.gelu_tanh_mul(gate_up), F.gelu(gate, approximate="tanh")),
    ):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def rotation(tokens: int, rotary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, rotary // 2, device=DEVICE).repeat(1, 2) * 9
    return angle.cos().to(dtype), angle.sin().to(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim"), [(1, 14, 2, 64), (9, 4, 4, 80), (3, 2, 1, 72), (40, 7, 1, 16)]
)
def test_rope_on_slices_of_a_fused_projection(
    tokens: int, q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    qkv = random(tokens, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    q = qkv[:, : q_heads * dim].view(tokens, q_heads, dim)
    k = qkv[:, q_heads * dim : (q_heads + kv_heads) * dim].view(tokens, kv_heads, dim)
    cos, sin = rotation(tokens, dim, dtype)
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for ours, theirs in zip(fused.rope(q, k, cos, sin), expected, strict=True):
        assert ours.is_contiguous()
        theirs = theirs[0].transpose(0, 1)
        assert_same(ours, theirs)
        if dtype is not torch.float32:  # every product is rounded: nothing is left to the order of operations
            assert torch.equal(ours, theirs)


@DTYPES
def test_rope_leaves_columns_beyond_the_rotary_ones(dtype: torch.dtype) -> None:
    q, k = random(2, 3, 64, dtype=dtype), random(2, 1, 64, dtype=dtype)
    cos, sin = rotation(2, 24, dtype)
    turned = fused.rope(q[..., :24], k[..., :24], cos, sin)
    for ours, part, whole in zip(fused.rope(q, k, cos, sin), turned, (q, k), strict=True):
        assert torch.equal(ours, torch.cat((part, whole[..., 24:]), dim=-1))


@DTYPES
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "dim_v", "rotary"), [(14, 2, 64, 64, 64), (4, 4, 80, 80, 32), (3, 1, 48, 32, 48)]
)
def test_rope_and_store_is_rope_then_write(
    q_heads: int, kv_heads: int, dim: int, dim_v: int, rotary: int, dtype: torch.dtype
) -> None:
    tokens = 9
    qkv = random(tokens, q_heads * dim + kv_heads * (dim + dim_v), dtype=dtype)
    q = qkv[:, : q_heads * dim].view(tokens, q_heads, dim)
    k = qkv[:, q_heads * dim : (q_heads + kv_heads) * dim].view(tokens, kv_heads, dim)
    v = qkv[:, (q_heads + kv_heads) * dim :].view(tokens, kv_heads, dim_v)
    cos, sin = rotation(tokens, rotary, dtype)
    plan = DevicePlan.build((1, 8), (20, 12), ([3, 0, 4], [1, 5]), 8, DEVICE, pin=False)
    ours, theirs = (
        DeviceKv(*(torch.full((6, 8, kv_heads, d), 7.0, dtype=dtype, device=DEVICE) for d in (dim, dim_v)))
        for _ in range(2)
    )
    turned = fused.rope_and_store(q, k, v, cos, sin, ours, plan)
    q_turned, k_turned = fused.rope(q, k, cos, sin)
    write_kv(theirs, k_turned, v, plan)
    assert torch.equal(turned, q_turned)
    assert torch.equal(ours.k, theirs.k) and torch.equal(ours.v, theirs.v)
    assert torch.equal(ours.v[4, 3], v[0])


def test_rope_and_store_skips_unused_rows_of_a_static_plan() -> None:
    q = random(4, 2, 16, dtype=torch.bfloat16)
    cos, sin = rotation(4, 16, torch.bfloat16)
    kv = DeviceKv(*(torch.full((3, 8, 2, 16), 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
    plan = DevicePlan.static(4, 2, 8, DEVICE)
    plan.fill([3, 0, 9], [[1], [], [0, 2]])
    fused.rope_and_store(q, q, q, cos, sin, kv, plan)
    assert torch.equal(kv.v[1, 2], q[0]) and torch.equal(kv.v[2, 0], q[2])
    assert (kv.v != 7).any(-1).any(-1).sum() == 2


def test_cosines_of_another_type_promote_as_in_torch() -> None:
    q, (cos, sin) = random(2, 3, 16, dtype=torch.bfloat16), rotation(2, 16, torch.float32)
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos[None], sin[None])
    kv = DeviceKv(*(torch.zeros(1, 8, 3, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
    plan = DevicePlan.build((2,), (2,), ([0],), 8, DEVICE, pin=False)
    turned = fused.rope_and_store(q, q, q, cos, sin, kv, plan)
    assert turned.dtype is torch.float32
    torch.testing.assert_close(turned, expected[0].transpose(0, 1))
    assert torch.equal(kv.k[0, :2], turned.bfloat16())


def test_every_program_has_cases_to_compile() -> None:
    cases = fused.compile_cases()
    assert {case.program.__name__ for case in cases} == {"rms_norm", "gated_mul", "rope", "rope_and_store"}
    for case in cases:
        assert list(case.signature) == case.program.arg_names
