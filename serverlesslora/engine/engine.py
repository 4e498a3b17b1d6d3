"""The engine: requests in, messages out, one `step()` at a time.

It ties the parts together and decides nothing itself: the scheduler says what is computed, the runner computes it, the
sampler chooses, and each request turns its tokens into messages.

A step is launched, then collected. Where decode steps are graphs and tokens are chosen on the device, the next step is
launched before the last one is collected: its tokens go from one to the other on the device, while the host turns the
tokens of the step before into text. A sequence that turns out to have ended has one row computed for nothing, which its
request pays for: a request's end is told when the last step it has rows in is over. Its blocks are free at once.
"""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from serverlesslora.engine.account import Account
from serverlesslora.engine.adapters import AdapterRead, AdapterTable
from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.constraint import CompiledGrammar, Grammars
from serverlesslora.engine.device import Choosing, Device
from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.kv_pool import KvPool
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.request import Request
from serverlesslora.engine.runner import PromptLogits, Runner, StepOutput
from serverlesslora.engine.sampler import Sampled
from serverlesslora.engine.scheduler import Scheduler, Work
from serverlesslora.engine.sequence import Sequence, SequenceState
from serverlesslora.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    ServerlessLoraError,
    Unavailable,
)
from serverlesslora_ipc.messages import (
    Aborted,
    Failed,
    Finished,
    Generate,
    LoadAdapter,
    Loaded,
    Refused,
    Stats,
    WorkerLimits,
    WorkerToGateway,
)

FORGET_AFTER_S = 30.0  # of idleness, and cached prefixes are worth less than the memory they hold
STARVED_S = 30.0

_SCORE_ROWS = 64  # prompt logits turned into log-probabilities at once: bounds the float32 copy

log = logging.getLogger("serverlesslora.engine")


class NonFiniteLogits(ServerlessLoraError):
    code = "nan_logits"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"


End = Callable[[], Finished | Failed | Aborted]


class _Launched(NamedTuple):
    """A step on its way."""

    work: list[Work]
    owners: list[Request]  # of each work
    result: StepOutput
    choice: Choosing  # of one token per result.sampling
    started: float


class _Starving(NamedTuple):
    sequence: Sequence  # the oldest that waits
    since: float


