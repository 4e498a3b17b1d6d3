"""What a decoder layer does between its matrix products, one native call each, rounded where transformers rounds.

A dozen small torch operations per layer cost more than the arithmetic when a step carries few tokens. Every function
has the torch version beside it and takes it wherever the native one does not apply.
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from serverlesslora_kernels import native

# Elements below which waking a second thread costs more than it saves.
SERIAL_ELEMENTS = 1 << 16


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, normalised in float32.

    Plain (Llama, Qwen): rounded to x's type, then weighed. `offset` (Gemma): times 1 + weight in float32, then rounded.
    """
    library = _library() if _fits(x) and weight.dtype is x.dtype and weight.is_contiguous() else None
    if library is None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * (1.0 + weight.float())).to(x.dtype) if offset else weight * wide.to(x.dtype)
    x, rows, stride = _as_rows(x)
    out = x.new_empty(x.shape)
    library.rms_norm(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rows,
        x.shape[-1],
        stride,
        eps,
        offset,
        x.dtype is torch.bfloat16,
        _threads(out),
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate_up [..., 2 · intermediate], gate first."""
    return _gated_mul(gate_up, gelu=False)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up, gelu in its tanh approximation, for gate_up [..., 2 · intermediate], gate first."""
    return _gated_mul(gate_up, gelu=True)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + rotate_half(x) · sin for q [T, q_heads, dim] and k [T, kv_heads, dim], strided views welcome.

    cos and sin [T, rotary] may be narrower than dim; the columns beyond pass through. Results are contiguous.
    """
    same = q.dtype is k.dtype is cos.dtype is sin.dtype
    library = _library() if same and _fits(q) and q.stride(2) == 1 and k.stride(2) == 1 else None
    if library is None:
        return _rope_torch(q, cos, sin), _rope_torch(k, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens, q_heads, dim = q.shape
    q_token, q_head, _ = q.stride()
    k_token, k_head, _ = k.stride()
    library.rope(
        q_out.data_ptr(),
        k_out.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        q_heads,
        k.shape[1],
        dim,
        cos.shape[-1],
        q_token,
        q_head,
        k_token,
        k_head,
        q.dtype is torch.bfloat16,
        _threads(q_out),
    )
    return q_out, k_out


def _gated_mul(gate_up: Tensor, *, gelu: bool) -> Tensor:
    columns = gate_up.shape[-1] // 2
    library = _library() if _fits(gate_up) else None
    if library is None:
        gate, up = gate_up[..., :columns], gate_up[..., columns:]
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    gate_up, rows, stride = _as_rows(gate_up)
    out = gate_up.new_empty((*gate_up.shape[:-1], columns))
    library.gated_mul(
        out.data_ptr(),
        gate_up.data_ptr(),
        rows,
        columns,
        stride,
        gelu,
        gate_up.dtype is torch.bfloat16,
        _threads(out),
    )
    return out


def _rope_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned.contiguous()


def _as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x itself when its rows are evenly spaced in memory, a copy otherwise; how many rows and how far apart."""
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // columns, columns
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.shape[0], x.stride(0)
    return x.contiguous(), x.numel() // columns, columns


def _fits(x: Tensor) -> bool:
    return x.is_cpu and (x.dtype is torch.bfloat16 or x.dtype is torch.float32)


def _threads(out: Tensor) -> int:
    return 1 if out.numel() < SERIAL_ELEMENTS else torch.get_num_threads()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load("fused")
    if library is not None:
        pointer, long, real, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
        library.rms_norm.argtypes = [pointer] * 3 + [long] * 3 + [real] + [integer] * 3
        library.gated_mul.argtypes = [pointer] * 2 + [long] * 3 + [integer] * 3
        library.rope.argtypes = [pointer] * 6 + [long] * 9 + [integer] * 2
        for function in (library.rms_norm, library.gated_mul, library.rope):
            function.restype = None
    return library
