"""How far a result is from its reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Relative to float64 inputs of the same values: rounding of operands and of one output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖; NaN where any output is not finite, which passes no check."""
    if not bool(torch.isfinite(out).all()):
        return math.nan
    reference = reference.double()
    return float((out.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
