"""What SGMV works on: an adapter's packed weights for one module group, and the rows each of them applies to.

A module group is what one fused matmul computes: q, k and v are one group of three pieces. An adapter may have any
subset of the pieces, each with its own rank and scale; nothing is padded to a rank shared between adapters.
"""

import ctypes
import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

# Layouts of native/sgmv.c: Weights and its Piece, Segment; outputs of B are packed by 32, ranks in pairs.
_WEIGHTS, _PIECE, _SEGMENT = struct.Struct("4q"), struct.Struct("5q"), struct.Struct("3q")
_OUTPUT_BLOCK = 32
_ALIGNMENT = 64


class LoraPiece(NamedTuple):
    """One LoRA'd linear inside a group: y[:, offset : offset + n] += scale · (x Aᵀ) Bᵀ."""

    a: Tensor  # [rank, k]
    b: Tensor  # [n, rank]
    scale: float
    offset: int = 0  # first output column inside the group


class PlainPiece(NamedTuple):
    """A piece as plain torch operators use it."""

    b: Tensor  # [n, rank]
    first_rank: int  # its first row in the stacked A
    scale: float
    offset: int


class LoraWeights:
    """An adapter's weights for one module group, copied once into the layout that the kernels read.

    bf16 on a machine with native kernels: one buffer, the C structs and arrays in the order they are read. Otherwise:
    A stacked to [Σ ranks, k] and B per piece. Compared and hashed by identity.
    """

    __slots__ = ("a", "buffer", "dtype", "in_features", "nbytes", "out_features", "plain", "ranks")

    def __init__(self, pieces: Sequence[LoraPiece], dtype: torch.dtype, kernels: "SgmvKernels | None") -> None:
        _check(pieces)
        self.dtype = dtype
        self.in_features = pieces[0].a.shape[1]
        self.out_features = max(piece.offset + piece.b.shape[0] for piece in pieces)
        self.ranks = tuple(piece.a.shape[0] for piece in pieces)
        self.buffer: Tensor | None = None  # uint8, the packed form
        self.a: Tensor | None = None  # [Σ ranks, k], the plain form, with
        self.plain: tuple[PlainPiece, ...] = ()
        if kernels is not None:
            self.buffer = _packed(pieces, self.in_features, kernels)
            self.nbytes = self.buffer.nbytes
        else:
            self.a = torch.cat([piece.a.to(dtype) for piece in pieces])
            firsts = [sum(self.ranks[:i]) for i in range(len(pieces))]
            self.plain = tuple(
                PlainPiece(piece.b.to(dtype, copy=True).contiguous(), first, piece.scale, piece.offset)
                for piece, first in zip(pieces, firsts, strict=True)
            )
            self.nbytes = self.a.nbytes + sum(piece.b.nbytes for piece in self.plain)

    @classmethod
    def pack(cls, pieces: Sequence[LoraPiece], dtype: torch.dtype, *, native: bool = True) -> "LoraWeights":
        """Copy `pieces` (never keeps them) for activations of `dtype`; `native=False` asks for the plain form."""
        on_cpu = all(piece.a.is_cpu and piece.b.is_cpu for piece in pieces)
        return cls(pieces, dtype, sgmv_kernels() if native and on_cpu and dtype is torch.bfloat16 else None)


class SegmentTable:
    """The row segments of one step for one module group: y rows [start, end) get what `weights` adds, None nothing.

    Building costs about a microsecond per segment; decode steps repeat, so keep it while nothing changes (TableCache).
    """

    __slots__ = ("_memory", "address", "entries", "in_features", "out_features", "packed", "rows", "work")

    def __init__(self, segments: Iterable[tuple[int, int, LoraWeights | None]]) -> None:
        self.entries = tuple((start, end, w) for start, end, w in segments if w is not None and start != end)
        self.rows = 0
        for start, end, _ in self.entries:
            if not self.rows <= start < end:  # the kernels run segments at the same time: overlap would be a race
                raise ValueError(f"segments must be sorted and disjoint, got [{start}, {end}) after row {self.rows}")
            self.rows = end
        kinds = {(w.in_features, w.dtype, w.buffer is not None) for _, _, w in self.entries}
        if len(kinds) > 1:
            raise ValueError(
                f"the segments of a table must share (in_features, dtype, packed), got {sorted(map(str, kinds))}"
            )
        self.in_features = self.entries[0][2].in_features if self.entries else 0
        self.out_features = max((w.out_features for _, _, w in self.entries), default=0)
        self.packed = bool(self.entries) and self.entries[0][2].buffer is not None
        self.work = sum(
            (end - start + 4) * w.nbytes for start, end, w in self.entries
        )  # grows with bytes and with rows
        self._memory = ctypes.create_string_buffer(
            b"".join(
                _SEGMENT.pack(start, end, w.buffer.data_ptr()) for start, end, w in self.entries if w.buffer is not None
            )
        )
        self.address = ctypes.addressof(self._memory)


