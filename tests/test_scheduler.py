"""The scheduler against a slow and obvious model of itself, and what it promises: progress, order, kept tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.scheduler import Scheduler
from serverlesslora.engine.sequence import Sequence, SequenceState

SIZE = 4


@dataclass
class GoldSequence:
    name: int
    adapter: str
    tokens: int
    computed: int = 0
    running: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.tokens // SIZE)


class GoldScheduler:
    """The same policy over bare counts, recomputing everything from scratch each time; no prefix cache."""

    def __init__(self, num_blocks: int, max_running: int, max_step_tokens: int) -> None:
        self.num_blocks, self.max_running, self.budget = num_blocks, max_running, max(max_step_tokens, max_running)
        self.all: list[GoldSequence] = []
        self.held: dict[int, int] = {}  # blocks in the hands of each sequence

    def free(self) -> int:
        return self.num_blocks - sum(self.held.values())

    def running(self) -> list[GoldSequence]:
        return sorted((s for s in self.all if s.running), key=lambda s: s.name)

    def schedule(self) -> list[tuple[int, int, int]]:
        work: list[tuple[str, int, int, int]] = []
        left, preempted = self.budget, False
        for s in self.running():
            if not s.running or s.tokens - s.computed != 1:
                continue
            while s.running and s.blocks - self.held[s.name] > self.free():
                victim = self.running()[-1]
                victim.running, victim.computed, preempted = False, 0, True
                del self.held[victim.name]
            if s.running:
                self.held[s.name] = s.blocks
                work.append((s.adapter, s.name, s.computed, s.tokens))
                left -= 1
        for s in self.running():
            if s.tokens - s.computed > 1 and left:
                take = min(left, s.tokens - s.computed)
                work.append((s.adapter, s.name, s.computed, s.computed + take))
                left -= take
        for s in sorted((s for s in self.all if not s.running), key=lambda s: s.name):
            if preempted or not left or len(self.running()) == self.max_running:
                break
            if s.blocks + len(self.running()) > self.free():
                break
            s.running, self.held[s.name] = True, s.blocks
            take = min(left, s.tokens)
            work.append((s.adapter, s.name, 0, take))
            left -= take
        for _, name, _, end in work:
            next(s for s in self.all if s.name == name).computed = end
        adapters = sorted({item[0] for item in work})
        return [item[1:] for adapter in adapters for item in work if item[0] == adapter]

    def remove(self, name: int) -> None:
        self.all = [s for s in self.all if s.name != name]
        self.held.pop(name, None)


@pytest.mark.parametrize("seed", range(10))
def test_equals_gold_model(seed: int) -> None:
    rng = random.Random(seed)
    limits = {"max_running": rng.randint(1, 8), "max_step_tokens": rng.randint(1, 40)}
    num_blocks = rng.randint(8, 24)
    blocks = BlockManager(num_blocks, SIZE, prefix_cache=False)
    scheduler, gold = Scheduler(blocks, **limits), GoldScheduler(num_blocks, **limits)
    sequences: dict[int, Sequence] = {}
    lengths: dict[int, int] = {}
    ended = 0
    for step in range(600):
        if rng.random() < 0.3 and step < 400:
            prompt, output = rng.randint(1, 16), rng.randint(1, 12)
            sequence = Sequence(step, rng.choice(["", "a", "b"]), [0] * prompt, prompt)
            sequences[step], lengths[step] = sequence, prompt + output
            scheduler.add(sequence)
            gold.all.append(GoldSequence(step, sequence.adapter, prompt))
        if rng.random() < 0.05 and sequences:  # an abort, running or waiting
            name = rng.choice(list(sequences))
            scheduler.remove(sequences.pop(name))
            gold.remove(name)
        work = scheduler.schedule()
        scheduler.check()
        assert [(item.sequence.sequence_id, item.start, item.end) for item in work] == gold.schedule()
        assert {s.sequence_id for s in scheduler.running} == set(gold.held)
        scheduler.commit(work)
        for item in work:
            if not item.samples:
                continue
            name = item.sequence.sequence_id
            item.sequence.token_ids.append(step)
            next(s for s in gold.all if s.name == name).tokens += 1
            if item.sequence.num_tokens >= lengths[name]:
                scheduler.remove(sequences.pop(name))
                gold.remove(name)
                ended += 1
        scheduler.check()
    assert not sequences, "starved"
    assert blocks.num_free == num_blocks
    assert ended > 30


def drive(scheduler: Scheduler, lengths: dict[Sequence, int], *, steps: int = 2000) -> list[Sequence]:
    """Run until all have their length; the new token is a pure function of the tokens before it."""
    order: list[Sequence] = []
    for _ in range(steps):
        work = scheduler.schedule()
        if not work:
            break
        scheduler.commit(work)
        for item in work:
            if item.samples:
                item.sequence.token_ids.append(hash(tuple(item.sequence.token_ids)) % 97)
                if item.sequence.num_tokens >= lengths[item.sequence]:
                    scheduler.remove(item.sequence)
                    order.append(item.sequence)
        scheduler.check()
    return order


def expected_tokens(prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(hash(tuple(tokens)) % 97)
    return tokens


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_preemption_preserves_tokens(seed: int, prefix_cache: bool) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(BlockManager(12, SIZE, prefix_cache=prefix_cache), max_running=8, max_step_tokens=16)
    lengths: dict[Sequence, int] = {}
    for name in range(8):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 12))]
        sequence = Sequence(name, "", prompt, len(prompt))
        lengths[sequence] = len(prompt) + 20
        scheduler.add(sequence)
    prompts = {sequence: list(sequence.token_ids) for sequence in lengths}
    assert len(drive(scheduler, lengths)) == 8
    assert scheduler.num_preemptions > 0
    for sequence, length in lengths.items():
        assert sequence.token_ids == expected_tokens(prompts[sequence], length)


def test_nobody_starves_behind_a_stream_of_short_requests() -> None:
    """A long prompt that needs nearly all blocks gets in although small ones keep coming."""
    scheduler = Scheduler(BlockManager(16, SIZE, prefix_cache=False), max_running=4, max_step_tokens=8)
    long = Sequence(10, "", [1] * 60, 60)
    for step in range(300):
        if step == 10:
            scheduler.add(long)
        elif step % 2 == 0:
            scheduler.add(Sequence(step, "", [2] * 6, 6))
        work = scheduler.schedule()
        scheduler.commit(work)
        for item in work:
            if item.samples:
                item.sequence.token_ids.append(3)
                if item.sequence.num_output == 3:
                    scheduler.remove(item.sequence)
        scheduler.check()
        if long.state is SequenceState.ENDED:
            return
    pytest.fail("starved")


def test_further_choices_wait_for_the_prompt_and_find_it() -> None:
    scheduler = Scheduler(BlockManager(32, SIZE), max_running=8, max_step_tokens=8)
    first = Sequence(0, "", [1] * 20, 20)
    others = [Sequence(i, "", [1] * 20, 20, follows=first) for i in (1, 2)]
    behind = Sequence(3, "", [5] * 3, 3)
    for sequence in (first, *others, behind):
        scheduler.add(sequence)
    computed = 0
    for _ in range(6):
        work = scheduler.schedule()
        computed += sum(item.num_tokens for item in work if item.sequence in others and item.end <= 20)
        scheduler.commit(work)
        for item in work:
            if item.samples:
                item.sequence.token_ids.append(0)
    assert [s.num_cached for s in others] == [16, 16]
    assert computed == 8
    assert behind.num_output > 0


def test_rows_of_one_adapter_are_neighbours() -> None:
    scheduler = Scheduler(BlockManager(32, SIZE), max_running=8, max_step_tokens=64)
    for name, adapter in enumerate(["b", "", "a", "b", "", "a"]):
        scheduler.add(Sequence(name, adapter, [1, 2], 2))
    assert [item.sequence.sequence_id for item in scheduler.schedule()] == [1, 4, 2, 5, 0, 3]