class Engine:
    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraModel,
        text: TextCodec,
        limits: WorkerLimits,
        clock: Callable[[], float],
        device: Device = HOST,
    ) -> None:
        """`model` and `lora` are on `device`. Raises ConfigError when the model or the limits cannot be served."""
        config = model.config.get_text_config()
        trained = int(getattr(config, "max_position_embeddings", None) or limits.max_model_len or 2048)
        self.max_model_len = min(limits.max_model_len or trained, trained)
        self.limits = limits
        self._lora = lora
        self._text = text
        self._clock = clock
        self._runner = Runner(model, lora, limits, max_model_len=self.max_model_len, device=device)
        kv = self._runner.kv
        self.kv_tokens = kv.num_blocks * limits.block_size
        self._blocks = BlockManager(
            kv.num_blocks,
            limits.block_size,
            prefix_cache=limits.prefix_cache,
            salt=secrets.randbits(64),
            blocks_per_chunk=kv.elastic.blocks_per_chunk if kv.elastic else None,
        )
        self._pool: KvPool | None = None
        if kv.elastic is not None:
            elastic = kv.elastic
            self._pool = KvPool(
                self._blocks, elastic, chunk_bytes=elastic.chunk_bytes, reserve_bytes=elastic.reserve_bytes
            )
        self._scheduler = Scheduler(
            self._blocks,
            max_running=limits.max_running,
            max_step_tokens=limits.max_step_tokens,
            make_room=self._pool.make_room if self._pool else None,
        )
        self._sampler = device.create_sampler()
        self._loads_aside = device.kind != "cpu"
        self._adapters = AdapterTable(lora, text, clock)
        self.grammars = Grammars()
        self._requests: dict[str, Request] = {}
        self._request_of: dict[Sequence, Request] = {}
        self._outbox: list[WorkerToGateway] = []
        self._sequence_ids = itertools.count()
        self._account = Account()
        self._ahead: _Launched | None = None
        self._ending: list[tuple[Request, End]] = []  # ended, but with rows in the step on its way
        self._collected_at = float("-inf")
        self._starving: _Starving | None = None

    def capture(self) -> None:
        """Have kernels ready and record decode steps as graphs where the device has them; takes seconds.

        Nothing may be running.
        """
        assert not self._requests
        self._lora.store.warm_up(self._runner.dtype)
        if self._runner.graphs is not None:
            self._runner.graphs.capture()

    @property
    def loads_aside(self) -> bool:
        """Whether `read_adapter` beside running steps costs them nothing; on CPU both want the same cores."""
        return self._loads_aside

    @property
    def graphs_state(self) -> str:
        """What decode steps run on, for people."""
        return "none on this device" if self._runner.graphs is None else self._runner.graphs.state

    def start_counting(self) -> None:
        """What was computed so far was a rehearsal that nobody asked for."""
        assert not self.has_work
        self._account = Account()
        self._scheduler.num_preemptions = 0
        self._scheduler.num_prefix_hit = self._scheduler.num_prefix_query = 0

    def close(self) -> None:
        """Leave the model to another engine; nothing may be running."""
        assert not self._requests
        assert self._ahead is None
        self._runner.close()

    # --- what the gateway asks ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A step would change something."""
        return bool(self._requests or self._outbox)

    def drain(self) -> list[WorkerToGateway]:
        """What can be said without computing: refusals, the ends of aborted requests and of those that are too late."""
        if self._scheduler.waiting:
            now = self._clock()
            late = (self._request_of[sequence] for sequence in self._scheduler.overdue(now))
            for request in dict.fromkeys(late):
                if request.is_late(now):
                    self._fail(request, DeadlineExceeded(_LATE.format(now - request.submitted_at)))
        self._settle(self._outbox)
        out, self._outbox = self._outbox, []
        return out

    def codec_of(self, adapter: str | None) -> TextCodec | None:
        """What a request for this adapter is encoded with; None: it is not loaded."""
        entry = None if adapter is None else self._adapters.find(adapter)
        return self._text if adapter is None else None if entry is None else entry.text

    def submit(self, message: Generate, grammar: CompiledGrammar | ServerlessLoraError | None = None) -> None:
        """Accept the request; what is wrong with it is told by the next step, as Failed.

        `grammar` is the request's, compiled elsewhere, or what came of that; without it that is done here.
        """
        assert message.request_id not in self._requests
        try:
            request = self._accept(message, grammar)
        except ServerlessLoraError as error:
            self._outbox.append(Failed(message.request_id, error.to_wire()))
            return
        if not request.choices:  # nothing to compute
            started = request.start(request.submitted_at)
            request.ended_at = request.submitted_at
            self._outbox += [started, *request.echo(), *request.end_without_output(), request.finished()]
            return
        self._requests[message.request_id] = request
        if request.adapter:
            self._adapters.acquire(request.adapter)
        for sequence in request.choices:
            self._request_of[sequence] = request
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Free at once whatever the request holds; an unknown one has ended already. `drain` or a step says Aborted."""
        request = self._requests.get(request_id)
        if request is not None:
            self._drop(request, request.aborted)
            self._settle(self._outbox)
        if not self._requests:
            self._starving = None

    def load_adapter(self, message: LoadAdapter) -> Loaded | Refused:
        return self.admit(self.read_adapter(message))

    def read_adapter(self, message: LoadAdapter) -> AdapterRead:
        """The long part of loading: reading, checking, packing, starting the copy to the device.

        On a device that `loads_aside` another thread may do it while steps run; `admit` makes the result known.
        """
        return self._adapters.read(message)

    def admit(self, read: AdapterRead) -> Loaded | Refused:
        """From now on requests may name the adapter."""
        return self._adapters.admit(read)

    def unload_adapter(self, digest: str) -> None:
        """New requests no longer find it; running ones finish on it, then its memory is freed."""
        self._adapters.retire(digest)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_used_blocks=self._blocks.num_used,
            kv_total_blocks=self._blocks.num_blocks,
            adapters=self._adapters.digests,
            adapter_bytes=self._adapters.size_bytes,
            steps=self._account.num_steps,
            busy_s=self._account.busy_s,
            preemptions=self._scheduler.num_preemptions,
            prefix_hit_tokens=self._scheduler.num_prefix_hit,
            prefix_query_tokens=self._scheduler.num_prefix_query,
            decode=self._account.decode.to_wire(),
            prefill=self._account.prefill.to_wire(),
            kv_bytes=self._kv_bytes,
        )

    @property
    def _kv_bytes(self) -> int:
        kv = self._runner.kv
        if kv.elastic is not None:
            return kv.size_bytes
        return kv.size_bytes // kv.num_blocks * self._blocks.num_touched  # pages nobody wrote to take no memory

    @property
    def is_starved(self) -> bool:
        """Requests wait for memory that other processes hold: another step at once would change nothing."""
        return self._starving is not None

    def rest(self, idle_s: float) -> int:
        """For a caller that has had nothing to do for so long: memory goes back to the device, caches last.

        Returns the bytes given back.
        """
        assert not self._requests
        if self._pool is None:
            return 0
        if idle_s >= FORGET_AFTER_S:
            self._runner.release_cached()
            return self._pool.give_back(keep_cached=False, keep_chunks=0)
        return self._pool.give_back(keep_cached=True)

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self, max_tokens: int | None = None) -> list[WorkerToGateway]:
        """`max_tokens`: others wait for the device, so no long prompt may hold it; see `Scheduler.schedule`."""
        out = self.drain()
        launched, self._ahead = self._ahead, None
        if launched is None:
            launched = self._launch(out, max_tokens)
        if launched is None:
            self._starve()
        else:
            self._ahead = self._launch_after(launched)
            self._collect(launched, out)
        self._settle(out)
        return out

    def _starve(self) -> None:
        """Nothing can be computed: nothing waits, or what waits gets no memory. The oldest is told in the end."""
        oldest = min(self._scheduler.waiting, key=lambda sequence: sequence.sequence_id, default=None)
        if oldest is None:
            self._starving = None
            return
        now = self._clock()
        if self._starving is None or self._starving.sequence is not oldest:
            self._starving = _Starving(oldest, now)
        if now - self._starving.since > STARVED_S:
            reason = self._pool.last_reason if self._pool else "no block is free"
            log.warning("no memory for a request in %.0f s: %s", STARVED_S, reason)
            error = Unavailable("the device's memory is taken by other functions; try again", retry_after_s=5)
            self._starving = None
            self._fail(self._request_of[oldest], error)

    def _launch(self, out: list[WorkerToGateway], max_tokens: int | None) -> _Launched | None:
        started = self._clock()
        work = self._scheduler.schedule(max_tokens)
        if not work:
            return None
        self._starving = None
        owners = [self._request_of[item.sequence] for item in work]
        new = [request for request in dict.fromkeys(owners) if request.started_at is None]
        out += [request.start(started) for request in new]
        result = self._run(work)
        if result is None:  # its requests end, no others
            self._account.charge(work, owners, self._clock() - started)
            error = Unavailable("the device has no memory for this step; try again", retry_after_s=5)
            for request in dict.fromkeys(owners):
                self._fail(request, error)
            return None
        rows = [self._request_of[sequence].sample_row(sequence) for sequence in result.sampling]
        return _Launched(work, owners, result, self._sampler.begin(result.logits, rows), started)

    def _run(self, work: list[Work]) -> StepOutput | None:
        """None: it found no memory, even after what torch keeps was given back."""
        for _ in range(2):
            try:
                return self._runner.run(work, self._adapters.by_digest)
            except torch.OutOfMemoryError as problem:
                log.warning("a step of %d sequences found no memory: %s", len(work), problem)
                self._runner.release_cached()
        return None

    def _launch_after(self, last: _Launched) -> _Launched | None:
        """Launch the step that follows `last` without knowing its tokens, if nothing can need another step first."""
        tokens = last.choice.tokens
        if tokens is None or self._runner.graphs is None:
            return None
        work = self._scheduler.follow(last.work)
        if not work:
            return None
        started = self._clock()
        owners = [self._request_of[item.sequence] for item in work]
        rows = [owner.sample_row(item.sequence) for owner, item in zip(owners, work, strict=True)]
        may_end = any(owner.is_complete(item.sequence) for owner, item in zip(owners, work, strict=True))
        adapters = self._adapters.by_digest
        if may_end or not self._sampler.is_on_device(rows) or not self._runner.graphs.fits(work, adapters):
            self._scheduler.withdraw(work)
            return None
        logits = self._runner.graphs.run(work, adapters, tokens=tokens)
        result = StepOutput([item.sequence for item in work], logits, [])
        return _Launched(work, owners, result, self._sampler.begin(logits, rows), started)

    def _collect(self, launched: _Launched, out: list[WorkerToGateway]) -> None:
        work, owners, result, choice, started = launched
        # Who was aborted since the launch is not there any more.
        requests = [request for request in dict.fromkeys(owners) if self._is_open(request)]
        self._scheduler.commit([item for item in work if item.sequence in self._request_of])
        self._score(result.scoring)
        for states in result.pooling:
            owner = self._request_of.get(states.sequence)
            if owner is not None and not owner.pool.add(states):
                self._fail(owner, NonFiniteLogits(_NAN))
        for request in requests:
            out += request.echo()
        places = {item.sequence: item.end for item in work}
        self._advance(result.sampling, [places[sequence] for sequence in result.sampling], choice.wait(), out)
        self._end_scored(work, out)
        # Time is counted once: a step that was launched early begins where the one before it ended.
        now = self._clock()
        elapsed = now - max(started, self._collected_at)
        self._collected_at = now
        self._account.charge(work, owners, elapsed)
        self._account.observe(work, elapsed)
        for request in requests:
            if request.has_ended and self._is_open(request):
                self._drop(request, request.finished)

    def _is_open(self, request: Request) -> bool:
        return self._requests.get(request.message.request_id) is request

    def _end_scored(self, work: list[Work], out: list[WorkerToGateway]) -> None:
        """Sequences that do not sample end with their prompt."""
        for item in work:
            request = self._request_of.get(item.sequence)
            if request is not None and not item.sequence.samples and not item.sequence.num_pending:
                out += request.end_without_output()
                self._end(item.sequence)

    def _score(self, scoring: list[PromptLogits]) -> None:
        for sequence, first, logits in scoring:
            request = self._request_of[sequence]
            for begin in range(0, logits.shape[0], _SCORE_ROWS):
                part = logits[begin : begin + _SCORE_ROWS]
                targets = sequence.token_ids[first + begin : first + begin + part.shape[0]]
                scored = self._sampler.score(part, targets, request.message.sampling.prompt_logprobs or 0)
                if not all(entry.ok for entry in scored):
                    self._fail(request, NonFiniteLogits(_NAN))
                    break
                request.prompt_scores += scored

    def _advance(
        self, sequences: list[Sequence], places: list[int], sampled: list[Sampled], out: list[WorkerToGateway]
    ) -> None:
        """Give each sequence its token, at the place behind the last one that was computed."""
        now = self._clock()
        for sequence, place, token in zip(sequences, places, sampled, strict=True):
            request = self._request_of.get(sequence)
            if request is None:
                continue  # aborted, or it failed while it was scored, or another choice of it has failed here
            if not token.ok:
                self._fail(request, request.fault(sequence) or NonFiniteLogits(_NAN))
                continue
            sequence.token_ids[place:] = [token.token_id]
            delta = request.advance(sequence, token, now)
            out.append(delta)
            if delta.finish_reason is not None:
                self._end(sequence)

    # --- beginning and end of a request -------------------------------------------------------------------------

    def _accept(self, message: Generate, grammar: CompiledGrammar | ServerlessLoraError | None) -> Request:
        text, vocab_size = self._text, self._lora.vocab_size
        if message.adapter is not None:
            entry = self._adapters.find(message.adapter)
            if entry is None:
                raise ModelNotFound(f"the adapter {message.adapter} is not loaded in this worker", param="model")
            text, vocab_size = entry.text, entry.adapter.vocab_size
        prompt_ids = text.encode(message.prompt)
        # A tokenizer may know more tokens than the model has rows for; the embedding would raise for everybody.
        if max(prompt_ids) >= vocab_size:
            raise InvalidRequest(
                f"token {max(prompt_ids)} is beyond the model's vocabulary of {vocab_size} tokens", param="prompt"
            )
        asked = message.sampling.max_tokens if message.pooling is None else 0
        max_tokens = self._max_tokens(len(prompt_ids), asked)
        if isinstance(grammar, ServerlessLoraError):
            raise grammar
        if grammar is None and message.sampling.grammar is not None:
            grammar = self.grammars.compile(message.sampling.grammar, text)
        request = Request(message, text, prompt_ids, max_tokens, submitted_at=self._clock(), grammar=grammar)
        request.create_choices(self._sequence_ids)
        return request

    def _max_tokens(self, num_prompt: int, asked: int | None) -> int:
        limit = min(self.max_model_len, self.kv_tokens)
        room = limit - num_prompt
        if room >= (1 if asked is None else asked):
            return room if asked is None else asked
        what = "context length is" if limit == self.max_model_len else "KV cache holds"
        requested = f"{num_prompt} in the prompt" + ("" if asked is None else f", {asked} for the output")
        raise ContextLengthExceeded(
            f"this model's {what} {limit} tokens, but {num_prompt + (asked or 1)} were requested ({requested});"
            " shorten the prompt or lower max_tokens"
        )

    def _fail(self, request: Request, error: ServerlessLoraError) -> None:
        self._drop(request, functools.partial(request.failed, error), forget=True)

    def _end(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._scheduler.remove(sequence, forget=forget)
        del self._request_of[sequence]

    def _drop(self, request: Request, end: End, *, forget: bool = False) -> None:
        """Whatever it holds is free; `end` is told when it has been charged for all of its steps."""
        request.ended_at = self._clock()
        self._ending.append((request, end))
        for sequence in request.choices:
            if sequence.state is not SequenceState.ENDED:
                self._end(sequence, forget=forget)
        del self._requests[request.message.request_id]
        if request.adapter:
            self._adapters.release(request.adapter)

    def _settle(self, out: list[WorkerToGateway]) -> None:
        """Tell ends. With nobody left the step on its way is waited for now: it must not be billed for a pause."""
        if self._ahead is not None and not self._requests:
            launched, self._ahead = self._ahead, None
            self._collect(launched, out)
        self._tell_ends(out)

    def _tell_ends(self, out: list[WorkerToGateway]) -> None:
        on_its_way = set(self._ahead.owners) if self._ahead is not None else set()
        out += [end() for request, end in self._ending if request not in on_its_way]
        self._ending = [entry for entry in self._ending if entry[0] in on_its_way]

    def check(self) -> None:
        """Assert the invariants of every part; for tests."""
        self._scheduler.check()
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        assert set(queued) == set(self._request_of)
        for request in self._requests.values():
            assert not request.has_ended
        owners = [] if self._ahead is None else self._ahead.owners
        assert all(request in owners for request, _ in self._ending)
        assert self._requests or self._ahead is None
        self._adapters.check([request.adapter for request in self._requests.values()])


_LATE = (
    "the request waited for {:.1f} s and did not begin before its deadline; the function is busy: try again in a few "
    "seconds"
)
_NAN = "the model produced numbers that are not finite for this request; its adapter or the backbone is damaged"
