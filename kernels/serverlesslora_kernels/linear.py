"""Linear layers over shared read-only weights: a native kernel for few bf16 rows, torch for everything else.

The weights are streamed from where they lie; they are never copied or repacked, so that all workers keep one copy.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from . import native

# Above this many rows torch's blocked matmul catches up with a kernel that keeps all rows in the cache; where the
# processor has tile registers (AMX) oneDNN uses them, and catches up much sooner. Measured on 0.5B shapes, two cores.
MAX_NATIVE_ROWS = 64
MAX_NATIVE_ROWS_BESIDE_TILES = 6
# Multiply-adds below which waking the pool costs more than it saves.
SINGLE_THREAD_WORK = 65_536


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x [..., k], W [n, k] (rows may be strided, as in a slice), b [n]; float32 accumulation.

    The native kernel's result for a row does not depend on how many other rows are in the batch.
    """
    if weight.dtype is torch.bfloat16 and x.dtype is torch.bfloat16:
        n, k = weight.shape
        rows = x.numel() // k if k else 0
        if 0 < rows <= max_native_rows() and (kernel := _kernel()) is not None and _fits(x, weight, bias, n, k):
            if not x.is_contiguous():
                x = x.contiguous()
            y = x.new_empty((*x.shape[:-1], n))
            kernel(
                x.data_ptr(),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                rows,
                n,
                k,
                weight.stride(0),
                1 if rows * n * k <= SINGLE_THREAD_WORK else torch.get_num_threads(),
            )
            return y
    # oneDNN falls off a cliff (a copy of the weight per call) for activations that are not contiguous
    return functional.linear(x.contiguous(), weight, bias)


@functools.cache
def max_native_rows() -> int:
    return MAX_NATIVE_ROWS_BESIDE_TILES if "amx_bf16" in native.cpu_flags() else MAX_NATIVE_ROWS


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, k: int) -> bool:
    """Whether the raw pointers describe what the kernel expects; what it cannot do (gradients, errors) is torch's."""
    if x.shape[-1] != k or weight.stride(1) != 1 or not (x.is_cpu and weight.is_cpu):
        return False
    if bias is not None and (bias.dtype is not torch.bfloat16 or bias.shape != (n,) or not bias.is_contiguous()):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


@functools.cache
def _kernel() -> Callable[..., None] | None:
    library = native.load("linear")
    if library is None:
        return None
    kernel = library.linear_bf16
    kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4 + [ctypes.c_int]
    kernel.restype = None
    return kernel
