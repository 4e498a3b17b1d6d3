"""What the HTTP layer needs from the rest of the gateway: models, generations, adapters and a few numbers.

The HTTP layer knows nothing of workers, domains or backbones; the fleet knows nothing of HTTP. They meet here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

import msgspec

from serverlesslora.gateway.live_state import LiveState, Spending
from serverlesslora.registry.names import bare
from serverlesslora.tenancy.key import Limits
from serverlesslora_ipc.messages import (
    ChatPrompt,
    Delta,
    Embedding,
    Finished,
    Prompt,
    PromptEcho,
    SamplingParams,
    Started,
    TokensPrompt,
)

CHARACTERS_PER_TOKEN = 4  # of English text with a large vocabulary; only a guess until the worker has counted

Rung = Literal["hot", "adapter-ram", "adapter-disk", "worker", "backbone", "remote"]
RUNGS: tuple[Rung, ...] = ("hot", "adapter-ram", "adapter-disk", "worker", "backbone", "remote")  # warm to cold


class ModelCard(msgspec.Struct, frozen=True):
    """A name that `model` may take: a backbone (no parent) or a function."""

    id: str
    root: str  # where it came from; never a path of the private store
    parent: str | None
    created: int
    max_model_len: int | None
    digest: str | None = None  # of the adapter; None for a backbone
    tenant: str | None = None
    limits: Limits = Limits()  # of the function, whoever asks it
    version: int | None = None  # of the function; None for a backbone

    @property
    def name(self) -> str:
        """Whose rights, limits and accounts these are: without the version that `id` may name."""
        return self.id if self.parent is None else bare(self.id)


class Cold(msgspec.Struct, frozen=True):
    """The rung of the cold-start ladder a request met, and what each part of the climb took in seconds."""

    rung: Rung = "hot"
    parts: tuple[tuple[str, float], ...] = ()


class GenerationRequest(msgspec.Struct, frozen=True):
    """One prompt for one model. `request_id` is the HTTP request's, for logs; it is not unique per generation."""

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    echo: bool = False  # a PromptEcho comes before any Delta
    is_batch: bool = False  # one of many prompts of one call: nobody waits for its first token alone
    slo_ttft_s: float | None = None  # what this client asks for; None: the function's objective
    pooling: Literal["last", "mean"] | None = None  # an Embedding is the answer, nothing is generated
    token_strs: bool = False  # the PromptEcho tells each token's string
    user: str | None = None  # whom the request is for, as its sender tells: one user stays on one version


def estimated_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, TokensPrompt):
        return len(prompt.token_ids)
    if isinstance(prompt, ChatPrompt):
        size = sum(_size(message) for message in prompt.messages)
        size += len(msgspec.json.encode(prompt.tools)) if prompt.tools else 0
    else:
        size = len(prompt.text)
    return size // CHARACTERS_PER_TOKEN + 1


def _size(message: dict[str, Any]) -> int:
    """Characters of what a template writes down."""
    size = len(str(message.get("content") or "")) + len(str(message.get("reasoning_content") or ""))
    calls = message.get("tool_calls")
    return size + len(msgspec.json.encode(calls)) if calls else size


Event = PromptEcho | Embedding | Delta | Finished


class Generation(Protocol):
    """A request under way. It ends with Finished or raises a ServerlessLoraError."""

    @property
    def digest(self) -> str | None:
        """Of the adapter that answers; fixed when the request was accepted."""

    @property
    def version(self) -> int | None:
        """Of the function; fixed as well, None for a backbone."""

    @property
    def cold(self) -> Cold:
        """What is known by now; complete once started."""

    async def started(self) -> Started:
        """Wait until the prompt is known to be valid and its prefill is scheduled, or raise."""

    def __aiter__(self) -> AsyncIterator[Event]: ...


class BackendStats(msgspec.Struct, frozen=True):
    """A snapshot for /metrics; reading it must not wait for anything."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # 0..1, of the blocks of all workers
    max_adapters: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    held_bytes: int = 0  # by backbones, processes, adapters and KV
    capacity_bytes: int = 0
    memory: tuple[tuple[str, int], ...] = ()  # bytes by kind
    workers: tuple[tuple[str, int], ...] = ()  # how many by state
    domains: tuple[tuple[str, int, int], ...] = ()  # kind of domain, running, waiting
    kv_blocks: int = 0
    kv_block_size: int = 0  # tokens
    preemptions: int = 0  # since the start, like the next two, also of workers that are gone
    prefix_queries: int = 0  # tokens looked up in prefix caches
    prefix_hits: int = 0  # tokens found there
    currency: str = ""


class Health(msgspec.Struct, frozen=True):
    """`alive` False makes /health answer 503; `ready` False only /ready."""

    alive: bool = True
    ready: bool = True
    detail: dict[str, Any] = {}


class Models(Protocol):
    """What can be asked."""

    def models(self) -> list[ModelCard]: ...

    def model(self, name: str) -> ModelCard:
        """Raises ModelNotFound."""

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Entering returns at once (or raises ModelNotFound, Overloaded, RateLimited); leaving it unfinished aborts
        the request with a call that never waits, so that it is safe while a task is being cancelled."""


class Backend(Models, Protocol):
    """Everything behind the HTTP layer."""

    async def load_adapter(self, name: str, path: str, *, in_place: bool, tenant: str | None) -> ModelCard:
        """Raises NotFound when nothing is at `path`, AdapterInvalid when it cannot be served."""

    async def unload_adapter(self, name: str) -> None:
        """Raises ModelNotFound."""

    def stats(self) -> BackendStats: ...

    def live(self) -> LiveState:
        """What is where now; must not wait for anything."""

    def watch(self, spending: Spending) -> None:
        """From now on `spending` hears of all that is spent."""

    def health(self) -> Health: ...
