"""How long prompts and answers are: laws that lengths are drawn from, always as pairs of input and output."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serverlesslora_loadgen.errors import WorkloadError

Tokens = Annotated[int, Meta(ge=1)]
Pairs = NDArray[np.int64]  # [n, 2]: input and output tokens, at least 1 each

# What other traces and data sets call the two numbers. Case, spaces and underscores do not matter.
COLUMNS = (
    ("inputlength", "outputlength"),  # Mooncake, and the traces of this load generator
    ("contexttokens", "generatedtokens"),  # Azure LLM inference
    ("requesttokens", "responsetokens"),  # BurstGPT
    ("prompttokens", "completiontokens"),  # `usage` of an OpenAI answer
    ("inputtokens", "outputtokens"),
)


class FixedLengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="fixed"):
    input: Tokens
    output: Tokens

    def sample(self, rng: np.random.Generator, n: int) -> Pairs:
        return np.tile(np.array([[self.input, self.output]], dtype=np.int64), (n, 1))


class UniformLengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="uniform"):
    """Both ends included; input and output independent of each other."""

    input: tuple[Tokens, Tokens]
    output: tuple[Tokens, Tokens]

    def __post_init__(self) -> None:
        for low, high in (self.input, self.output):
            if low > high:
                raise ValueError(f"{low}-{high} is an empty range of lengths")

    def sample(self, rng: np.random.Generator, n: int) -> Pairs:
        ends = (self.input, self.output)
        return np.stack([rng.integers(low, high, n, dtype=np.int64, endpoint=True) for low, high in ends], axis=1)


class LogNormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mean: Annotated[float, Meta(ge=1)]  # tokens; of the lengths themselves, not of their logarithms
    sigma: Annotated[float, Meta(ge=0, le=5)]  # of the natural logarithm
    max: Tokens | None = None  # longer ones are cut to this

    def sample(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        mu = math.log(self.mean) - self.sigma**2 / 2  # mean = exp(µ + σ²/2)
        drawn = np.rint(rng.lognormal(mu, self.sigma, n))
        return np.clip(drawn, 1, self.max or 2**31).astype(np.int64)


class LogNormalLengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="lognormal"):
    """Input and output independent of each other."""

    input: LogNormal
    output: LogNormal

    def sample(self, rng: np.random.Generator, n: int) -> Pairs:
        return np.stack([self.input.sample(rng, n), self.output.sample(rng, n)], axis=1)


class EmpiricalLengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="empirical"):
    """Pairs of a file, drawn jointly and with replacement: long prompts keep the answers they had."""

    file: str  # CSV with a header, or JSON lines; `.gz` is unpacked

    def sample(self, rng: np.random.Generator, n: int) -> Pairs:
        pairs = read_pairs(Path(self.file))
        return pairs[rng.integers(0, len(pairs), n)]


Lengths = FixedLengths | UniformLengths | LogNormalLengths | EmpiricalLengths


def read_pairs(path: Path) -> Pairs:
    """Pairs without tokens on either side (failed requests) are left out.

    Raises WorkloadError naming the file and what is missing in it.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = list(_pairs_of(data, path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise WorkloadError(f"cannot read lengths from {path}: {error}") from error
    if not rows:
        raise WorkloadError(f"{path} holds no pair of lengths; give a file with rows of input and output tokens")
    return np.array(rows, dtype=np.int64)


def _pairs_of(data: bytes, path: Path) -> Iterator[tuple[int, int]]:
    rows: Iterable[dict[str, Any]]
    if data.lstrip()[:1] == b"{":
        try:
            rows = [msgspec.json.decode(line, type=dict[str, Any]) for line in data.splitlines() if line.strip()]
        except msgspec.DecodeError as error:
            raise WorkloadError(f"{path} is not JSON lines: {error}") from error
    else:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
    names: tuple[str, str] | None = None
    for number, row in enumerate(rows, 1):
        names = names or _columns(row, path)
        try:
            lengths = int(float(row[names[0]])), int(float(row[names[1]]))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise WorkloadError(f"{path}: row {number} has no number of tokens in {' or '.join(names)}") from None
        if min(lengths) >= 1:
            yield lengths


def _columns(row: dict[str, Any], path: Path) -> tuple[str, str]:
    found = {str(name).lower().replace(" ", "").replace("_", ""): str(name) for name in row}
    for one, other in COLUMNS:
        if one in found and other in found:
            return found[one], found[other]
    raise WorkloadError(
        f"{path} has the columns {', '.join(map(str, row))}; name those of the lengths input_length and output_length"
    )


def parse_lengths(text: str) -> Lengths:
    """`fixed:128/32`, `uniform:16-64/8-32`, `lognormal:mean=1024,sigma=1/mean=200,sigma=0.8`, `empirical:FILE`.

    Input before the slash, output after it; without a slash both are drawn from the same law. Raises WorkloadError.
    """
    kind, _, rest = text.strip().partition(":")
    one, slash, other = rest.partition("/")
    try:
        if kind == "empirical" and rest:
            return EmpiricalLengths(rest)
        if kind not in ("fixed", "uniform", "lognormal"):
            raise ValueError("no such law")
        sides = {"input": _side(kind, one), "output": _side(kind, other if slash else one)}
        law: Lengths = msgspec.convert({"kind": kind, **sides}, Lengths, strict=False)
        return law
    except ValueError as error:
        raise WorkloadError(
            f"{text!r} is not a law of lengths: {error}; there are fixed:IN/OUT, uniform:LOW-HIGH/LOW-HIGH,"
            " lognormal:mean=…,sigma=…,max=…/mean=…,sigma=…,max=… and empirical:FILE"
        ) from None


def _side(kind: str, text: str) -> object:
    match kind:
        case "fixed":
            return text
        case "uniform":
            low, dash, high = text.partition("-")
            return [low, high if dash else low]
        case _:
            return dict(part.split("=", 1) for part in text.split(","))
