"""The fused element-wise kernels against the modules of transformers they stand for, with and without native code."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from serverlesslora_kernels import fused, native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.load("fused") is None, reason="no native"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=[NATIVE, "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    if request.param == "torch":
        monkeypatch.setattr(fused, "_library", lambda: None)
    return str(request.param)


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-6, rare: float = 2e-3) -> None:
    """float32: 1e-6. bfloat16: equal but for the rare value that sits on a rounding edge, and that by one step."""
    assert actual.dtype == expected.dtype
    if actual.dtype is torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=atol)
        return
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=atol)
    assert (actual != expected).float().mean() < rare


@DTYPES
@pytest.mark.parametrize(
    ("shape", "offset"), list(itertools.product(((1, 896), (5, 2048), (1, 7, 72), (130, 900)), (0, 1)))
)
def test_rms_norm_is_the_modules(shape: tuple[int, ...], offset: int, dtype: torch.dtype) -> None:
    module = (Gemma2RMSNorm if offset else Qwen2RMSNorm)(shape[-1], eps=1e-5).to(dtype)
    module.weight.data = torch.randn(shape[-1]).to(dtype)
    x = (torch.randn(shape) * 3).to(dtype)
    with torch.no_grad():
        assert_same(fused.rms_norm(x, module.weight, 1e-5, offset=bool(offset)), module(x))


@DTYPES
def test_rms_norm_of_a_slice(dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 64).to(dtype), torch.randn(32).to(dtype)
    assert_same(fused.rms_norm(x[:, 16:48], weight, 1e-6), fused.rms_norm(x[:, 16:48].clone(), weight, 1e-6))
    heads = torch.randn(3, 8, 32).to(dtype).transpose(0, 1)
    assert_same(fused.rms_norm(heads, weight, 1e-6), fused.rms_norm(heads.contiguous(), weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 9728), (3, 2 * 37), (1, 16, 9728)], ids=str)
def test_gated_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape) * 4).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_same(fused.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)
    # 1 + tanh cancels for negative gates, in torch as here: what is left of one float step is multiplied by gate and up
    assert_same(
        fused.gelu_tanh_mul(gate_up), torch.nn.functional.gelu(gate, approximate="tanh") * up, atol=1e-5, rare=2e-2
    )


def test_gated_activations_far_out() -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 200.0, 1e4, float("nan")])
    gate_up = torch.stack((gate, torch.ones_like(gate))).flatten()[None]
    for ours, theirs in (
        (fused.silu_mul(gate_up), torch.nn.functional.silu(gate)),
        (fused.gelu_tanh_mul(gate_up), torch.nn.functional.gelu(gate, approximate="tanh")),
    ):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim"), [(1, 14, 2, 64), (9, 4, 4, 80), (3, 2, 1, 72), (80, 14, 2, 64)]
)
def test_rope_on_slices_of_a_fused_projection(
    tokens: int, q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * dim).to(dtype)
    q = qkv[:, : q_heads * dim].view(tokens, q_heads, dim)
    k = qkv[:, q_heads * dim : (q_heads + kv_heads) * dim].view(tokens, kv_heads, dim)
    angle = torch.randn(tokens, dim // 2).repeat(1, 2) * 9
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for ours, theirs in zip(fused.rope(q, k, cos, sin), expected, strict=True):
        assert ours.is_contiguous()
        assert_same(ours, theirs[0].transpose(0, 1))


@DTYPES
def test_rope_leaves_columns_beyond_the_rotary_ones(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 3, 64).to(dtype), torch.randn(2, 1, 64).to(dtype)
    cos, sin = torch.randn(2, 24).to(dtype), torch.randn(2, 24).to(dtype)
    turned = fused.rope(q[..., :24], k[..., :24], cos, sin)
    for ours, part, whole in zip(fused.rope(q, k, cos, sin), turned, (q, k), strict=True):
        assert torch.equal(ours, torch.cat((part, whole[..., 24:]), dim=-1))
