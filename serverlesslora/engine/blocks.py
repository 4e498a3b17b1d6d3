"""The paged KV cache's bookkeeping: which block belongs to whom, and which freed blocks still hold a known prefix.

A block is in exactly one of three states: *used* (referenced by sequences), *idle* (referenced by nobody, but its
content is published under a prefix key and may be taken up again until it is evicted, least recently freed first) or
*blank*. The key of a block is the adapter digest plus a chained hash of all tokens up to the block's end, so two
adapters never share KV and a name that is deployed again with new weights, hence a new digest, never sees stale KV.
"""

from __future__ import annotations

import array
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import NamedTuple

import xxhash

from serverlesslora.engine.sequence import Sequence


class PrefixKey(NamedTuple):
    adapter: str
    chain: bytes


class BlockManager:
    """`salt` seeds the hash: with a secret one, a client cannot construct colliding prompts."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True, salt: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._salt = salt
        self._references = [0] * num_blocks
        self._key_of: list[PrefixKey | None] = [None] * num_blocks
        self._published: dict[PrefixKey, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently freed first

    # --- queries: change nothing ------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

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
        needed = self.blocks_for(sequence.num_tokens) - len(prefix)
        revived = sum(self._references[block] == 0 for block in prefix)
        return needed + revived + spare <= self.num_free

    def can_grow(self, sequence: Sequence) -> bool:
        return self.blocks_for(sequence.num_tokens) - len(sequence.block_ids) <= self.num_free

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
                    self._blank.append(block)
                else:
                    self._idle[block] = None
        del sequence.block_ids[:]
        sequence.num_published = sequence.num_computed = 0

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unpublish(block)
        self._references[block] = 1
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
        parts = sorted([*used, *self._idle, *self._blank])
        assert parts == list(range(self.num_blocks)), "a block is in two states or in none"
        assert all(self._key_of[block] is not None for block in self._idle)
        assert all(self._key_of[block] is None for block in self._blank)
        assert self._published == {key: block for block, key in enumerate(self._key_of) if key is not None}
        for sequence in sequences:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            assert sequence.num_computed <= min(sequence.num_tokens, len(sequence.block_ids) * self.block_size)
            assert sequence.num_published * self.block_size <= sequence.num_computed
            for index in range(sequence.num_published):
                block_key = self._key_of[sequence.block_ids[index]]
                assert block_key is None or block_key == self._key(sequence, index)
