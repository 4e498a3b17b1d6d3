"""An honest backend in memory: byte tokens, a "model" that prefers to transform its prompt, real sampling and stopping.

Everything the HTTP layer can see behaves as in the real server, so the conformance tests run against both.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import math
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from serverlesslora.demo import ADAPTER_NAMES, BASE, TASKS
from serverlesslora.errors import (
    AdapterInvalid,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Overloaded,
    ServerlessLoraError,
    WorkerLost,
)
from serverlesslora.gateway.backend import BackendStats, Cold, Event, GenerationRequest, Health, ModelCard
from serverlesslora.gateway.live_state import LiveFunction, LiveState, Spending
from serverlesslora_ipc.messages import (
    ChatPrompt,
    Delta,
    Embedding,
    Finished,
    FinishReason,
    Prompt,
    PromptEcho,
    SamplingParams,
    Started,
    TextPrompt,
    TokenLogprob,
)

EOS = 256
CONTEXT = 512
HIDDEN = 8
CREATED = 1_700_000_000
TEACHER = "teacher"  # repeats its prompt, whose template is one that knows tools and reasoning
TRANSFORMS = {"demo": TASKS[BASE]} | {name: TASKS[name] for name in ADAPTER_NAMES}


def digest_of(transform: str) -> str:
    return hashlib.sha256(transform.encode()).hexdigest()


def encode(prompt: Prompt) -> tuple[list[int], str]:
    """Token ids and the text to transform."""
    if isinstance(prompt, ChatPrompt):
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in prompt.messages)
        return list(text.encode()), str(prompt.messages[-1]["content"])
    if isinstance(prompt, TextPrompt):
        return list(prompt.text.encode()), prompt.text
    if any(token > EOS for token in prompt.token_ids):
        raise InvalidRequest("A token id is outside of the vocabulary.", param="prompt")
    ids = list(prompt.token_ids)
    return ids, bytes(token for token in ids if token != EOS).decode("utf-8", "replace")


def token_text(token: int) -> tuple[str, bytes]:
    raw = b"" if token == EOS else bytes([token])
    return raw.decode("utf-8", "replace") or "<eos>", raw


def embedding_of(transform: str, token_ids: list[int]) -> bytes:
    """Of length 1, and another one for every adapter and every text."""
    rng = random.Random(f"{transform}/{token_ids}")
    values = [rng.gauss(0, 1) for _ in range(HIDDEN)]
    length = math.sqrt(sum(each * each for each in values))
    return struct.pack(f"<{HIDDEN}f", *(each / length for each in values))


def logits_at(transform: str, position: int, target: int) -> dict[int, float]:
    """The target is likely; four neighbours, which depend on the adapter and the position, are possible."""
    rng = random.Random(f"{transform}/{position}/{target}")
    logits = {token: rng.uniform(0, 2) for token in rng.sample(range(97, 123), 4)}
    return logits | {target: 4.0}


def logprobs_of(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values())
    total = top + math.log(sum(math.exp(each - top) for each in logits.values()))
    return {token: each - total for token, each in logits.items()}


def describe(logprobs: dict[int, float], token: int, num_top: int) -> TokenLogprob:
    ranked = sorted(logprobs, key=lambda each: -logprobs[each])[:num_top]
    tops = tuple(TokenLogprob(each, token_text(each)[0], logprobs[each], token_text(each)[1]) for each in ranked)
    return TokenLogprob(token, token_text(token)[0], logprobs.get(token, -math.inf), token_text(token)[1], tops)


class Choice:
    """One sequence: sampling, decoding to text, stopping."""

    def __init__(self, index: int, transform: str, goal: str, sampling: SamplingParams) -> None:
        self.index = index
        self._transform = transform
        self._goal = [*goal.encode(), EOS]
        self._sampling = sampling
        self._seed = f"{sampling.seed}/{index}"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def step(self, request_id: str) -> Delta:
        sampling = self._sampling
        position = self.tokens
        logits = logits_at(self._transform, position, self._goal[min(position, len(self._goal) - 1)])
        for token, bias in sampling.logit_bias.items():
            logits[token] = logits.get(token, -20.0) + bias
        logprobs = logprobs_of(logits)
        if sampling.temperature == 0:
            token = max(logprobs, key=lambda each: logprobs[each])
        else:
            best = max(logprobs.values())  # which must keep its weight, however cold it is
            weights = [math.exp((each - best) / sampling.temperature) for each in logprobs.values()]
            token = random.Random(f"{self._seed}/{position}").choices(list(logprobs), weights)[0]
        self.tokens += 1
        stop_reason: str | int | None = None
        if token == EOS and not sampling.ignore_eos and self.tokens > sampling.min_tokens:
            self.finish_reason = "stop"
        elif token in sampling.stop_token_ids:
            self.finish_reason, stop_reason = "stop", token
        else:
            self._held += self._decoder.decode(b"" if token == EOS else bytes([token]))
        text, hit = self._release()
        if hit is not None:
            self.finish_reason, stop_reason = "stop", hit
        elif self.finish_reason is None and self.tokens == sampling.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and hit is None:
            text, self._held = text + self._held, ""
        described = None if sampling.logprobs is None else (describe(logprobs, token, sampling.logprobs),)
        return Delta(request_id, self.index, text, (token,), described, self.finish_reason, stop_reason)

    def _release(self) -> tuple[str, str | None]:
        """Text that cannot become part of a stop string, and the stop string that was met."""
        for stop in self._sampling.stop:
            if (place := self._held.find(stop)) >= 0:
                end = place + len(stop) if self._sampling.include_stop_str_in_output else place
                return self._held[:end], stop
        keep = max(
            (size for stop in self._sampling.stop for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text, None


class FakeGeneration:
    def __init__(self, backend: FakeBackend, request: GenerationRequest, transform: str, digest: str | None) -> None:
        self.digest = digest
        self.version = None if digest is None else 1
        self.cold = Cold("hot")
        self._backend = backend
        self._request = request
        self._transform = transform
        self.finished = False

    async def started(self) -> Started:
        sampling = self._request.sampling
        self._ids, text = encode(self._request.prompt)
        if self._request.model == "cold":
            await self._backend.thaw.wait()
            self.cold = Cold("worker", (("worker", 0.0123), ("adapter", 0.0045)))
        if self._request.model == "busy":
            raise Overloaded("Too many requests are waiting.", retry_after_s=7)
        total = len(self._ids) + (sampling.max_tokens or 0)
        if total > CONTEXT or not self._ids:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {CONTEXT} tokens, but {total} were requested.",
                param="messages" if isinstance(self._request.prompt, ChatPrompt) else "prompt",
            )
        if sampling.max_tokens is None:
            self._request_limit = CONTEXT - len(self._ids)
        else:
            self._request_limit = sampling.max_tokens
        goal = TRANSFORMS[self._transform](text)
        self._choices = [Choice(index, self._transform, goal, sampling) for index in range(self._request.n)]
        if self._request.model == TEACHER:
            return Started("fake", len(self._ids), tool_format="hermes", reasoning_tags=("<think>", "</think>"))
        return Started("fake", len(self._ids))

    async def __aiter__(self) -> AsyncIterator[Event]:
        sampling, ids = self._request.sampling, self._ids
        if self._request.echo:
            text = bytes(token for token in ids if token != EOS).decode("utf-8", "replace")
            strs = tuple(token_text(token)[0] for token in ids) if self._request.token_strs else None
            yield PromptEcho("fake", text, tuple(ids), self._prompt_logprobs(), strs)
        if self._request.pooling is not None:
            self.finished = True
            yield Embedding("fake", embedding_of(self._transform, ids))
            yield Finished("fake", len(ids), 0)
            return
        steps = 0
        for _ in range(self._request_limit):
            for choice in self._choices:
                if choice.finish_reason is None:
                    await asyncio.sleep(0)
                    if self._request.model == "slow" and steps:
                        await self._backend.thaw.wait()
                    if self._request.model == "broken" and steps == 2:
                        raise WorkerLost("The worker ended while the request was running.")
                    steps += 1
                    yield choice.step("fake")
        for choice in self._choices:
            if choice.finish_reason is None:
                yield Delta("fake", choice.index, "", finish_reason="length")
        self.finished = True
        yield Finished("fake", len(ids), sum(choice.tokens for choice in self._choices))
        assert sampling is self._request.sampling

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        num_top = self._request.sampling.prompt_logprobs
        if num_top is None:
            return None
        rest = [
            describe(logprobs_of(logits_at(self._transform, place, token)), token, num_top)
            for place, token in enumerate(self._ids[1:])
        ]
        return (None, *rest)


class FakeBackend:
    """Models "slow", "cold", "broken" and "busy" misbehave on demand; `thaw` lets the first two go on."""

    def __init__(self) -> None:
        self._cards = {"demo": ModelCard("demo", "demo", None, CREATED, CONTEXT)}
        self._transforms = {"demo": "demo"}
        for name in ADAPTER_NAMES:
            self._add(name, name, name)
        for name in ("slow", "cold", "broken", "busy", "org/name"):
            self._add(name, "upper", name)
        self._add(TEACHER, "demo", TEACHER)
        self.thaw = asyncio.Event()
        self.running = 0
        self.aborted = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.requests: list[GenerationRequest] = []

    def _add(self, name: str, transform: str, root: str, tenant: str | None = None) -> ModelCard:
        card = self._cards[name] = ModelCard(name, root, "demo", CREATED, CONTEXT, digest_of(transform), tenant)
        self._transforms[name] = transform
        return card

    def give(self, name: str, tenant: str) -> None:
        self._add(name, self._transforms[name], name, tenant)

    def thaw_from_outside(self) -> None:
        """For tests, whose thread is not the server's."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.thaw.set)

    def models(self) -> list[ModelCard]:
        return list(self._cards.values())

    def model(self, name: str) -> ModelCard:
        if name not in self._cards:
            raise ModelNotFound(f"The model '{name}' does not exist.", param="model")
        return self._cards[name]

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[FakeGeneration]:
        card = self.model(request.model)
        self.requests.append(request)
        generation = FakeGeneration(self, request, self._transforms[request.model], card.digest)
        self.running += 1
        self._loop = asyncio.get_running_loop()
        failed = False
        try:
            yield generation
        except ServerlessLoraError:
            failed = True
            raise
        finally:
            self.aborted += not (generation.finished or failed)
            self.running -= 1

    async def load_adapter(self, name: str, path: str, *, in_place: bool, tenant: str | None) -> ModelCard:
        return self._load(name, path, tenant)

    def _load(self, name: str, path: str, tenant: str | None) -> ModelCard:
        if not Path(path).is_dir():
            raise NotFound("No adapter was found at 'lora_path'.", param="lora_path")
        if not (Path(path) / "adapter_config.json").is_file():
            raise AdapterInvalid("The directory holds no adapter_config.json.", param="lora_path")
        return self._add(name, Path(path).name, Path(path).name, tenant)

    async def unload_adapter(self, name: str) -> None:
        self.model(name)
        del self._cards[name], self._transforms[name]

    def stats(self) -> BackendStats:
        return BackendStats(self.running, 0, 0.25, 8, ("upper", "rot13"), ("cold",))

    def live(self) -> LiveState:
        return LiveState(
            functions=tuple(
                LiveFunction(card.id, card.parent, f"{card.parent}/{card.tenant or card.id}", tenant=card.tenant)
                for card in self._cards.values()
                if card.parent is not None
            )
        )

    def watch(self, spending: Spending) -> None:
        """Nothing costs anything here."""

    def health(self) -> Health:
        return Health(detail={"backbones": ["demo"]})
