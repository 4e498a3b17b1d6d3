"""What an adapter does to a projection besides plain LoRA, applied row range by row range after the fast path.

Every overlay works in place on `y` (rows of the output, at least as wide as the projection) given `x` (its input rows).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Overlay(Protocol):
    def apply(self, y: Tensor, x: Tensor) -> None: ...

    @property
    def tensors(self) -> tuple[Tensor | None, ...]: ...


class Replace(NamedTuple):
    """A whole linear of the adapter's own (`modules_to_save`, resized output embeddings)."""

    weight: Tensor  # [out, in]
    bias: Tensor | None

    def apply(self, y: Tensor, x: Tensor) -> None:
        y[:, : self.weight.shape[0]] = F.linear(x, self.weight, self.bias)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.weight, self.bias)


class Shift(NamedTuple):
    """A vector added to every row: a trained bias less the backbone's, or the bias of lora_B times its scale."""

    vector: Tensor

    def apply(self, y: Tensor, x: Tensor) -> None:
        y[:, : self.vector.shape[0]] += self.vector

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.vector,)


class Magnitude(NamedTuple):
    """DoRA: W' = m / |W + s·B·A| · (W + s·B·A), so after plain LoRA it is one factor per output column."""

    factor: Tensor
    bias: Tensor | None  # not scaled

    def apply(self, y: Tensor, x: Tensor) -> None:
        y = y[:, : self.factor.shape[0]]
        if self.bias is None:
            y *= self.factor
        else:
            y.sub_(self.bias).mul_(self.factor).add_(self.bias)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.factor, self.bias)


class OutputTokens(NamedTuple):
    """Retrained tokens of an output embedding: their logits come from the adapter's own rows."""

    ids: Tensor
    weight: Tensor  # [len(ids), in]

    def apply(self, y: Tensor, x: Tensor) -> None:
        y.index_copy_(1, self.ids, F.linear(x, self.weight))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.ids, self.weight)


# --- the same for input embeddings: `x` holds token ids ------------------------------------------------------------


class ReplaceTable(NamedTuple):
    weight: Tensor
    scale: Tensor | None  # some families multiply their embeddings

    def apply(self, y: Tensor, x: Tensor) -> None:
        y.copy_(_scaled(F.embedding(x, self.weight), self.scale))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.weight,)


class InputTokens(NamedTuple):
    """Retrained or added tokens of an input embedding."""

    ids: Tensor  # sorted
    weight: Tensor
    scale: Tensor | None

    def apply(self, y: Tensor, x: Tensor) -> None:
        place = torch.searchsorted(self.ids, x).clamp_(max=len(self.ids) - 1)
        known = self.ids[place] == x
        y[known] = _scaled(F.embedding(place[known], self.weight), self.scale)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.ids, self.weight)


class EmbeddingLora(NamedTuple):
    a: Tensor  # [rank, vocabulary]
    b: Tensor  # [hidden, rank]
    scaling: float
    scale: Tensor | None

    def apply(self, y: Tensor, x: Tensor) -> None:
        y += _scaled(F.linear(self.a[:, x].t(), self.b) * self.scaling, self.scale)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.a, self.b)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale.to(rows.dtype)
