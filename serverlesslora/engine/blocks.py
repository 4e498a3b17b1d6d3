"""The paged KV cache's bookkeeping: which block belongs to whom, and which freed blocks still hold a known prefix.

A block is in exactly one of four states: *used* (referenced by sequences), *idle* (referenced by nobody, but its
content is published under a prefix key and may be taken up again until it is evicted, least recently freed first),
*blank* or *absent* (it has a number but no memory, so nobody can take it). The key of a block is the adapter digest
plus a chained hash of all tokens up to the block's end, so two adapters never share KV and a name that is deployed
again with new weights, hence a new digest, never sees stale KV.

Memory comes and goes in *chunks* of neighbouring blocks: a chunk is resident or absent as a whole. Blank blocks are
taken from the lowest resident chunk that has one, so that under less load the high chunks run empty and can go.
"""

from __future__ import annotations

import array
import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import NamedTuple

import xxhash

from serverlesslora.engine.sequence import Sequence


class PrefixKey(NamedTuple):
    adapter: str
    chain: bytes


class BlockManager:
    """`salt` seeds the hash: with a secret one, a client cannot construct colliding prompts.

    With `blocks_per_chunk` every block is absent until its chunk is added; without, all are there from the start.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        salt: int = 0,
        blocks_per_chunk: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.blocks_per_chunk = blocks_per_chunk or max(1, num_blocks)
        assert num_blocks % self.blocks_per_chunk == 0, "the last chunk would be smaller than the others"
        self.num_chunks = num_blocks // self.blocks_per_chunk
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._salt = salt
        self._references = [0] * num_blocks
        self._key_of: list[PrefixKey | None] = [None] * num_blocks
        self._published: dict[PrefixKey, int] = {}
        self._resident: set[int] = set()  # chunks
        self._blank: list[list[int]] = [[] for _ in range(self.num_chunks)]  # of each chunk, last freed last
        self._num_blank = 0
        self.num_touched = 0  # blocks below this have been used; the lowest of those never used is always taken first
        self._with_blank: list[int] = []  # heap of the chunks that have blank blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently freed first
        if blocks_per_chunk is None and num_blocks:
            self.add_chunk(0)

    # --- queries: change nothing ------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return self._num_blank + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_resident - self.num_free

    @property
    def num_resident(self) -> int:
        """Blocks that have memory."""
        return len(self._resident) * self.blocks_per_chunk

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The published blocks that hold the sequence's first tokens, as far as it may reuse them."""
        found: list[int] = []
        if self._prefix_cache:
            for index in range(sequence.num_reusable // self.block_size):
                block = self._published.get(self._key(sequence, index))
                if block is None:
                    break
                found.append(block)
        return found

    def can_admit(self, sequence: Sequence, prefix: list[int], *, spare: int = 0) -> bool:
        """Whether all its tokens fit, with `spare` blocks left over."""
        return self.free_to_admit(sequence, prefix) + spare <= self.num_free

    def can_grow(self, sequence: Sequence) -> bool:
        return self.free_to_grow(sequence) <= self.num_free

    def free_to_admit(self, sequence: Sequence, prefix: list[int]) -> int:
        """How many blocks must be free for it; those of the prefix that nobody uses are among them."""
        revived = sum(self._references[block] == 0 for block in prefix)
        return self.blocks_for(sequence.num_tokens) - len(prefix) + revived

    def free_to_grow(self, sequence: Sequence) -> int:
        return self.blocks_for(sequence.num_tokens) - len(sequence.block_ids)

    def absent_chunks(self) -> list[int]:
        """Lowest first."""
        return [chunk for chunk in range(self.num_chunks) if chunk not in self._resident]

    def removable_chunks(self, *, keep_cached: bool) -> list[int]:
        """Lowest first: resident chunks that are wholly blank, or without `keep_cached` those with no used block."""
        if keep_cached:
            return [chunk for chunk in sorted(self._resident) if len(self._blank[chunk]) == self.blocks_per_chunk]
        return [chunk for chunk in sorted(self._resident) if not self._uses(chunk)]

    # --- commands ---------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give it blocks for all its tokens, the first of them from the prefix cache."""
        assert not sequence.block_ids
        for block in prefix:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1
        sequence.block_ids.extend(prefix)
        sequence.num_published = len(prefix)
        sequence.num_computed = sequence.num_cached = len(prefix) * self.block_size
        self.grow(sequence)

    def grow(self, sequence: Sequence) -> None:
        while len(sequence.block_ids) < self.blocks_for(sequence.num_tokens):
            sequence.block_ids.append(self._take())

    def publish(self, sequence: Sequence) -> None:
        """Offer its full blocks of computed tokens to the prefix cache."""
        if not self._prefix_cache:
            return
        for index in range(sequence.num_published, sequence.num_computed // self.block_size):
            key, block = self._key(sequence, index), sequence.block_ids[index]
            # Two sequences may compute the same prefix in the same step: the first one's block is the known one.
            if key not in self._published:
                self._published[key] = block
                self._key_of[block] = key
            sequence.num_published = index + 1

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take its blocks back; with `forget`, their content is not to be trusted and leaves the prefix cache."""
        # The tail goes first, so that it is evicted before the prefix it depends on.
        for block in reversed(sequence.block_ids):
            if forget:
                self._unpublish(block)
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._key_of[block] is None:
                    self._add_blank(block)
                else:
                    self._idle[block] = None
        del sequence.block_ids[:]
        sequence.num_published = sequence.num_computed = 0

    def add_chunk(self, chunk: int) -> None:
        """Its blocks have memory from now on."""
        assert chunk not in self._resident
        self._resident.add(chunk)
        for block in reversed(self._blocks_of(chunk)):
            self._add_blank(block)

    def remove_chunk(self, chunk: int) -> None:
        """Its blocks, none of which is used, are about to lose their memory; what they cached is forgotten."""
        assert chunk in self._resident and not self._uses(chunk)
        self._resident.remove(chunk)
        for block in self._blocks_of(chunk):
            if block in self._idle:
                del self._idle[block]
                self._unpublish(block)
        if self._blank[chunk]:
            self._num_blank -= len(self._blank[chunk])
            self._blank[chunk].clear()
            self._with_blank.remove(chunk)
            heapq.heapify(self._with_blank)

    def _blocks_of(self, chunk: int) -> range:
        return range(chunk * self.blocks_per_chunk, (chunk + 1) * self.blocks_per_chunk)

    def _uses(self, chunk: int) -> bool:
        blocks = self._blocks_of(chunk)
        return any(self._references[blocks.start : blocks.stop])

    def _add_blank(self, block: int) -> None:
        chunk = block // self.blocks_per_chunk
        blank = self._blank[chunk]
        if not blank:
            heapq.heappush(self._with_blank, chunk)
        blank.append(block)
        self._num_blank += 1

    def _take(self) -> int:
        if self._num_blank:
            chunk = self._with_blank[0]
            blank = self._blank[chunk]
            block = blank.pop()
            self._num_blank -= 1
            if not blank:
                heapq.heappop(self._with_blank)
        else:
            block, _ = self._idle.popitem(last=False)
            self._unpublish(block)
        self._references[block] = 1
        self.num_touched = max(self.num_touched, block + 1)
        return block

    def _unpublish(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._published[key]
            self._key_of[block] = None

    def _key(self, sequence: Sequence, index: int) -> PrefixKey:
        chain, size = sequence.chain, self.block_size
        while len(chain) <= index:
            tokens = array.array("q", sequence.token_ids[len(chain) * size : (len(chain) + 1) * size])
            parent = chain[-1] if chain else b""
            chain.append(xxhash.xxh3_128_digest(parent + tokens.tobytes(), seed=self._salt))
        return PrefixKey(sequence.adapter, chain[index])

    def check(self, sequences: Collection[Sequence]) -> None:
        """Assert every invariant, given all the sequences that may hold blocks."""
        counted = Counter(block for sequence in sequences for block in sequence.block_ids)
        assert self._references == [counted[block] for block in range(self.num_blocks)]
        used = {block for block, count in enumerate(self._references) if count}
        blank = [block for stack in self._blank for block in stack]
        absent = [block for chunk in self.absent_chunks() for block in self._blocks_of(chunk)]
        parts = sorted([*used, *self._idle, *blank, *absent])
        assert parts == list(range(self.num_blocks)), "a block is in two states or in none"
        assert all(self._key_of[block] is not None for block in self._idle)
        assert all(self._key_of[block] is None for block in [*blank, *absent])
        assert self._num_blank == len(blank)
        assert all(
            block // self.blocks_per_chunk == chunk for chunk in range(self.num_chunks) for block in self._blank[chunk]
        )
        assert sorted(self._with_blank) == [chunk for chunk in range(self.num_chunks) if self._blank[chunk]]
        assert self._published == {key: block for block, key in enumerate(self._key_of) if key is not None}
        for sequence in sequences:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            assert sequence.num_computed <= min(sequence.num_tokens, len(sequence.block_ids) * self.block_size)
            assert sequence.num_published * self.block_size <= sequence.num_computed
            for index in range(sequence.num_published):
                block_key = self._key_of[sequence.block_ids[index]]
                assert block_key is None or block_key == self._key(sequence, index)
