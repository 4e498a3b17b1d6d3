"""What the next step computes: continuous batching with chunked prefill, admission by earliest due time.

Running sequences go first, decoding before prefilling, oldest first; then waiting ones are admitted: those that were
preempted, oldest first, then those that have not begun, earliest due first. When blocks run out the running sequence
that arrived last is preempted: it gives up its blocks, keeps its tokens and is computed again later. Where more blocks
can be had from outside, they are asked for before anybody is preempted or left waiting. Pure: no tensors, no clock.

Nobody starves. Of those running, the one that arrived first is never preempted for another, so somebody always gets
to the end. One that has begun gives way only to those that arrived before it, which are finitely many. One that has
not begun is overtaken only by those due before it, finitely many too as long as a due time is at most so far ahead of
the arrival. Nobody is passed over for want of blocks: admission stops at the first that does not fit.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import NamedTuple

from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.sequence import UNKNOWN, Sequence, SequenceState


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
    """`make_room(n)` gets memory for more blocks where it can, so that `n` are free; it says whether they are."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_step_tokens: int,
        make_room: Callable[[int], bool] | None = None,
    ) -> None:
        self._blocks = blocks
        self._make_room = make_room
        self._max_running = max_running
        # Every running sequence must be able to decode, or the newest would never get a turn.
        self._max_step_tokens = max(max_step_tokens, max_running)
        self.waiting: list[Sequence] = []  # in order of admission
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0
        self.num_prefix_hit = 0  # tokens, over all first admissions
        self.num_prefix_query = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_admission)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """The sequence has ended, for whatever reason; its blocks are free at once."""
        (self.running if sequence.state is SequenceState.RUNNING else self.waiting).remove(sequence)
        sequence.state = SequenceState.ENDED
        self._blocks.release(sequence, forget=forget)

    def overdue(self, now: float) -> list[Sequence]:
        """Those that should have begun before now and have not."""
        waiting = itertools.dropwhile(lambda sequence: sequence.has_begun, self.waiting)
        return list(itertools.takewhile(lambda sequence: sequence.due < now, waiting))

    def schedule(self, max_tokens: int | None = None) -> list[Work]:
        """The work of one step, at most one entry per sequence; entries of one adapter are neighbours.

        `max_tokens` makes this step shorter than others, but never so short that a sequence would get no turn.
        """
        work: list[Work] = []
        budget = self._max_step_tokens
        if max_tokens is not None:
            budget = min(budget, max(max_tokens, self._max_running))
        preemptions_before = self.num_preemptions
        asked_for: Sequence | None = None  # once for each, whatever the answer was worth

        for sequence in [s for s in self.running if s.num_pending == 1]:
            while sequence.state is SequenceState.RUNNING and not self._blocks.can_grow(sequence):
                if asked_for is sequence or not self._ask_for_room(self._blocks.free_to_grow(sequence)):
                    # The newest is this one or not yet scheduled: what was scheduled so far is older.
                    self._preempt(self.running[-1])
                asked_for = sequence
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
                if not self._can_admit(sequence, prefix, spare=len(self.running)):
                    break
                self._admit(sequence, prefix)
                budget -= self._chunk(sequence, budget, work)

        work.sort(key=lambda item: item.sequence.adapter)
        return work

    def follow(self, last: list[Work]) -> list[Work]:
        """The work of the step after `last`, given before the tokens of `last` are known; empty if it is not certain.

        The same sequences decode on, in the same order: nobody waits who could join, nobody needs to be preempted. Each
        gets UNKNOWN for the token that `last` chooses; `withdraw` takes that back.
        """
        if not all(item.samples and item.sequence.state is SequenceState.RUNNING for item in last):
            return []
        if len(self.running) != len(last) or (self.waiting and len(self.running) < self._max_running):
            return []
        work: list[Work] = []
        for item in last:
            sequence = item.sequence
            sequence.token_ids.append(UNKNOWN)
            work.append(Work(sequence, item.end, item.end + 1))
            if not self._blocks.can_grow(sequence):
                self.withdraw(work)
                return []
            self._blocks.grow(sequence)
        return work

    def withdraw(self, work: list[Work]) -> None:
        """What `follow` gave is not computed after all; a block it took stays for the token that is coming anyway."""
        for item in work:
            unknown = item.sequence.token_ids.pop()
            assert unknown == UNKNOWN

    def commit(self, work: list[Work]) -> None:
        """The step has been computed: its blocks may be shared from now on."""
        for sequence, _, end in work:
            sequence.num_computed = end
            self._blocks.publish(sequence)

    def check(self) -> None:
        self._blocks.check([*self.running, *self.waiting])
        assert len(self.running) <= self._max_running
        assert all(sequence.state is SequenceState.RUNNING and sequence.has_begun for sequence in self.running)
        assert all(sequence.state is SequenceState.WAITING for sequence in self.waiting)
        assert self.running == sorted(self.running, key=_arrival)
        assert self.waiting == sorted(self.waiting, key=_admission)
        assert not any(sequence.block_ids for sequence in self.waiting)

    def _chunk(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        count = min(sequence.num_pending, budget)
        work.append(Work(sequence, sequence.num_computed, sequence.num_computed + count))
        return count

    def _can_admit(self, sequence: Sequence, prefix: list[int], *, spare: int) -> bool:
        if self._blocks.can_admit(sequence, prefix, spare=spare):
            return True
        room = self._ask_for_room(self._blocks.free_to_admit(sequence, prefix) + spare)
        return room and self._blocks.can_admit(sequence, prefix, spare=spare)

    def _ask_for_room(self, num_blocks: int) -> bool:
        return self._make_room is not None and self._make_room(num_blocks)

    def _admit(self, sequence: Sequence, prefix: list[int]) -> None:
        self._blocks.admit(sequence, prefix)
        if sequence.num_output == 0:
            self.num_prefix_query += sequence.num_tokens
            self.num_prefix_hit += sequence.num_cached
        self.waiting.remove(sequence)
        sequence.state = SequenceState.RUNNING
        sequence.has_begun = True
        bisect.insort(self.running, sequence, key=_arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.release(sequence)
        sequence.state = SequenceState.WAITING
        self.add(sequence)
        self.num_preemptions += 1


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id


def _admission(sequence: Sequence) -> tuple[bool, float, int]:
    return not sequence.has_begun, 0.0 if sequence.has_begun else sequence.due, sequence.sequence_id