class TableCache:
    """The latest tables of one module group, by segments. It keeps their weights alive: clear it on unloading one."""

    __slots__ = ("_capacity", "_tables")

    def __init__(self, capacity: int = 4) -> None:
        self._capacity = capacity
        self._tables: dict[tuple[tuple[int, int, LoraWeights | None], ...], SegmentTable] = {}

    def table(self, segments: Iterable[tuple[int, int, LoraWeights | None]]) -> SegmentTable:
        key = tuple(segments)
        table = self._tables.pop(key, None) or SegmentTable(key)
        self._tables[key] = table  # last used is last
        if len(self._tables) > self._capacity:
            del self._tables[next(iter(self._tables))]
        return table

    def clear(self) -> None:
        self._tables.clear()


class SgmvKernels(NamedTuple):
    """The entry points of native/sgmv.c."""

    run: Callable[..., int]
    pack: Callable[..., None]


@functools.cache
def sgmv_kernels() -> SgmvKernels | None:
    """The native kernels, or None where this machine has none."""
    library = native.load("sgmv")
    if library is None:
        return None
    run, pack = library.sgmv_bf16, library.sgmv_pack
    run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    run.restype = ctypes.c_int
    pack.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    pack.restype = None
    return SgmvKernels(run, pack)


def _check(pieces: Sequence[LoraPiece]) -> None:
    if not pieces:
        raise ValueError("a module group without pieces has no weights: use None in its place")
    k = pieces[0].a.shape[-1]
    for piece in pieces:
        rank = piece.a.shape[0]
        if piece.a.shape != (rank, k) or piece.b.ndim != 2 or piece.b.shape[1] != rank or not rank or piece.offset < 0:
            raise ValueError(
                f"not a LoRA piece of {k} inputs: a {[*piece.a.shape]}, b {[*piece.b.shape]}, offset {piece.offset}"
            )
    bounds = sorted((piece.offset, piece.offset + piece.b.shape[0]) for piece in pieces)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(bounds)):
        raise ValueError(f"the pieces of a group must write disjoint columns, got {bounds}")


def _packed(pieces: Sequence[LoraPiece], k: int, kernels: SgmvKernels) -> Tensor:
    pairs = [(piece.a.shape[0] + 1) // 2 for piece in pieces]
    ranks = 2 * sum(pairs)
    scales_at = _WEIGHTS.size + _PIECE.size * len(pieces)
    a_at = _aligned(scales_at + 4 * (ranks + 3))
    b_at = [_aligned(a_at + 2 * ranks * k)]
    for piece, half in zip(pieces, pairs, strict=True):
        blocks = -(-piece.b.shape[0] // _OUTPUT_BLOCK)
        b_at.append(b_at[-1] + blocks * half * _OUTPUT_BLOCK * 4)
    buffer = torch.empty(b_at[-1], dtype=torch.uint8)
    base = buffer.data_ptr()
    header = [_WEIGHTS.pack(base + a_at, base + scales_at, ranks, len(pieces))]
    scales: list[float] = []
    for piece, half, at in zip(pieces, pairs, b_at, strict=False):
        a, b = piece.a.to(torch.bfloat16).contiguous(), piece.b.to(torch.bfloat16).contiguous()
        (rank, _), n, first = a.shape, b.shape[0], len(scales)
        kernels.pack(a.data_ptr(), b.data_ptr(), base + a_at + 2 * first * k, base + at, rank, k, n)
        header.append(_PIECE.pack(base + at, n, half, first, piece.offset))
        scales += [piece.scale] * (2 * half)
    scales += [0.0] * (-ranks % 4)
    header.append(struct.pack(f"{len(scales)}f", *scales))
    written = b"".join(header)
    ctypes.memmove(base, written, len(written))
    return buffer


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
