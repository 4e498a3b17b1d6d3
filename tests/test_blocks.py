"""The block manager: sharing, eviction order, and its invariants after every step of random histories."""

from __future__ import annotations

import random

import pytest

from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.sequence import Sequence

SIZE = 4


def admitted(blocks: BlockManager, tokens: list[int], *, adapter: str = "", sequence_id: int = 0) -> Sequence:
    sequence = Sequence(sequence_id, adapter, list(tokens), len(tokens))
    prefix = blocks.find_prefix(sequence)
    assert blocks.can_admit(sequence, prefix)
    blocks.admit(sequence, prefix)
    return sequence


def computed(blocks: BlockManager, sequence: Sequence) -> Sequence:
    sequence.num_computed = sequence.num_tokens
    blocks.publish(sequence)
    return sequence


def test_shares_full_blocks_of_computed_tokens() -> None:
    blocks = BlockManager(8, SIZE)
    first = admitted(blocks, list(range(10)))
    early = admitted(blocks, list(range(10)))
    assert early.num_cached == 0, "nothing is computed yet"
    computed(blocks, first)
    late = admitted(blocks, list(range(10)))
    assert late.num_cached == 8
    assert late.block_ids[:2] == first.block_ids[:2]
    assert late.block_ids[2] != first.block_ids[2], "a partial block is never shared"
    blocks.check([first, early, late])


def test_last_token_is_always_computed() -> None:
    blocks = BlockManager(8, SIZE)
    first = computed(blocks, admitted(blocks, list(range(8))))
    second = admitted(blocks, list(range(8)))
    assert second.num_cached == 4
    blocks.check([first, second])


def test_scored_prompts_reuse_only_what_is_scored() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, admitted(blocks, list(range(12))))
    scored = Sequence(1, "", list(range(12)), 12, scores_prompt=True)
    assert blocks.find_prefix(scored) == []
    scored.num_scored = 9
    assert len(blocks.find_prefix(scored)) == 2
    scored.num_scored = 11
    assert len(blocks.find_prefix(scored)) == 2


@pytest.mark.parametrize("other", ["", "digest-b"])
def test_adapters_never_share(other: str) -> None:
    blocks = BlockManager(8, SIZE)
    first = computed(blocks, admitted(blocks, list(range(10)), adapter="digest-a"))
    second = admitted(blocks, list(range(10)), adapter=other)
    assert second.num_cached == 0
    assert not set(first.block_ids) & set(second.block_ids)


def test_freed_blocks_are_found_again_until_evicted() -> None:
    blocks = BlockManager(4, SIZE)
    first = computed(blocks, admitted(blocks, list(range(12))))
    blocks.release(first)
    assert blocks.num_free == 4
    again = admitted(blocks, list(range(12)))
    assert again.num_cached == 8
    blocks.release(again)
    other = admitted(blocks, [99] * 16)  # takes every block
    blocks.release(other)
    assert admitted(blocks, list(range(12))).num_cached == 0


def test_prefix_outlives_its_tail() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.release(computed(blocks, admitted(blocks, list(range(12)))))
    taken = admitted(blocks, [77] * 4)  # evicts one block
    probe = Sequence(1, "", [*range(12), 1], 13)
    assert len(blocks.find_prefix(probe)) == 2
    blocks.check([taken])


def test_forgotten_content_is_not_shared() -> None:
    blocks = BlockManager(8, SIZE)
    bad = computed(blocks, admitted(blocks, list(range(10))))
    sharer = admitted(blocks, list(range(10)))
    blocks.release(bad, forget=True)
    blocks.check([sharer])
    assert admitted(blocks, list(range(10))).num_cached == 0


def test_switched_off() -> None:
    blocks = BlockManager(8, SIZE, prefix_cache=False)
    first = computed(blocks, admitted(blocks, list(range(10))))
    assert admitted(blocks, list(range(10))).num_cached == 0
    blocks.release(first)


