"""The kernels' meaning in a few plain lines of float64, slow and obvious: what the tests compare with."""

from collections.abc import Sequence

from torch import Tensor

from .segments import LoraPiece


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def sgmv(y: Tensor, x: Tensor, segments: Sequence[tuple[int, int, Sequence[LoraPiece]]]) -> Tensor:
    """y plus every segment's low-rank update, as a new float64 tensor."""
    result = y.double()
    for start, end, pieces in segments:
        for a, b, scale, offset in pieces:
            update = scale * (x[start:end].double() @ a.double().T) @ b.double().T
            result[start:end, offset : offset + b.shape[0]] += update
    return result
