"""Linear layers on the device: torch's library, or a skinny program where that was measured to be faster.

With few rows a product is a walk through the weights: both are held against the same number, bytes over bandwidth. The
library is rarely far from it; where it is, depends on the device, its version and the shape. So nothing is guessed:
the library serves everything unless a table of measured medians, which is handed in, says otherwise.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from serverlesslora_kernels.cuda.launch import launch
from serverlesslora_kernels.cuda.recorded import CompileCase, record, unique
from serverlesslora_kernels.cuda.triton_code import linear as programs

MAX_ROWS = 32  # two tiles of the matrix units' rows; above, a product is no longer bound by its weights
NUM_SMS = 132
# What a change of path must gain: medians of one path differ by this much from run to run.
MARGIN = 0.97
_DTYPES = (torch.bfloat16, torch.float16)
_MIN_SPLIT_K = 512
_ROTATED_BYTES = 256 << 20  # several times any L2 cache, so that every measured pass reads its weights from memory
_BURST = 20  # launches between two events, whose resolution is half a microsecond

Path = Literal["library", "skinny"]


class Measured(msgspec.Struct, frozen=True):
    """Medians of both paths for x [rows, k] and a weight [n, k]."""

    rows: int
    n: int
    k: int
    library_us: float
    skinny_us: float

    @property
    def path(self) -> Path:
        return "skinny" if self.skinny_us <= MARGIN * self.library_us else "library"


class LinearChoice(msgspec.Struct, frozen=True):
    """Which path serves which shape; written by whoever measured, read by whoever serves."""

    measured: tuple[Measured, ...] = ()
    otherwise: Path = "library"  # for shapes that nobody measured
    device: str = ""  # where the numbers are from


def always_skinny() -> LinearChoice:
    """For tests and comparisons."""
    return LinearChoice(otherwise="skinny")


def choose(choices: LinearChoice, rows: int, n: int, k: int) -> Path:
    """The path of the next larger measured number of rows (a batch is padded to it anyway), else `otherwise`."""
    if not 0 < rows <= MAX_ROWS:
        return "library"
    near = [entry for entry in choices.measured if (entry.n, entry.k) == (n, k) and entry.rows >= rows]
    return min(near, key=lambda entry: entry.rows).path if near else choices.otherwise


class Linear:
    """The linear layers of one process, each by the path that `choices` names.

    Semantics: linear: y = x Wᵀ + b for x [..., k], W [n, k], b [n]; add_linear: y += x Wᵀ in place for y [rows, n] and
    x [rows, k], whose rows may be strided (the residual stream). Sums are float32 and rounded once.
    """

    def __init__(self, choices: LinearChoice | None = None) -> None:
        self.choices = choices or LinearChoice()
        self._only_library = self.choices.otherwise == "library" and not any(
            entry.path == "skinny" for entry in self.choices.measured
        )
        # Asked several times per layer and step; there are few shapes and at most MAX_ROWS numbers of rows for each.
        self._choose = functools.cache(functools.partial(choose, self.choices))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._only_library or not self._is_skinny(x, weight, bias):
            return functional.linear(x, weight, bias)
        n, k = weight.shape
        y = x.new_empty((*x.shape[:-1], n))
        skinny(y.view(-1, n), x.reshape(-1, k), weight, bias, add=False)
        return y

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        fits = not self._only_library and y.dtype is x.dtype and y.stride(1) == 1
        if fits and self._is_skinny(x, weight, None):
            skinny(y, x, weight, None, add=True)
        else:
            y.addmm_(x, weight.t())

    def _is_skinny(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the table says so and the program can; what it cannot (errors, too) is torch's."""
        n, k = weight.shape
        return (
            x.shape[-1] == k
            and 0 < x.numel() <= MAX_ROWS * k
            and x.dtype in _DTYPES
            and x.dtype is weight.dtype
            and x.stride(-1) == 1
            and weight.stride(1) == 1
            and (bias is None or (bias.dtype is x.dtype and bias.is_contiguous()))
            and self._choose(x.numel() // k, n, k) == "skinny"
        )


class _Tiles(NamedTuple):
    n: int
    k: int
    splits: int  # of K
    stages: int
    num_warps: int


def skinny(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, add: bool) -> None:
    """y [rows, n] = x [rows, k] Wᵀ + bias, plus what is in y where `add`; in place, rounded once.

    1 to MAX_ROWS rows of bfloat16 or float16; rows of all three may be strided. From two rows on, a row's bits do not
    depend on how many others there are.
    """
    rows, k = x.shape
    n = weight.shape[0]
    assert 0 < rows <= MAX_ROWS, rows
    flags = {"BIAS": bias is not None, "ADD": add}
    bias = y if bias is None else bias  # some address, unread
    tiles = _row_tiles(n, k) if rows == 1 else _rows_tiles(n, k)
    if rows == 1:
        launch(
            programs.product_of_row,
            (-(-n // tiles.n),),
            y,
            x,
            weight,
            bias,
            n,
            k,
            weight.stride(0),
            **flags,
            N_TILE=tiles.n,
            K_TILE=tiles.k,
            STAGES=tiles.stages,
            num_warps=tiles.num_warps,
        )
        return
    part = y.new_empty((tiles.splits, rows, n), dtype=torch.float32) if tiles.splits > 1 else y
    launch(
        programs.product_of_rows,
        (-(-n // tiles.n), tiles.splits),
        y,
        part,
        x,
        weight,
        bias,
        rows,
        n,
        k,
        -(-k // (tiles.splits * tiles.k)) * tiles.k,
        y.stride(0),
        x.stride(0),
        weight.stride(0),
        BIAS=flags["BIAS"] and tiles.splits == 1,
        ADD=add and tiles.splits == 1,
        ROWS=16 if rows <= 16 else 32,
        N_TILE=tiles.n,
        K_TILE=tiles.k,
        SPLIT=tiles.splits > 1,
        STAGES=tiles.stages,
        num_warps=tiles.num_warps,
    )
    if tiles.splits > 1:
        launch(
            programs.sum_of_splits,
            (-(-n // 256), rows),
            y,
            part,
            bias,
            rows,
            n,
            y.stride(0),
            tiles.splits,
            **flags,
            N_TILE=256,
            num_warps=2,
        )


def _row_tiles(n: int, k: int) -> _Tiles:
    """Four programs per multiprocessor, or as many as there are; 32 weights per lane and step, 16 bytes a load.

    A program owns whole outputs, so even a narrow matrix fills the device without splitting K: it only owns fewer.
    """
    n_tile = max(2, min(8, _pow2_below(n // (4 * NUM_SMS))))
    return _Tiles(n_tile, max(16, min(4096 // n_tile, 1 << (k - 1).bit_length())), 1, 3, 4)


def _rows_tiles(n: int, k: int) -> _Tiles:
    """Wide tiles read the activations less often, narrow ones keep all multiprocessors busy.

    K is split only where even the narrowest tiles are too few, so that the partial sums are small.
    """
    if n >= 64 * 2 * NUM_SMS:
        return _Tiles(64, 128, 1, 4, 4)
    if n >= 32 * NUM_SMS * 3 // 4:
        return _Tiles(32, 128, 1, 5, 4)
    narrow = -(-n // 16)
    splits = 1 if narrow >= NUM_SMS * 3 // 4 else min(-(-NUM_SMS // narrow), k // _MIN_SPLIT_K)
    return _Tiles(16, 256, max(1, splits), 4, 2)


def _pow2_below(count: int) -> int:
    return 1 << max(0, count.bit_length() - 1)


# Launches a function's turns (it is given their number) and returns the median microseconds of one.
Stopwatch = Callable[[Callable[[int], None], int], float]


def measure(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    repeats: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    stopwatch: Stopwatch | None = None,
) -> LinearChoice:
    """Medians of both paths for every (n, k) and number of rows, on `device`; of `repeats` bursts of launches."""
    if wrong := [count for count in rows if not 0 < count <= MAX_ROWS]:
        raise ValueError(f"{wrong[0]} rows: the skinny program takes 1 to {MAX_ROWS}")
    watch = stopwatch or _median_us
    measured: list[Measured] = []
    for n, k in shapes:
        copies = max(1, min(64, -(-_ROTATED_BYTES // (n * k * dtype.itemsize))))
        weights = torch.randn((copies, n, k), device=device, dtype=dtype)
        for count in rows:
            x = torch.randn((count, k), device=device, dtype=dtype)
            y = torch.empty((count, n), device=device, dtype=dtype)
            measured.append(Measured(count, n, k, *(watch(path, repeats) for path in _paths(y, x, weights))))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return LinearChoice(tuple(measured), device=name)


def _paths(y: Tensor, x: Tensor, weights: Tensor) -> tuple[Callable[[int], None], Callable[[int], None]]:
    def library(turn: int) -> None:
        torch.mm(x, weights[turn % len(weights)].t(), out=y)

    def narrow(turn: int) -> None:
        skinny(y, x, weights[turn % len(weights)], None, add=False)

    return library, narrow


def _median_us(work: Callable[[int], None], repeats: int) -> float:
    """By CUDA events around bursts."""
    cuda: Any = torch.cuda  # partly untyped
    work(0)  # compiled, loaded, chosen
    times: list[float] = []
    for burst in range(repeats):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps while the burst is being queued: otherwise the host's launches would be measured.
        cuda._sleep(2_000_000)
        start.record()
        for call in range(_BURST):
            work(burst * _BURST + call)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _BURST)
    return statistics.median(times)


def compile_cases() -> list[CompileCase]:
    """One row, few and more, over wide, middle, narrow and split shapes, with a bias and with a sum."""
    cases: list[CompileCase] = []
    for dtype in _DTYPES:
        blank = functools.partial(torch.empty, dtype=dtype, device="meta")
        shapes = ((28672, 4096), (4096, 14336), (2048, 2048), (896, 4864))
        for n, k in shapes if dtype is torch.bfloat16 else shapes[-1:]:
            for rows in (1, 16, 32):
                y, x, weight, bias = blank(rows, n), blank(rows, k), blank(n, k), blank(n)
                cases += record(functools.partial(skinny, y, x, weight, bias if n < k else None, add=n == 4096))
    return unique(cases)
