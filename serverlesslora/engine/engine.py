"""The engine: requests in, messages out, one `step()` at a time.

It ties the parts together and decides nothing itself: the scheduler says what is computed, the runner computes it, the
sampler chooses, and each request turns its tokens into messages.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from serverlesslora.engine.attention import bytes_per_token
from serverlesslora.engine.blocks import BlockManager
from serverlesslora.engine.lora import Adapter, LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.request import Request
from serverlesslora.engine.runner import PromptLogits, Runner, StepOutput
from serverlesslora.engine.sampler import Sampler
from serverlesslora.engine.scheduler import Scheduler, Work
from serverlesslora.engine.sequence import Sequence, SequenceState
from serverlesslora.errors import (
    AdapterInvalid,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    ServerlessLoraError,
)
from serverlesslora_ipc.messages import (
    Failed,
    Generate,
    LoadAdapter,
    Loaded,
    Refused,
    Stats,
    WorkerLimits,
    WorkerToGateway,
)

_SCORE_ROWS = 64  # prompt logits turned into log-probabilities at once: bounds the float32 copy


class NonFiniteLogits(ServerlessLoraError):
    code = "nan_logits"


@dataclass(slots=True)
class _LoadedAdapter:
    adapter: Adapter
    text: TextCodec
    num_requests: int = 0
    retired: bool = False  # unloaded by name; freed when the last request on it ends


class Engine:
    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraModel,
        text: TextCodec,
        limits: WorkerLimits,
        clock: Callable[[], float],
    ) -> None:
        config = model.config.get_text_config()
        block_bytes = bytes_per_token(config, model.dtype) * limits.block_size
        num_blocks = limits.kv_bytes // block_bytes
        if num_blocks < 1:
            raise ConfigError(f"kv_bytes {limits.kv_bytes} is less than one KV block ({block_bytes} bytes)")
        trained = int(getattr(config, "max_position_embeddings", None) or limits.max_model_len or 2048)
        self.max_model_len = min(limits.max_model_len or trained, trained)
        self.kv_tokens = num_blocks * limits.block_size
        self._lora = lora
        self._text = text
        self._clock = clock
        self._blocks = BlockManager(
            num_blocks, limits.block_size, prefix_cache=limits.prefix_cache, salt=secrets.randbits(64)
        )
        self._scheduler = Scheduler(
            self._blocks, max_running=limits.max_running, max_step_tokens=limits.max_step_tokens
        )
        self._runner = Runner(
            model, lora, num_blocks=num_blocks, block_size=limits.block_size, max_model_len=self.max_model_len
        )
        self._sampler = Sampler()
        self._adapters: dict[str, _LoadedAdapter] = {}
        self._requests: dict[str, Request] = {}
        self._request_of: dict[Sequence, Request] = {}
        self._outbox: list[WorkerToGateway] = []
        self._sequence_ids = itertools.count()
        self._num_steps = 0
        self._busy_s = 0.0

    def close(self) -> None:
        """Leave the model to another engine; nothing may be running."""
        assert not self._requests
        self._runner.close()

    # --- what the gateway asks ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._outbox)

    def submit(self, message: Generate) -> None:
        """Accept the request; what is wrong with it is told by the next step, as Failed."""
        assert message.request_id not in self._requests
        try:
            request = self._accept(message)
        except ServerlessLoraError as error:
            self._outbox.append(Failed(message.request_id, error.to_wire()))
            return
        if not request.choices:  # nothing to compute
            started = request.start(request.submitted_at)
            self._outbox += [started, *request.echo(), *request.end_without_output(), request.finish()]
            return
        self._requests[message.request_id] = request
        if request.adapter:
            self._adapters[request.adapter].num_requests += 1
        for sequence in request.choices:
            self._request_of[sequence] = request
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Free at once whatever the request holds; an unknown one has ended already."""
        request = self._requests.get(request_id)
        if request is not None:
            self._drop(request)

    def load_adapter(self, message: LoadAdapter) -> Loaded | Refused:
        started = self._clock()
        entry = self._adapters.get(message.digest)
        if entry is None:
            try:
                entry = self._adapters[message.digest] = self._load(Path(message.path), message.digest)
            except AdapterInvalid as error:
                return Refused(message.digest, error.message)
        entry.retired = False
        adapter = entry.adapter
        return Loaded(
            message.digest,
            self._clock() - started,
            adapter.size_bytes,
            rank=adapter.rank,
            modules=adapter.modules,
            kinds=adapter.kinds,
        )

    def unload_adapter(self, digest: str) -> None:
        """New requests no longer find it; running ones finish on it, then its memory is freed."""
        entry = self._adapters.get(digest)
        if entry is not None:
            entry.retired = True
            self._free_if_unused(digest)

    def stats(self) -> Stats:
        loaded = {digest: entry for digest, entry in self._adapters.items() if not entry.retired}
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_used_blocks=self._blocks.num_used,
            kv_total_blocks=self._blocks.num_blocks,
            adapters=tuple(loaded),
            adapter_bytes=sum(entry.adapter.size_bytes for entry in self._adapters.values()),
            steps=self._num_steps,
            busy_s=self._busy_s,
            preemptions=self._scheduler.num_preemptions,
            prefix_hit_tokens=self._scheduler.num_prefix_hit,
            prefix_query_tokens=self._scheduler.num_prefix_query,
        )

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self) -> list[WorkerToGateway]:
        out, self._outbox = self._outbox, []
        started = self._clock()
        work = self._scheduler.schedule()
        if not work:
            return out
        owners = [self._request_of[item.sequence] for item in work]
        requests = dict.fromkeys(owners)
        for request in requests:
            if request.started_at is None:
                out.append(request.start(started))
        result = self._runner.run(work, {digest: entry.adapter for digest, entry in self._adapters.items()})
        self._scheduler.commit(work)
        self._score(result.scoring, out)
        for request in requests:
            out += request.echo()
        self._sample(result, out)
        self._end_scored(work, out)
        self._account(work, owners, self._clock() - started)
        for request in requests:
            if request.has_ended and request.message.request_id in self._requests:
                out.append(request.finish())
                self._drop(request)
        return out

    def _end_scored(self, work: list[Work], out: list[WorkerToGateway]) -> None:
        """Sequences that do not sample end with their prompt."""
        for item in work:
            request = self._request_of.get(item.sequence)
            if request is not None and not item.sequence.samples and not item.sequence.num_pending:
                out += request.end_without_output()
                self._end(item.sequence)

    def _score(self, scoring: list[PromptLogits], out: list[WorkerToGateway]) -> None:
        for sequence, first, logits in scoring:
            request = self._request_of[sequence]
            for begin in range(0, logits.shape[0], _SCORE_ROWS):
                part = logits[begin : begin + _SCORE_ROWS]
                targets = sequence.token_ids[first + begin : first + begin + part.shape[0]]
                scored = self._sampler.score(part, targets, request.message.sampling.prompt_logprobs or 0)
                if not all(entry.ok for entry in scored):
                    self._fail(request, NonFiniteLogits(_NAN), out)
                    break
                request.prompt_scores += scored

    def _sample(self, result: StepOutput, out: list[WorkerToGateway]) -> None:
        rows = [self._request_of[s].sample_row(s) if s in self._request_of else None for s in result.sampling]
        kept = [index for index, row in enumerate(rows) if row is not None]  # the others failed while scoring
        logits = result.logits if len(kept) == len(rows) else result.logits[kept]
        sampled = self._sampler.sample(logits, [row for row in rows if row is not None])
        for index, token in zip(kept, sampled, strict=True):
            sequence = result.sampling[index]
            request = self._request_of.get(sequence)
            if request is None:
                continue  # another choice of the same request has failed in this step
            if not token.ok:
                self._fail(request, NonFiniteLogits(_NAN), out)
                continue
            sequence.token_ids.append(token.token_id)
            delta = request.advance(sequence, token)
            out.append(delta)
            if delta.finish_reason is not None:
                self._end(sequence)

    def _account(self, work: list[Work], owners: list[Request], elapsed: float) -> None:
        self._num_steps += 1
        self._busy_s += elapsed
        per_token = elapsed / sum(item.num_tokens for item in work)
        for item, request in zip(work, owners, strict=True):
            request.device_s += per_token * item.num_tokens

    def _load(self, path: Path, digest: str) -> _LoadedAdapter:
        adapter = self._lora.load(path, digest)
        try:
            # An adapter may bring its own tokenizer and chat template, and rows for tokens of its own.
            own_size = adapter.vocab_size if adapter.vocab_size != self._lora.vocab_size else None
            text = TextCodec.from_directory(path, self._text, vocab_size=own_size)
        except AdapterInvalid:
            self._lora.unload(adapter)
            raise
        return _LoadedAdapter(adapter, text)

    # --- beginning and end of a request -------------------------------------------------------------------------

    def _accept(self, message: Generate) -> Request:
        text, vocab_size = self._text, self._lora.vocab_size
        if message.adapter is not None:
            entry = self._adapters.get(message.adapter)
            if entry is None or entry.retired:
                raise ModelNotFound(f"the adapter {message.adapter} is not loaded in this worker", param="model")
            text, vocab_size = entry.text, entry.adapter.vocab_size
        prompt_ids = text.encode(message.prompt)
        # A tokenizer may know more tokens than the model has rows for; the embedding would raise for everybody.
        if max(prompt_ids) >= vocab_size:
            raise InvalidRequest(
                f"token {max(prompt_ids)} is beyond the model's vocabulary of {vocab_size} tokens", param="prompt"
            )
        max_tokens = self._max_tokens(len(prompt_ids), message.sampling.max_tokens)
        request = Request(message, text, prompt_ids, max_tokens, submitted_at=self._clock())
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

    def _fail(self, request: Request, error: ServerlessLoraError, out: list[WorkerToGateway]) -> None:
        out.append(Failed(request.message.request_id, error.to_wire()))
        self._drop(request, forget=True)

    def _end(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._scheduler.remove(sequence, forget=forget)
        del self._request_of[sequence]

    def _drop(self, request: Request, *, forget: bool = False) -> None:
        for sequence in request.choices:
            if sequence.state is not SequenceState.ENDED:
                self._end(sequence, forget=forget)
        del self._requests[request.message.request_id]
        if request.adapter:
            self._adapters[request.adapter].num_requests -= 1
            self._free_if_unused(request.adapter)

    def _free_if_unused(self, digest: str) -> None:
        entry = self._adapters[digest]
        if entry.retired and entry.num_requests == 0:
            del self._adapters[digest]
            self._lora.unload(entry.adapter)

    def check(self) -> None:
        """Assert the invariants of every part; for tests."""
        self._scheduler.check()
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        assert set(queued) == set(self._request_of)
        for request in self._requests.values():
            assert not request.has_ended
        for digest, entry in self._adapters.items():
            assert entry.num_requests == sum(request.adapter == digest for request in self._requests.values())


_NAN = "the model produced numbers that are not finite for this request; its adapter or the backbone is damaged"