def test_chain_depends_on_everything_before() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, admitted(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert blocks.find_prefix(Sequence(1, "", [0, 2, 3, 4, 5, 6, 7, 8, 9], 9)) == []


@pytest.mark.parametrize("seed", range(10))
def test_random_histories(seed: int) -> None:
    """Blocks carry a model of their content (who wrote which tokens for which adapter): a hit must match it.

    In every second history chunks come and go, and take the content with them.
    """
    rng = random.Random(seed)
    per_chunk = 3 if seed % 2 else None
    blocks = BlockManager(3 * rng.randrange(3, 7), SIZE, salt=seed, blocks_per_chunk=per_chunk)
    content: dict[int, tuple[str, tuple[int, ...]]] = {}
    live: list[Sequence] = []
    hits = 0
    for step in range(400):
        if per_chunk and rng.random() < 0.2 and (absent := blocks.absent_chunks()):
            blocks.add_chunk(rng.choice(absent))
        if per_chunk and rng.random() < 0.2 and (removable := blocks.removable_chunks(keep_cached=rng.random() < 0.5)):
            chunk = rng.choice(removable)
            blocks.remove_chunk(chunk)
            for block in range(chunk * per_chunk, (chunk + 1) * per_chunk):
                content.pop(block, None)
        action = rng.random()
        if action < 0.4:
            tokens = [int(rng.randrange(10) == 0) for _ in range(rng.randrange(1, 20))]
            sequence = Sequence(step, rng.choice("ab"), tokens, len(tokens))
            prefix = blocks.find_prefix(sequence)
            for index, block in enumerate(prefix):
                assert content[block] == (sequence.adapter, tuple(tokens[: (index + 1) * SIZE]))
            hits += len(prefix)
            if blocks.can_admit(sequence, prefix):
                blocks.admit(sequence, prefix)
                live.append(sequence)
        elif action < 0.8 and live:
            sequence = rng.choice(live)
            if sequence.num_pending == 0:
                sequence.token_ids.append(rng.randrange(2))
            if blocks.can_grow(sequence):
                blocks.grow(sequence)
                before = sequence.num_computed
                sequence.num_computed += rng.randint(1, sequence.num_pending)
                for index in range(before // SIZE, sequence.num_computed // SIZE):
                    content[sequence.block_ids[index]] = (
                        sequence.adapter,
                        tuple(sequence.token_ids[: (index + 1) * SIZE]),
                    )
                blocks.publish(sequence)
        elif live:
            blocks.release(live.pop(rng.randrange(len(live))), forget=rng.random() < 0.2)
        blocks.check(live)
    assert hits > 10, "the test shares too little to prove anything"
    for sequence in live:
        blocks.release(sequence)
    assert blocks.num_free == blocks.num_resident


# --- chunks that come and go ----------------------------------------------------------------------------------------


def test_absent_blocks_cannot_be_taken() -> None:
    blocks = BlockManager(12, SIZE, blocks_per_chunk=4)
    assert (blocks.num_resident, blocks.num_free, blocks.num_used) == (0, 0, 0)
    assert blocks.absent_chunks() == [0, 1, 2]
    assert not blocks.can_admit(Sequence(0, "", [1], 1), [])
    blocks.add_chunk(1)
    sequence = admitted(blocks, [1] * 16)
    assert sorted(sequence.block_ids) == [4, 5, 6, 7]
    sequence.token_ids.append(1)
    assert not blocks.can_grow(sequence)
    assert (blocks.num_resident, blocks.num_free, blocks.num_used) == (4, 0, 4)
    blocks.check([sequence])


def test_all_blocks_are_there_where_nothing_is_said_about_chunks() -> None:
    blocks = BlockManager(7, SIZE)
    assert (blocks.num_resident, blocks.num_free, blocks.absent_chunks()) == (7, 7, [])
    assert list(admitted(blocks, [1] * 12).block_ids) == [0, 1, 2]


def test_low_chunks_are_filled_first() -> None:
    blocks = BlockManager(12, SIZE, blocks_per_chunk=4)
    for chunk in (2, 0, 1):
        blocks.add_chunk(chunk)
    first, second, third = (admitted(blocks, [1] * 16, sequence_id=i) for i in range(3))
    blocks.release(second)
    blocks.release(first)
    again = admitted(blocks, [1] * 16)
    assert sorted(again.block_ids) == [0, 1, 2, 3], "not the ones freed last"
    assert blocks.removable_chunks(keep_cached=True) == [1]
    blocks.release(third)
    assert blocks.removable_chunks(keep_cached=True) == [1, 2]
    blocks.check([again])


def test_a_chunk_goes_with_what_it_caches_and_comes_back_blank() -> None:
    blocks = BlockManager(4, SIZE, blocks_per_chunk=2)
    blocks.add_chunk(0)
    blocks.add_chunk(1)
    running = computed(blocks, admitted(blocks, list(range(10))))  # blocks 0, 1 and 2; two of them are known
    other = computed(blocks, admitted(blocks, [7] * 4))
    assert blocks.removable_chunks(keep_cached=False) == []
    blocks.release(other)
    blocks.release(running)
    assert blocks.removable_chunks(keep_cached=True) == []
    assert blocks.removable_chunks(keep_cached=False) == [0, 1]
    blocks.remove_chunk(0)
    blocks.check([])
    assert blocks.find_prefix(Sequence(0, "", list(range(10)), 10)) == []
    assert len(blocks.find_prefix(Sequence(0, "", [7] * 5, 5))) == 1
    blocks.add_chunk(0)
    assert blocks.removable_chunks(keep_cached=True) == [0]
    blocks.remove_chunk(1)
    assert blocks.num_free == blocks.num_resident == 2
    blocks.check([])


def test_a_chunk_in_use_stays() -> None:
    blocks = BlockManager(4, SIZE, blocks_per_chunk=2)
    blocks.add_chunk(0)
    admitted(blocks, [1])
    with pytest.raises(AssertionError):
        blocks.remove_chunk(0)
    with pytest.raises(AssertionError):
        blocks.remove_chunk(1)
    with pytest.raises(AssertionError):
        blocks.add_chunk(0)
