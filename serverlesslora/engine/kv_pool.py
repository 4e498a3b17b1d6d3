"""How much of the device's memory the KV cache holds: more when blocks run out, less when the owner asks for it back.

Many workers share one device. Each holds addresses for its whole KV cache but memory only for the chunks it needs,
so that an idle domain's memory serves a busy one. The policy:

- Grow only when blocks run out, cached prefixes having been counted as free: a cache nobody asks for takes no memory
  from other domains. Take what is needed or nothing, and ahead of need at most as much again as is resident and a
  quarter of what the device has left: growing is rare and one domain does not empty the device.
- Leave `reserve_bytes` of the device free, for what others allocate without asking.
- Shrink only when told to, so that a domain at the edge does not map and unmap in turn.

Pure but for the `Memory` it is given: no tensors, no clock.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from serverlesslora.engine.blocks import BlockManager
from serverlesslora_ipc.cuda.driver import OutOfDeviceMemory

log = logging.getLogger("serverlesslora.kv_pool")


class Memory(Protocol):
    """Physical memory behind the chunks of one KV cache."""

    def map(self, chunk: int) -> None:
        """Raises OutOfDeviceMemory, having changed nothing."""

    def unmap(self, chunk: int) -> None:
        """Waits for the device first: a step still on its way may touch blocks that were released since."""

    def free_bytes(self) -> int:
        """Of the whole device, whoever holds the rest."""


class Growth(NamedTuple):
    needed: int  # chunks without which growing is no use
    ahead: int  # chunks that may be missed
    reason: str


class Shrinkage(NamedTuple):
    chunks: list[int]  # in the order in which they go
    reason: str


@dataclass(slots=True)
class _Refusal:
    """The device refused so many chunks although it claimed to have `free_bytes`.

    To ask again in every step would be to map and unmap in every step. So ask for less, or when more is free, or when
    `patience` is at its end: what was in the way may have gone without a trace in the number.
    """

    chunks: int
    free_bytes: int
    patience: int = 64

    def holds(self, chunks: int, free_bytes: int) -> bool:
        return chunks >= self.chunks and free_bytes <= self.free_bytes and self.patience > 0


class KvPool:
    def __init__(self, blocks: BlockManager, memory: Memory, *, chunk_bytes: int, reserve_bytes: int = 0) -> None:
        """`blocks` has all its chunks absent, as `memory` has."""
        assert blocks.num_resident == 0
        self.chunk_bytes = chunk_bytes
        self.last_reason = "nothing was asked yet"  # why the last call did what it did
        self._blocks = blocks
        self._memory = memory
        self._reserve_bytes = reserve_bytes
        self._refusal: _Refusal | None = None

    @property
    def num_resident_chunks(self) -> int:
        return self._blocks.num_resident // self._blocks.blocks_per_chunk

    @property
    def resident_bytes(self) -> int:
        return self.num_resident_chunks * self.chunk_bytes

    def make_room(self, num_blocks: int) -> bool:
        """Until that many blocks are free; without success nothing has changed."""
        missing = num_blocks - self._blocks.num_free
        if missing <= 0:
            return self._conclude(f"{num_blocks} blocks are free already", True)
        needed = -(-missing // self._blocks.blocks_per_chunk)
        num_absent = self._blocks.num_chunks - self.num_resident_chunks
        if needed > num_absent:  # known without asking the device
            return self._conclude(f"{needed} chunks needed, {num_absent} left of the capacity", False)
        free_bytes = self._memory.free_bytes()
        if self._refusal and self._refusal.holds(needed, free_bytes):
            self._refusal.patience -= 1
            return self._conclude(f"{needed} chunks needed, the device refused as many with as much free", False)
        growth = plan_growth(
            needed,
            num_resident=self.num_resident_chunks,
            num_absent=num_absent,
            affordable=max(0, free_bytes - self._reserve_bytes) // self.chunk_bytes,
        )
        if growth.needed == 0:
            return self._conclude(growth.reason, False)
        mapped = self._map(self._blocks.absent_chunks()[: growth.needed + growth.ahead], growth.needed)
        if not mapped:
            self._refusal = _Refusal(needed, self._memory.free_bytes())
            return self._conclude(f"{needed} chunks needed, the device ran out on the way", False)
        self._refusal = None
        for chunk in mapped:
            self._blocks.add_chunk(chunk)
        log.info("mapped %d chunks, %d bytes resident: %s", len(mapped), self.resident_bytes, growth.reason)
        return self._conclude(growth.reason, True)

    def give_back(self, *, keep_cached: bool, keep_chunks: int = 1) -> int:
        """Bytes returned to the device. At least `keep_chunks` stay, and so do cached prefixes with `keep_cached`."""
        shrinkage = plan_shrinkage(
            blank=self._blocks.removable_chunks(keep_cached=True),
            removable=self._blocks.removable_chunks(keep_cached=keep_cached),
            num_resident=self.num_resident_chunks,
            keep_chunks=keep_chunks,
        )
        for chunk in shrinkage.chunks:
            self._blocks.remove_chunk(chunk)  # first: from here on nobody can take its blocks
            self._memory.unmap(chunk)
        self.last_reason = shrinkage.reason
        if shrinkage.chunks:
            self._refusal = None
            log.info("unmapped, %d bytes resident: %s", self.resident_bytes, shrinkage.reason)
        return len(shrinkage.chunks) * self.chunk_bytes

    def _map(self, chunks: list[int], needed: int) -> list[int]:
        """Those that were mapped: none, or at least so many."""
        mapped: list[int] = []
        with ExitStack() as undo:
            for chunk in chunks:
                # Other processes take memory at the same time, so the reserve is looked at for each.
                if self._memory.free_bytes() - self.chunk_bytes < self._reserve_bytes:
                    break
                try:
                    self._memory.map(chunk)
                except OutOfDeviceMemory:
                    break
                undo.callback(self._memory.unmap, chunk)
                mapped.append(chunk)
            if len(mapped) < needed:
                return []
            undo.pop_all()
        return mapped

    def _conclude(self, reason: str, has_room: bool) -> bool:
        self.last_reason = reason
        return has_room


def plan_growth(needed: int, *, num_resident: int, num_absent: int, affordable: int) -> Growth:
    """In chunks; `affordable` is what the device can give without touching its reserve."""
    assert needed <= num_absent
    if needed > affordable:
        return Growth(0, 0, f"{needed} chunks needed, the device has room for {affordable}")
    ahead = max(0, min(num_resident - needed, num_absent - needed, (affordable - needed) // 4))
    return Growth(needed, ahead, f"{needed} chunks needed, {ahead} taken ahead")


def plan_shrinkage(*, blank: list[int], removable: list[int], num_resident: int, keep_chunks: int) -> Shrinkage:
    """Chunks that cache nothing go first, and among equals the high ones: low ones are filled first."""
    is_blank = set(blank)
    cached = [chunk for chunk in removable if chunk not in is_blank]
    order = [*reversed(blank), *reversed(cached)]
    chunks = order[: max(0, num_resident - keep_chunks)]
    kept = len(order) - len(chunks)
    busy = num_resident - len(order)
    return Shrinkage(chunks, f"{len(chunks)} chunks given back, {kept} kept, {busy} with blocks in use or cached")
