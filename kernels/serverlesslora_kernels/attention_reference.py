"""The obvious attention, one token and one head at a time in float64, to check the kernels against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    q_lens: Sequence[int],
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [T, q_heads, dim_k] packed; keys[s] [context, kv_heads, dim_k] of each whole sequence -> float64."""
    rows = []
    row = 0
    for k, v, q_len in zip(keys, values, q_lens, strict=True):
        group = q.shape[1] // k.shape[1]
        for position in range(len(k) - q_len, len(k)):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            heads = []
            for head in range(q.shape[1]):
                seen = slice(first, position + 1)
                scores = k[seen, head // group].double() @ q[row, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                sink = -math.inf if sinks is None else sinks[head].item()
                weights = torch.cat((scores, torch.tensor([sink], dtype=torch.float64))).softmax(0)[:-1]
                heads.append(weights @ v[seen, head // group].double())
            rows.append(torch.stack(heads))
            row += 1
    return torch.stack(rows)
