"""The scheduler against a slow and obvious model of itself, and what it promises: progress, order, kept tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypedDict

import pytest

from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.scheduler import Scheduler
from serverlesslora.engine.sequence import Sequence, SequenceState

SIZE = 4


class Limits(TypedDict):
    max_running: int
    max_step_tokens: int


@dataclass
class GoldSequence:
    name: int
    adapter: str
    tokens: int
    due: int = 0
    computed: int = 0
    running: bool = False
    begun: bool = False

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

    def waiting(self) -> list[GoldSequence]:
        again = sorted((s for s in self.all if s.begun and not s.running), key=lambda s: s.name)
        return again + sorted((s for s in self.all if not s.begun), key=lambda s: (s.due, s.name))

    def schedule(self, limit: int | None) -> list[tuple[int, int, int]]:
        work: list[tuple[str, int, int, int]] = []
        left, preempted = self.budget, False
        if limit is not None:
            left = min(left, max(limit, self.max_running))
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
        for s in self.waiting():
            if preempted or not left or len(self.running()) == self.max_running:
                break
            if s.blocks + len(self.running()) > self.free():
                break
            s.running, s.begun, self.held[s.name] = True, True, s.blocks
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
    limits: Limits = {"max_running": rng.randint(1, 8), "max_step_tokens": rng.randint(1, 40)}
    num_blocks = rng.randint(8, 24)
    blocks = BlockManager(num_blocks, SIZE, prefix_cache=False)
    scheduler, gold = Scheduler(blocks, **limits), GoldScheduler(num_blocks, **limits)
    sequences: dict[int, Sequence] = {}
    lengths: dict[int, int] = {}
    ended = 0
    for step in range(800):
        if rng.random() < 0.3 and step < 400:
            prompt, output = rng.randint(1, 16), rng.randint(1, 12)
            due = step + rng.choice([0, 10, 60])
            sequence = Sequence(step, rng.choice(["", "a", "b"]), [0] * prompt, prompt, due=due)
            sequences[step], lengths[step] = sequence, prompt + output
            scheduler.add(sequence)
            gold.all.append(GoldSequence(step, sequence.adapter, prompt, due))
        if rng.random() < 0.05 and sequences:  # an abort, running or waiting
            name = rng.choice(list(sequences))
            scheduler.remove(sequences.pop(name))
            gold.remove(name)
        late = [s for s in gold.all if not s.begun and s.due < step]
        assert {s.sequence_id for s in scheduler.overdue(step)} == {s.name for s in late}
        limit = rng.choice([None, None, 1, 12])
        work = scheduler.schedule(limit)
        scheduler.check()
        assert [(item.sequence.sequence_id, item.start, item.end) for item in work] == gold.schedule(limit)
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


@pytest.mark.parametrize("seed", range(5))
def test_the_oldest_is_never_preempted_and_everybody_ends_though_newer_ones_are_more_urgent(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(BlockManager(10, SIZE, prefix_cache=False), max_running=6, max_step_tokens=16)
    lengths: dict[Sequence, int] = {}
    ended: set[Sequence] = set()
    for step in range(3000):
        if step < 300 and rng.random() < 0.5:
            prompt = rng.randint(1, 12)
            sequence = Sequence(step, "", [0] * prompt, prompt, due=step + rng.choice([0.0, 1.0, 200.0]))
            lengths[sequence] = prompt + rng.randint(1, 20)
            scheduler.add(sequence)
        oldest = scheduler.running[0] if scheduler.running else None
        work = scheduler.schedule()
        assert oldest is None or oldest in [item.sequence for item in work]
        scheduler.check()
        scheduler.commit(work)
        for item in work:
            if item.samples:
                item.sequence.token_ids.append(1)
                if item.sequence.num_tokens >= lengths[item.sequence]:
                    scheduler.remove(item.sequence)
                    ended.add(item.sequence)
        if step > 300 and not scheduler.running and not scheduler.waiting:
            break
    assert ended == set(lengths)
    assert scheduler.num_preemptions > 0


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


# --- room from outside ----------------------------------------------------------------------------------------------


class Asked:
    """A source of chunks that remembers what it was asked for."""

    def __init__(self, blocks: BlockManager, *, chunks: int, lies: bool = False) -> None:
        self.blocks, self.chunks, self.lies = blocks, chunks, lies
        self.questions: list[int] = []

    def make_room(self, num_blocks: int) -> bool:
        self.questions.append(num_blocks)
        while self.chunks and self.blocks.num_free < num_blocks:
            self.blocks.add_chunk(self.blocks.absent_chunks()[0])
            self.chunks -= 1
        return self.lies or self.blocks.num_free >= num_blocks


def running_on(asked: Asked, prompts: list[int]) -> tuple[Scheduler, list[Sequence]]:
    scheduler = Scheduler(asked.blocks, max_running=8, max_step_tokens=64, make_room=asked.make_room)
    sequences = [Sequence(name, "", [0] * prompt, prompt) for name, prompt in enumerate(prompts)]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    return scheduler, sequences


def step(scheduler: Scheduler) -> None:
    work = scheduler.schedule()
    scheduler.check()
    scheduler.commit(work)
    for item in work:
        if item.samples:
            item.sequence.token_ids.append(1)


def test_asks_for_room_before_it_refuses() -> None:
    asked = Asked(BlockManager(16, SIZE, prefix_cache=False, blocks_per_chunk=2), chunks=2)
    scheduler, (first, second, third) = running_on(asked, [4, 8, 12])
    # One block for the first; two and one to spare for the second; three and two to spare for the third.
    assert asked.questions == [1, 3, 5]
    assert scheduler.running == [first, second] and scheduler.waiting == [third]
    asked.chunks = 4
    step(scheduler)
    assert scheduler.running == [first, second, third]


def test_asks_for_room_before_it_preempts() -> None:
    asked = Asked(BlockManager(16, SIZE, prefix_cache=False, blocks_per_chunk=2), chunks=8)
    scheduler, sequences = running_on(asked, [4, 4])
    step(scheduler)
    assert asked.questions == [1, 2] and asked.blocks.num_free == 0
    for _ in range(8):
        step(scheduler)
    assert asked.questions == [1, 2, 1, 1], "the first had to ask twice; the second got what the chunk had left"
    assert scheduler.num_preemptions == 0 and scheduler.running == sequences


@pytest.mark.parametrize("lies", [False, True])
def test_goes_on_without_room_as_if_it_had_not_asked(lies: bool) -> None:
    asked = Asked(BlockManager(16, SIZE, prefix_cache=False, blocks_per_chunk=2), chunks=2, lies=lies)
    scheduler, (first, second) = running_on(asked, [4, 4])
    asked.questions.clear()
    for _ in range(5):
        step(scheduler)
    assert scheduler.num_preemptions == 1
    assert scheduler.running == [first] and scheduler.waiting == [second]
    assert asked.questions[0] == 1
    assert asked.questions.count(1) == 1, "once, then somebody goes"


@pytest.mark.parametrize("seed", range(10))
def test_with_room_for_the_asking_it_decides_as_with_all_blocks_from_the_start(seed: int) -> None:
    rng = random.Random(seed)
    limits: Limits = {"max_running": rng.randint(1, 8), "max_step_tokens": rng.randint(1, 40)}
    num_blocks = 3 * rng.randint(3, 8)
    whole = BlockManager(num_blocks, SIZE, prefix_cache=False)
    parts = BlockManager(num_blocks, SIZE, prefix_cache=False, blocks_per_chunk=3)
    asked = Asked(parts, chunks=parts.num_chunks)
    schedulers = [Scheduler(whole, **limits), Scheduler(parts, **limits, make_room=asked.make_room)]
    pairs: dict[int, list[Sequence]] = {}
    lengths: dict[int, int] = {}
    for turn in range(400):
        if rng.random() < 0.3:
            prompt = rng.randint(1, 16)
            pairs[turn] = [Sequence(turn, "", [0] * prompt, prompt) for _ in schedulers]
            lengths[turn] = prompt + rng.randint(1, 12)
            for scheduler, sequence in zip(schedulers, pairs[turn], strict=True):
                scheduler.add(sequence)
        if rng.random() < 0.3:  # give back what is blank
            for chunk in parts.removable_chunks(keep_cached=False):
                parts.remove_chunk(chunk)
                asked.chunks += 1
        works = [scheduler.schedule() for scheduler in schedulers]
        plain = [[(item.sequence.sequence_id, item.start, item.end) for item in work] for work in works]
        assert plain[0] == plain[1]
        for scheduler, work in zip(schedulers, works, strict=True):
            scheduler.check()
            scheduler.commit(work)
            for item in work:
                if item.samples:
                    item.sequence.token_ids.append(turn)
                    if item.sequence.num_tokens >= lengths[item.sequence.sequence_id]:
                        scheduler.remove(item.sequence)
    assert schedulers[0].num_preemptions == schedulers[1].num_preemptions
    assert asked.questions
