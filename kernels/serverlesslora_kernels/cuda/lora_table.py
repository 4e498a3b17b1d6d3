"""Where an adapter's weights lie on the device: one buffer per adapter, and a table of pointers that kernels look up.

A *projection* is one matrix product of the backbone over one to four *sites* side by side in its output (q, k and v;
gate and up; or a single linear). Rows of a batch carry a slot number; the table says, per projection and slot, where
that adapter's factors are. Loading an adapter writes one slot and moves nobody else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serverlesslora_kernels.segments import LoraPiece

MAX_SITES = 4
# int64 per projection and slot: A's address and total rank, per site B's address, rank, first rank, scale; HEIGHT.
FIELDS = 3 + 4 * MAX_SITES
# Which of them holds the rows of the last site's B: more than its width when the adapter brings new tokens.
HEIGHT = FIELDS - 1
# A row of B is padded to so many ranks: 16 bytes, so that rows are read with whole vector loads.
RANK_ALIGNMENT = 8
_ALIGNMENT = 128  # bytes, of every matrix: a whole memory transaction


class ProjectionLayout(NamedTuple):
    in_features: int
    sites: tuple[tuple[int, int], ...]  # (first column, width) of each

    @property
    def width(self) -> int:
        return max(first + width for first, width in self.sites)


class PackedAdapter:
    """One adapter's plain LoRA for all projections in one contiguous host buffer, ready for one copy.

    A is stacked over the sites of a projection, [sum of ranks, in], so that q, k and v shrink in one pass over x. B is
    row-major per site, [width, rank padded to 8]: an output column needs its ranks together, both for one row at a time
    (a dot product along the row) and for tiles.
    """

    def __init__(self, host: Tensor, relative: Tensor, total_ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.host = host  # uint8
        self.dtype = dtype
        self._relative = relative  # int64 [num_projections, FIELDS], offsets in the place of addresses
        self._total_ranks = tuple(total_ranks)

    @classmethod
    def pack(
        cls,
        pieces: Sequence[Sequence[LoraPiece]],
        layouts: Sequence[ProjectionLayout],
        dtype: torch.dtype,
        *,
        pin: bool,
    ) -> PackedAdapter:
        """`pieces[i]` are the factors for projection i (none: it is not changed); `offset` names a piece's site.

        `pin` page-locks the buffer, which makes its copies to the device asynchronous. Raises ValueError for factors
        that do not fit the layouts. B of the last site may have rows beyond its width: columns of new tokens, which
        only the tiles form writes, and only into a y that has them.
        """
        fields = [[0] * FIELDS for _ in layouts]
        copies: list[tuple[int, Tensor, int]] = []  # offset, source, padded columns
        end = 0
        for row, group, layout in zip(fields, pieces, layouts, strict=True):
            for piece in group:
                _check(piece, layout)
            if len({piece.offset for piece in group}) < len(group):
                raise ValueError(f"two pieces for one site: columns {[piece.offset for piece in group]}")
            if not group:
                continue
            row[0], first = end, 0
            for piece in group:
                rank = piece.a.shape[0]
                copies.append((end, piece.a, layout.in_features))
                end += rank * layout.in_features * dtype.itemsize
                site = 2 + 4 * _site(piece, layout)
                row[site + 1 : site + 4] = [rank, first, _float_bits(piece.scale)]
                if piece.offset == layout.sites[-1][0]:
                    row[HEIGHT] = len(piece.b)
                first += rank
            row[1] = first
            for piece in group:
                end = _aligned(end)
                padded = _padded(piece.a.shape[0])
                row[2 + 4 * _site(piece, layout)] = end
                copies.append((end, piece.b, padded))
                end += piece.b.shape[0] * padded * dtype.itemsize
            end = _aligned(end)
        host = torch.empty(end, dtype=torch.uint8, pin_memory=pin and end > 0)
        values = host.view(dtype)
        for offset, source, columns in copies:
            start = offset // dtype.itemsize
            target = values[start : start + source.shape[0] * columns].view(source.shape[0], columns)
            target[:, : source.shape[1]].copy_(source)
            target[:, source.shape[1] :].zero_()
        return cls(host, torch.tensor(fields, dtype=torch.long).view(-1, FIELDS), [row[1] for row in fields], dtype)

    @property
    def nbytes(self) -> int:
        return self.host.nbytes

    def total_rank(self, projection: int) -> int:
        """Over the sites of the projection."""
        return self._total_ranks[projection]

    @property
    def max_total_rank(self) -> int:
        return max(self._total_ranks, default=0)

    def fields(self, base_address: int) -> Tensor:
        """int64 [num_projections, FIELDS] for a copy of the buffer that starts at `base_address`."""
        absolute = self._relative.clone()
        absolute[:, 0] += base_address * (absolute[:, 1] > 0)
        for site in range(2, HEIGHT, 4):
            absolute[:, site] += base_address * (absolute[:, site + 1] > 0)
        return absolute


class LoraTables:
    """The pointer tables of all projections; an empty slot has rank 0 everywhere."""

    def __init__(
        self, layouts: Sequence[ProjectionLayout], num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        for layout in layouts:
            if not 1 <= len(layout.sites) <= MAX_SITES:
                raise ValueError(f"a projection has 1 to {MAX_SITES} sites, not {len(layout.sites)}")
        self.dtype = dtype  # of the weights that the pointers lead to
        self._device = device
        self._entries = torch.zeros(len(layouts), num_slots, FIELDS, dtype=torch.long, device=device)

    def assign(self, slot: int, fields: Tensor) -> None:
        """One copy to the device and one store, in the order of the current stream."""
        if self._device.type == "cuda":
            fields = fields.pin_memory().to(self._device, non_blocking=True)
        self._entries[:, slot] = fields

    def clear(self, slot: int) -> None:
        self._entries[:, slot] = 0

    def table(self, projection: int) -> Tensor:
        """int64 [num_slots, FIELDS], a view that stays right."""
        return self._entries[projection]


def _site(piece: LoraPiece, layout: ProjectionLayout) -> int:
    return next(index for index, (first, _) in enumerate(layout.sites) if first == piece.offset)


def _check(piece: LoraPiece, layout: ProjectionLayout) -> None:
    (rank, k), widths = piece.a.shape, dict(layout.sites)
    width = widths.get(piece.offset, -1)
    grows = piece.offset == layout.sites[-1][0] and len(piece.b) > width  # new tokens
    if k != layout.in_features or piece.b.shape[1:] != (rank,) or not (grows or len(piece.b) == width):
        raise ValueError(
            f"a {[*piece.a.shape]}, b {[*piece.b.shape]} at column {piece.offset} do not fit {layout.in_features}"
            f" inputs and sites {layout.sites}"
        )


def _padded(rank: int) -> int:
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _float_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
