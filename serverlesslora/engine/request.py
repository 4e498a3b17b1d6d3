"""A request inside the engine: its choices, what they cost, and the messages that tell the gateway about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from serverlesslora.engine.constraint import CompiledGrammar, Constraint
from serverlesslora.engine.detokenize import Detokenizer
from serverlesslora.engine.logprobs import token_logprob
from serverlesslora.engine.pooling import Pool
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.sampler import Sampled, SampleRow, choice_seed
from serverlesslora.engine.sequence import Sequence, SequenceState
from serverlesslora.engine.stopping import Stopping
from serverlesslora.errors import ServerlessLoraError
from serverlesslora_ipc.messages import (
    Aborted,
    Delta,
    Embedding,
    Failed,
    Finished,
    Generate,
    PromptEcho,
    Spent,
    Started,
    TextPrompt,
)

PATIENCE_S = 60.0  # a request without a deadline, or with a later one, is admitted as if it had to begin within so long


@dataclass(eq=False, slots=True)
class Choice:
    index: int
    seed: int
    sequence: Sequence
    stopping: Stopping
    detokenizer: Detokenizer
    constraint: Constraint | None = None


@dataclass(eq=False, slots=True)
class Request:
    message: Generate
    text: TextCodec
    prompt_ids: list[int]
    max_tokens: int  # resolved: what was asked for, or what the context has room for
    submitted_at: float
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    device_s: float = 0.0  # account: what it was charged so far
    num_output: int = 0  # tokens of all choices
    prompt_scores: list[Sampled] = field(default_factory=list)  # of the second prompt token and those behind it
    choices: dict[Sequence, Choice] = field(default_factory=dict)
    num_cached: int = 0
    grammar: CompiledGrammar | None = None  # what every choice must match
    pool: Pool = field(default_factory=Pool)
    _has_echoed: bool = False

    @property
    def adapter(self) -> str:
        return self.message.adapter or ""

    @property
    def due(self) -> float:
        """When it should have begun; soon for all, so that a stream of urgent ones does not hold up the others."""
        patience = self.submitted_at + PATIENCE_S
        return patience if self.message.deadline is None else min(patience, self.message.deadline)

    def is_late(self, now: float) -> bool:
        """It was not begun before its deadline, so whoever asked has given it up. One that has begun goes on."""
        return self.started_at is None and self.message.deadline is not None and self.message.deadline < now

    @property
    def scores_prompt(self) -> bool:
        return self.message.sampling.prompt_logprobs is not None

    @property
    def has_ended(self) -> bool:
        return all(sequence.state is SequenceState.ENDED for sequence in self.choices)

    def create_choices(self, sequence_ids: Iterator[int]) -> None:
        """One sequence per choice; the further ones follow the first, which computes the prompt for all.

        Nothing is created where nothing is to be computed, and only one where the prompt is only scored.
        """
        samples = self.max_tokens > 0
        first: Sequence | None = None
        pooling = self.message.pooling
        for index in range(self.message.n if samples else int(self.scores_prompt or pooling is not None)):
            sequence = Sequence(
                next(sequence_ids),
                self.adapter,
                list(self.prompt_ids),
                len(self.prompt_ids),
                follows=first,
                samples=samples,
                scores_prompt=self.scores_prompt and first is None,
                pooling=pooling,
                due=self.due,
            )
            self.choices[sequence] = self._choice(index, sequence)
            first = first or sequence

    def _choice(self, index: int, sequence: Sequence) -> Choice:
        params, num_prompt = self.message.sampling, len(self.prompt_ids)
        return Choice(
            index,
            choice_seed(params.seed, index),
            sequence,
            Stopping(
                params,
                eos_token_ids=self.text.eos_token_ids,
                prompt_tokens=num_prompt,
                context_length=num_prompt + self.max_tokens,
            ),
            self.text.detokenizer(
                self.prompt_ids, skip_special_tokens=params.skip_special_tokens, prompt=self.message.prompt
            ),
            self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        if self.grammar is None:
            return None
        shunned = self.text.eos_token_ids if self.message.sampling.ignore_eos else ()
        return self.grammar.begin(after=self._reasoning_end, shunned=shunned)

    @property
    def _reasoning_end(self) -> str | None:
        """What ends the reasoning that the output begins inside of."""
        if not self.text.begins_reasoning(self.message.prompt, self.prompt_ids):
            return None
        tags = self.text.dialect.reasoning_tags
        return None if tags is None else tags[1]

    def is_complete(self, sequence: Sequence) -> bool:
        """Whether it has as many tokens as it may have, whatever they are."""
        return sequence.num_output >= self.max_tokens

    def sample_row(self, sequence: Sequence) -> SampleRow:
        choice, params = self.choices[sequence], self.message.sampling
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        return SampleRow(
            params,
            choice.seed,
            position=sequence.num_tokens,
            prompt_ids=self.prompt_ids,
            output_ids=sequence.output_ids if penalised else (),
            banned=choice.stopping.banned,
            constraint=choice.constraint,
        )

    def fault(self, sequence: Sequence) -> ServerlessLoraError | None:
        """Why no token could be chosen for it, where its grammar is the reason."""
        constraint = self.choices[sequence].constraint
        return None if constraint is None else constraint.fault

    def advance(self, sequence: Sequence, sampled: Sampled, now: float) -> Delta:
        """What the token that was just sampled means for the client."""
        choice = self.choices[sequence]
        self.num_output += 1
        if self.first_token_at is None:
            self.first_token_at = now
        piece = choice.detokenizer.push(sampled.token_id)
        is_complete = choice.constraint is not None and choice.constraint.advance(sampled.token_id)
        outcome = choice.stopping.push(sampled.token_id, piece, choice.detokenizer.flush, is_complete=is_complete)
        logprobs = None
        if self.message.sampling.logprobs is not None:
            logprobs = (token_logprob(sampled, self.text.vocabulary),)
        return Delta(
            self.message.request_id,
            choice.index,
            outcome.text,
            (sampled.token_id,),
            logprobs,
            outcome.finish_reason,
            outcome.stop_reason,
        )

    def start(self, now: float) -> Started:
        self.started_at = now
        self.num_cached = max((sequence.num_cached for sequence in self.choices), default=0)
        dialect = self.text.dialect
        return Started(
            self.message.request_id,
            len(self.prompt_ids),
            self.num_cached,
            dialect.tool_format,
            dialect.reasoning_tags,
            self.text.begins_reasoning(self.message.prompt, self.prompt_ids),
        )

    def echo(self) -> list[PromptEcho]:
        """The prompt, once, as soon as all of it is scored that has to be."""
        wanted = self.message.echo or self.scores_prompt
        num_scores = len(self.prompt_ids) - 1 if self.scores_prompt else 0
        if self._has_echoed or not wanted or len(self.prompt_scores) < num_scores:
            return []
        self._has_echoed = True
        prompt = self.message.prompt
        shown = prompt.text if isinstance(prompt, TextPrompt) else self.text.vocabulary.decode(self.prompt_ids)
        logprobs = None
        if self.scores_prompt:
            logprobs = (None, *(token_logprob(scored, self.text.vocabulary) for scored in self.prompt_scores))
        strs = None
        if self.message.token_strs:
            strs = tuple(self.text.tokenizer.convert_ids_to_tokens(self.prompt_ids))
        return [PromptEcho(self.message.request_id, shown, tuple(self.prompt_ids), logprobs, strs)]

    def end_without_output(self) -> list[Delta | Embedding]:
        if self.message.pooling is not None:
            return [Embedding(self.message.request_id, self.pool.vector())]
        return [Delta(self.message.request_id, index, "", finish_reason="length") for index in range(self.message.n)]

    # --- its end, told once everything it is charged for is known ------------------------------------------------

    def finished(self) -> Finished:
        return Finished(self.message.request_id, **msgspec.structs.asdict(self._spent()))

    def failed(self, error: ServerlessLoraError) -> Failed:
        return Failed(self.message.request_id, error.to_wire(), self._spent())

    def aborted(self) -> Aborted:
        return Aborted(self.message.request_id, self._spent())

    def _spent(self) -> Spent:
        assert self.ended_at is not None
        began = self.ended_at if self.started_at is None else self.started_at
        return Spent(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self.num_output,
            cached_tokens=self.num_cached,
            queue_s=began - self.submitted_at,
            device_s=self.device_s,
            first_token_s=0.0 if self.first_token_at is None else self.first_token_at - self.submitted_at,
        )
