"""What the next step computes: continuous batching with chunked prefill, first come first served.

Running sequences go first, decoding before prefilling, oldest first; then waiting ones are admitted. When blocks run
out the newest running sequence is preempted: it gives up its blocks, keeps its tokens and is computed again later.
The oldest can thus always proceed, which is why nobody starves. Pure: no tensors, no clock.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.sequence import Sequence, SequenceState


class Work(NamedTuple):
    """Compute tokens `start` to `end` of the sequence in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> bool:
        return self.sequence.samples and self.end == self.sequence.num_tokens


class Scheduler:
    def __init__(self, blocks: BlockManager, *, max_running: int, max_step_tokens: int) -> None:
        self._blocks = blocks
        self._max_running = max_running
        # Every running sequence must be able to decode, or the newest would never get a turn.
        self._max_step_tokens = max(max_step_tokens, max_running)
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_hit = 0  # tokens, over all first admissions
        self.num_prefix_query = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """The sequence has ended, for whatever reason; its blocks are free at once."""
        (self.running if sequence.state is SequenceState.RUNNING else self.waiting).remove(sequence)
        sequence.state = SequenceState.ENDED
        self._blocks.release(sequence, forget=forget)

    def schedule(self) -> list[Work]:
        """The work of one step, at most one entry per sequence; entries of one adapter are neighbours."""
        work: list[Work] = []
        budget = self._max_step_tokens
        preemptions_before = self.num_preemptions

        for sequence in [s for s in self.running if s.num_pending == 1]:
            while sequence.state is SequenceState.RUNNING and not self._blocks.can_grow(sequence):
                # The newest is this one or not yet scheduled: what was scheduled so far is older.
                self._preempt(self.running[-1])
            if sequence.state is SequenceState.RUNNING:
                self._blocks.grow(sequence)
                work.append(Work(sequence, sequence.num_computed, sequence.num_tokens))
                budget -= 1

        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                budget -= self._chunk(sequence, budget, work)

        if self.num_preemptions == preemptions_before:
            for sequence in list(self.waiting):
                if budget <= 0 or len(self.running) >= self._max_running:
                    break
                if sequence.is_held:
                    continue
                prefix = self._blocks.find_prefix(sequence)
                # One spare block for each running sequence, so that their next tokens do not undo the admission.
                if not self._blocks.can_admit(sequence, prefix, spare=len(self.running)):
                    break
                self._admit(sequence, prefix)
                budget -= self._chunk(sequence, budget, work)

        work.sort(key=lambda item: item.sequence.adapter)
        return work

    def commit(self, work: list[Work]) -> None:
        """The step has been computed: its blocks may be shared from now on."""
        for sequence, _, end in work:
            sequence.num_computed = end
            self._blocks.publish(sequence)

    def check(self) -> None:
        self._blocks.check([*self.running, *self.waiting])
        assert len(self.running) <= self._max_running
        for queue, state in ((self.running, SequenceState.RUNNING), (self.waiting, SequenceState.WAITING)):
            assert all(sequence.state is state for sequence in queue)
            assert queue == sorted(queue, key=_arrival)
        assert not any(sequence.block_ids for sequence in self.waiting)

    def _chunk(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        count = min(sequence.num_pending, budget)
        work.append(Work(sequence, sequence.num_computed, sequence.num_computed + count))
        return count

    def _admit(self, sequence: Sequence, prefix: list[int]) -> None:
        self._blocks.admit(sequence, prefix)
        if sequence.num_output == 0:
            self.num_prefix_query += sequence.num_tokens
            self.num_prefix_hit += sequence.num_cached
        self.waiting.remove(sequence)
        sequence.state = SequenceState.RUNNING
        bisect.insort(self.running, sequence, key=_arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.release(sequence)
        sequence.state = SequenceState.WAITING
        self.add(sequence)
        self.num_preemptions += 1


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
