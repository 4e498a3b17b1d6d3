"""Which adapters are asked how often: the share of all requests that each of n gets, the most popular first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serverlesslora_loadgen.errors import WorkloadError
from serverlesslora_loadgen.generate.spelling import parse_law

Shares = NDArray[np.float64]  # [adapters], of sum 1


class Uniform(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="uniform"):
    def shares(self, n: int) -> Shares:
        return np.full(n, 1 / n)


class Power(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="power"):
    """P(i) = ((i+1)^α - i^α) / n^α, i from 0 (S-LoRA, arXiv 2311.03285, and its generator: a power-law variable cut
    into n equal parts). α = 1 is uniform; the most popular has n^-α.
    """

    alpha: Annotated[float, Meta(gt=0, le=1)]

    def shares(self, n: int) -> Shares:
        return _normal(np.diff(np.arange(n + 1, dtype=np.float64) ** self.alpha))


class Zipf(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="zipf"):
    """P(i) ~ (i+1)^-s."""

    s: Annotated[float, Meta(ge=0, le=20)]

    def shares(self, n: int) -> Shares:
        return _normal(np.arange(1, n + 1, dtype=np.float64) ** -self.s)


class Geometric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="geometric"):
    """P(i) ~ a^-i (Punica's "skewed", arXiv 2310.18547)."""

    a: Annotated[float, Meta(ge=1, le=1000)]

    def shares(self, n: int) -> Shares:
        return _normal(self.a ** -np.arange(n, dtype=np.float64))


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="file"):
    """A number per line, in the order of the adapters. Blank lines and `# comments` are skipped."""

    file: str

    def shares(self, n: int) -> Shares:
        weights = _read_weights(Path(self.file))
        if len(weights) != n:
            raise WorkloadError(f"{self.file} has {len(weights)} weights for {n} adapters; give one for each")
        return _normal(np.array(weights))


Popularity = Uniform | Power | Zipf | Geometric | Weights


def parse_popularity(text: str) -> Popularity:
    """`uniform`, `power:0.5`, `zipf:1.1`, `geometric:1.5`, `file:weights.txt`. Raises WorkloadError."""
    law: Popularity = parse_law(text, Popularity, "a popularity")
    return law


def counts(shares: Shares, total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Of `total` requests, how many each adapter gets: its share, rounded up or down at random but never further.

    Systematic sampling: the shares lie on a ruler one after another, and each gets the marks that fall on it, whose
    grid begins at one random place. So an adapter that is worth 0.3 requests has one in three traces of ten.
    """
    ruler = np.concatenate([[0.0], np.cumsum(shares)])
    ruler *= total / ruler[-1]
    marks = np.floor(ruler + rng.random())
    marks[-1] = total + marks[0]  # exactly, whatever the rounding of the sum
    return np.diff(marks).astype(np.int64)


def _normal(weights: Shares) -> Shares:
    shares: Shares = weights / weights.sum()
    return shares


def _read_weights(path: Path) -> list[float]:
    weights = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read the popularity {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            try:
                weight = float(text)
            except ValueError:
                raise WorkloadError(f"{path}:{number}: {text!r} is not a weight") from None
            if not 0 <= weight < float("inf"):
                raise WorkloadError(f"{path}:{number}: {weight} is not a weight; give a finite number, 0 or more")
            weights.append(weight)
    if sum(weights) == 0:
        raise WorkloadError(f"{path} gives no adapter any weight; at least one must be asked")
    return weights
