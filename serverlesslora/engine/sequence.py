"""A sequence: the tokens of one choice of one request, and how much of them the KV cache already holds."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import Literal

UNKNOWN = -1  # in the place of a token that the device has chosen and the host has not seen yet


class SequenceState(enum.Enum):
    WAITING = enum.auto()  # holds no blocks
    RUNNING = enum.auto()  # holds blocks for all its tokens
    ENDED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """Facts are fields; whoever owns a fact is named beside it. Everything else is derived.

    A preempted sequence keeps `token_ids`: it is computed again from its own output, never sampled again.
    """

    sequence_id: int  # order of arrival
    adapter: str  # digest; "" is the bare backbone
    token_ids: list[int]  # prompt, then output, then perhaps one UNKNOWN
    num_prompt: int
    follows: Sequence | None = None  # the first choice of the same request: it computes the prompt for all
    samples: bool = True  # False: the prompt is only scored
    scores_prompt: bool = False  # the logits of every prompt position are wanted
    pooling: Literal["last", "mean"] | None = None  # hidden states of the prompt are wanted, and nothing else
    num_pooled: int = 0  # runner: prompt positions whose hidden states need not be computed again
    num_scored: int = 0  # runner: prompt positions whose logits have been used
    num_computed: int = 0  # scheduler: tokens whose keys and values are in the blocks
    num_cached: int = 0  # scheduler: how many of them the prefix cache gave at the last admission
    state: SequenceState = SequenceState.WAITING  # scheduler
    has_begun: bool = False  # scheduler: it was admitted once; it may wait again since
    due: float = 0.0  # whoever created it: when it should have begun, the order in which those who wait are admitted
    block_ids: array[int] = field(default_factory=lambda: array("i"))  # block manager; the kernels' plan copies it
    num_published: int = 0  # block manager: leading blocks whose keys were offered to the prefix cache
    chain: list[bytes] = field(default_factory=list)  # block manager: chained hashes of the full blocks

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def prompt_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt]

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be sampled: one while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_to_score(self) -> int:
        """The last prompt token scores nothing of the prompt: it predicts the first output token."""
        return self.num_prompt - 1 if self.scores_prompt else 0

    @property
    def num_reusable(self) -> int:
        """How many tokens may come from the prefix cache: the last one is computed to get logits, and so is
        every position that is still to be scored."""
        if self.num_scored < self.num_to_score:
            return self.num_scored
        if self.pooling == "mean":
            return min(self.num_pooled, len(self.token_ids) - 1)
        return len(self.token_ids) - 1

    @property
    def is_held(self) -> bool:
        """A further choice waits until the first has computed the prompt, then finds it in the prefix cache."""
        first = self.follows
        return first is not None and first.state is not SequenceState.ENDED and first.num_computed < first.num_prompt
