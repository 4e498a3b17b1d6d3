"""Where the rows of one engine step sit in the paged cache, as the device's programs want to know it.

Everything is int32 in one packed buffer, so that a step costs one copy to the device; the tensors are views of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Query rows per entry of `tiles`; a program takes the whole of it or an equal part.
QUERY_TILE = 128
# Every view starts at a multiple of 16 bytes: a pointer that is aligned only sometimes is compiled twice.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Decode rows (one new token) and query tiles (sequences with more) of one packed batch; shared by all layers."""

    num_tokens: int
    num_seqs: int
    block_size: int
    max_q_len: int
    max_context: int
    max_decode_context: int  # 0 without decode rows
    slots: Tensor  # int32 [num_tokens], block * block_size + offset of each new token; -1 is not written
    q_start: Tensor  # int32 [num_seqs + 1], first packed row of each sequence
    context_len: Tensor  # int32 [num_seqs], tokens including the new ones
    block_table: Tensor  # int32 [num_seqs, max_blocks], any strides; entries beyond a context are never used
    decode: Tensor  # int32 [num_decode, 3]: packed row, sequence, context
    tiles: Tensor  # int32 [num_tiles, 4]: sequence, first packed row, rows (at most QUERY_TILE), first position

    @classmethod
    def build(
        cls,
        q_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str,
        *,
        pin: bool,
    ) -> DevicePlan:
        """`block_tables[s]` may be longer than needed. With `pin` the copy to the device does not wait for it."""
        check_block_size(block_size)
        width = max(-(-context // block_size) for context in context_lens)
        slots, q_start, decode, tiles, table = array("i"), array("i", [0]), array("i"), array("i"), array("i")
        row, max_decode_context = 0, 0
        for seq, (q_len, context, blocks) in enumerate(zip(q_lens, context_lens, block_tables, strict=True)):
            needed = -(-context // block_size)
            if not 0 < q_len <= context or len(blocks) < needed:
                raise ValueError(f"{q_len} new tokens of {context} do not fit {len(blocks)} blocks of {block_size}")
            if q_len == 1:
                slots.append(_slot(blocks, context - 1, block_size))
                decode.extend((row, seq, context))
                max_decode_context = max(max_decode_context, context)
            else:
                first = context - q_len
                slots.extend([_slot(blocks, position, block_size) for position in range(first, context)])
                # The last rows see the most keys: started first, they do not end last.
                for start in range((q_len - 1) // QUERY_TILE * QUERY_TILE, -1, -QUERY_TILE):
                    tiles.extend((seq, row + start, min(QUERY_TILE, q_len - start), first + start))
            table.extend(blocks if len(blocks) == needed else blocks[:needed])
            table.extend([0] * (width - needed))
            row += q_len
            q_start.append(row)
        sections = _to_device((slots, q_start, array("i", context_lens), decode, tiles, table), device, pin)
        return cls(
            num_tokens=row,
            num_seqs=len(q_lens),
            block_size=block_size,
            max_q_len=max(q_lens),
            max_context=max(context_lens),
            max_decode_context=max_decode_context,
            slots=sections[0],
            q_start=sections[1],
            context_len=sections[2],
            decode=sections[3].view(-1, 3),
            tiles=sections[4].view(-1, 4),
            block_table=sections[5].view(-1, width),
        )

    @staticmethod
    def static(rows: int, max_blocks: int, block_size: int, device: torch.device | str) -> StaticPlan:
        return StaticPlan.allocate(rows, max_blocks, block_size, device)


@dataclass(frozen=True, slots=True)
class StaticPlan(DevicePlan):
    """`rows` decode rows of fixed shape and address, refilled between the replays of a CUDA graph.

    An unused row has context 0: nothing is stored for it and its output is zeros.
    """

    packed: Tensor  # int32, what `fill` overwrites: decode, slots, then the block table block by block

    @classmethod
    def allocate(cls, rows: int, max_blocks: int, block_size: int, device: torch.device | str) -> StaticPlan:
        check_block_size(block_size)
        slots_at, table_at = _static_offsets(rows)
        packed = torch.from_numpy(_static_values(rows, 0)).to(device)
        packed = torch.cat((packed, packed.new_zeros(max_blocks * rows)))
        decode = packed[: 3 * rows].view(rows, 3)
        return cls(
            num_tokens=rows,
            num_seqs=rows,
            block_size=block_size,
            max_q_len=1,
            max_context=max_blocks * block_size,
            max_decode_context=max_blocks * block_size,
            slots=packed[slots_at : slots_at + rows],
            q_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_len=decode[:, 2],
            block_table=packed[table_at:].view(max_blocks, rows).t(),
            decode=decode,
            tiles=packed.new_empty(0, 4),
            packed=packed,
        )

    def fill(self, context_lens: Sequence[int], block_tables: Sequence[Sequence[int]]) -> None:
        """Overwrite the first rows, empty the others: one asynchronous copy on the current stream, as long as needed.

        The staging buffer is a fresh one from torch's pinned pool, so a copy still under way is never disturbed.
        """
        rows, max_blocks = self.block_table.shape
        needed = [-(-context // self.block_size) for context in context_lens]
        width = max(needed, default=0)
        if len(needed) > rows or width > max_blocks:
            raise ValueError(f"{len(needed)} rows of up to {width} blocks do not fit {rows} rows of {max_blocks}")
        slots_at, table_at = _static_offsets(rows)
        count = table_at + width * rows
        staging = torch.empty(count, dtype=torch.int32, pin_memory=self.packed.device.type == "cuda")
        values = staging.numpy()
        values[:] = _static_values(rows, width)
        table = values[table_at:].reshape(width, rows)
        for row, (context, blocks, used) in enumerate(zip(context_lens, block_tables, needed, strict=True)):
            if len(blocks) < used:
                raise ValueError(f"{context} tokens do not fit {len(blocks)} blocks of {self.block_size}")
            if context:
                values[3 * row + 2] = context
                values[slots_at + row] = _slot(blocks, context - 1, self.block_size)
                table[:used, row] = blocks if len(blocks) == used else blocks[:used]
        self.packed[:count].copy_(staging, non_blocking=True)


def check_block_size(block_size: int) -> None:
    if block_size < 8 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 8, not {block_size}")


def _slot(blocks: Sequence[int], position: int, block_size: int) -> int:
    return blocks[position // block_size] * block_size + position % block_size


def _static_offsets(rows: int) -> tuple[int, int]:
    """Where the slots and the block table of a static plan start."""
    slots_at = _aligned(3 * rows)
    return slots_at, slots_at + _aligned(rows)


def _static_values(rows: int, width: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """A static plan of unused rows."""
    slots_at, table_at = _static_offsets(rows)
    values = np.zeros(table_at + width * rows, dtype=np.int32)
    values[0 : 3 * rows : 3] = values[1 : 3 * rows : 3] = np.arange(rows)
    values[slots_at : slots_at + rows] = -1
    return values


def _to_device(sections: Sequence[array[int]], device: torch.device | str, pin: bool) -> list[Tensor]:
    starts = [0]
    for section in sections:
        starts.append(starts[-1] + _aligned(len(section)))
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=pin)
    values = host.numpy()
    for start, section in zip(starts, sections, strict=False):
        values[start : start + len(section)] = section
    packed = host.to(device, non_blocking=pin)
    return [packed[start : start + len(section)] for start, section in zip(starts, sections, strict=False)]


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
