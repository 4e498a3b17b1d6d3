"""Every message that crosses a process boundary, as frozen tagged structs.

A frame carries a *list* of messages (see `frames`), so one engine step costs one write however many requests it moved.
New fields go last and have a default: an older peer must still be able to read the message.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, array_like=False):
    """Base of all wire types; the tag is the class name."""


# --- what a request asks for -------------------------------------------------------------------------------------


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an output must match. It is compiled in the worker, against the vocabulary its function has."""

    kind: Literal["json_schema", "regex", "choice", "lark", "gbnf", "tools"]
    text: str  # the schema, the choices or the tools (see `tool_grammar`) as JSON, or the source of the others
    param: str | None = None  # the part of the request that carried it, for a refusal


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen and when a sequence ends. Ranges are checked at the API; the worker trusts them."""

    max_tokens: int | None = None  # None: up to the context limit
    min_tokens: int = 0  # eos and stop conditions are masked before this many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 is off; covers prompt and output, as in transformers
    logit_bias: dict[int, float] = {}
    seed: int = 0  # the gateway draws one when the client gives none
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives per output token; None is off, 0 is the chosen token only
    prompt_logprobs: int | None = None  # the same for prompt tokens
    skip_special_tokens: bool = True
    grammar: Grammar | None = None


class TextPrompt(Message, frozen=True, tag="text"):
    text: str
    add_special_tokens: bool = True


class TokensPrompt(Message, frozen=True, tag="tokens"):
    token_ids: tuple[int, ...]


class ChatPrompt(Message, frozen=True, tag="chat"):
    """Messages in OpenAI's shape with `content` already flattened to text; rendered inside the worker."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}


Prompt = TextPrompt | TokensPrompt | ChatPrompt


# --- gateway -> worker -------------------------------------------------------------------------------------------


class LoadAdapter(Message, frozen=True):
    """Load the adapter stored under `path` (a private, digest-addressed directory); answered by Loaded or Refused."""

    digest: str
    path: str


class UnloadAdapter(Message, frozen=True):
    """Forget the adapter once its last running request has ended."""

    digest: str


class Generate(Message, frozen=True):
    request_id: str
    adapter: str | None  # digest; None is the bare backbone
    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    echo: bool = False  # send the prompt back (as PromptEcho) before the output
    # Of CLOCK_MONOTONIC, which all processes of a host share, seconds: a request that has not begun by then fails.
    deadline: float | None = None
    pooling: Literal["last", "mean"] | None = None  # nothing is generated: the prompt's Embedding is the answer
    token_strs: bool = False  # of an echo: each token as the vocabulary writes it


class Abort(Message, frozen=True):
    """Answered by Aborted, unless the request has ended already: then its end is on the way."""

    request_id: str


class Shutdown(Message, frozen=True):
    """Leave now; the sender has nothing in flight."""


GatewayToWorker = LoadAdapter | UnloadAdapter | Generate | Abort | Shutdown


# --- worker -> gateway -------------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """First message of a worker: it has the backbone and can serve.

    What its start took is told in parts that do not overlap; what was done before anybody asked for it counts nothing.
    """

    pid: int
    attach_s: float  # seconds for everything the parts below do not name
    device: str = "cpu"  # its kind, and its name where it has one
    graphs: str = ""  # on a device: whether decode steps are replayed as graphs, and why not
    libraries_s: float = 0.0  # a process without a launcher: from its start until everything was imported
    load_s: float = 0.0  # its own copy of the backbone, from disk
    copy_s: float = 0.0  # its own copy of the backbone, from memory
    was_spare: bool = False  # it had rehearsed before it was given its domain


class Loaded(Message, frozen=True):
    digest: str
    seconds: float
    size_bytes: int
    rank: int = 0  # the largest rank in the adapter
    modules: int = 0  # how many backbone modules it changes
    kinds: tuple[str, ...] = ()  # what it holds besides plain LoRA: "dora", "bias", "modules_to_save", ...


class Refused(Message, frozen=True):
    """The adapter cannot be served; `reason` is written for its owner."""

    digest: str
    reason: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    token: str
    logprob: float
    utf8: bytes
    top: tuple[TokenLogprob, ...] = ()  # alternatives, most probable first


class Started(Message, frozen=True):
    """The request was admitted: its prompt is valid and its prefill is scheduled."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int = 0
    tool_format: str = ""  # how this function's template teaches to call tools; empty: not known
    reasoning_tags: tuple[str, str] | None = None  # what encloses reasoning in the output, where the template knows it
    reasoning_open: bool = False  # the prompt ended with the first of them: the output begins inside


class PromptEcho(Message, frozen=True):
    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...] | None = None  # first entry is None: nothing predicts the first token
    token_strs: tuple[str, ...] | None = None  # as asked for


class Delta(Message, frozen=True):
    """New output of one choice. `text` may be empty while a character or a possible stop string is incomplete."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # which stop string or token id ended it


class Embedding(Message, frozen=True):
    """The pooled hidden state of a prompt, of length 1 in the Euclidean norm."""

    request_id: str
    vector: bytes  # [hidden] float32, little endian


# Every request a worker was given ends in exactly one of Finished, Failed and Aborted, and each says what it has cost.


class Spent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request has cost until its end. The `device_s` of all requests of a worker add up to its `busy_s`."""

    prompt_tokens: int = 0  # 0: it was refused before its prompt was known
    completion_tokens: int = 0  # that were produced, also where nobody got to read them
    cached_tokens: int = 0
    queue_s: float = 0.0  # until its prefill began, or until its end if it never did
    device_s: float = 0.0  # its share of the steps it had rows in
    first_token_s: float = 0.0  # from its arrival in the worker to its first token; 0: there was none


class Finished(Message, frozen=True):
    """All choices have ended; nothing more will be said about this request."""

    request_id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    device_s: float = 0.0  # this request's share of the steps it took part in
    first_token_s: float = 0.0

    @property
    def spent(self) -> Spent:
        return Spent(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            queue_s=self.queue_s,
            device_s=self.device_s,
            first_token_s=self.first_token_s,
        )


class WireError(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as the client will see it: see `serverlesslora.errors`."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None


class Failed(Message, frozen=True):
    request_id: str
    error: WireError
    spent: Spent = Spent()


class Aborted(Message, frozen=True):
    """The answer to Abort for a request that was open."""

    request_id: str
    spent: Spent = Spent()


class StepSums(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sums over steps of one kind, from which T = a + b·x can be fitted by least squares; differences of two of
    them are the sums of the steps between."""

    n: int = 0
    sum_x: float = 0.0  # x: rows, or prompt tokens
    sum_xx: float = 0.0
    sum_t: float = 0.0  # t: seconds
    sum_xt: float = 0.0


class Stats(Message, frozen=True):
    """Sent when something changed, at most a few times a second."""

    running: int
    waiting: int
    kv_used_blocks: int
    kv_total_blocks: int
    adapters: tuple[str, ...]
    adapter_bytes: int
    steps: int = 0
    busy_s: float = 0.0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    decode: StepSums = StepSums()  # steps in which every sequence had one row; x = rows
    prefill: StepSums = StepSums()  # steps of one prefilling sequence and nothing else; x = prompt tokens computed
    lease_wait_s: float = 0.0  # for turns on the device, while there was work
    kv_bytes: int = 0  # memory behind keys and values: what was ever written to on cpu, what is mapped on a device


WorkerToGateway = (
    Ready | Loaded | Refused | Started | PromptEcho | Embedding | Delta | Finished | Failed | Aborted | Stats
)


# --- gateway <-> backbone host -----------------------------------------------------------------------------------


class Progress(Message, frozen=True):
    """Loading a backbone is under way: bytes placed so far of the total."""

    done_bytes: int
    total_bytes: int


Sharing = Literal["memfd", "vmm", "vmm-writable", "cuda-ipc"]
"""How workers see the backbone:

- `memfd`: sealed host memory, mapped read-only; the kernel refuses writes.
- `vmm`: device memory from a descriptor, mapped read-only; the device refuses writes.
- `vmm-writable`: the same, but this driver has no read-only access; the digest is verified while idle.
- `cuda-ipc`: device memory by legacy IPC handle (no descriptors here), writable; the digest is verified while idle.
"""


class Published(Message, frozen=True):
    """The backbone is sealed; the read-only fd and then the manifest fd travel with this frame.

    With `cuda-ipc` there is no weights fd: `handle` takes its place.
    """

    size_bytes: int
    layout_digest: str
    content_digest: str
    seconds: float
    sharing: Sharing = "memfd"
    handle: bytes = b""
    libraries_s: float = 0.0  # of `seconds`: importing what loads


class BackboneFailed(Message, frozen=True):
    reason: str


class Adopt(Message, frozen=True):
    """To a restarted host: hold these (the two fds travel with the frame) instead of loading again."""


class Attach(Message, frozen=True):
    """Ask for the fds again; answered by Published."""


class Verify(Message, frozen=True):
    """Recompute the content digest from the memory itself; answered by Verified."""


class Verified(Message, frozen=True):
    content_digest: str
    intact: bool


GatewayToHost = Adopt | Attach | Verify | Shutdown
HostToGateway = Progress | Published | BackboneFailed | Verified


# --- gateway <-> launcher ----------------------------------------------------------------------------------------


class Prepared(Message, frozen=True):
    """The backbone is there and can be served, in the launcher or in a process that becomes a worker by itself."""

    seconds: float  # since Prepare
    context_length: int
    vocab_size: int
    kv_bytes_per_token: int = 0
    libraries_s: float = 0.0  # before Prepare: from the start of the process until everything was imported
    size_bytes: int = 0  # of the backbone


class WorkerLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    threads: int
    kv_bytes: int  # upper bound of the KV cache
    max_running: int = 32  # sequences in one step
    max_step_tokens: int = 512  # prefill chunk budget of one step
    block_size: int = 16
    prefix_cache: bool = True
    max_model_len: int | None = None


class Prepare(Message, frozen=True):
    """Map this backbone and build its module tree; the weights fd and the manifest fd travel with the frame.

    To a process that loads a backbone of its own it comes without them.
    """

    backbone: str
    num_spares: int = 0  # workers kept forked and rehearsed before anybody asks for one
    limits: WorkerLimits | None = None  # what spares rehearse with
    sharing: Sharing = "memfd"  # as the host published it
    handle: bytes = b""


class Fork(Message, frozen=True):
    """Make a worker, or become it; its channel to the gateway travels with the frame."""

    worker_id: str
    domain: str
    limits: WorkerLimits
    may_be_spare: bool = True  # False: nobody waits for its first token, leave the spares to those who do


class Forked(Message, frozen=True):
    worker_id: str
    pid: int


class Exited(Message, frozen=True):
    worker_id: str
    pid: int
    status: int  # exit code, or minus the signal that ended it


class LauncherFailed(Message, frozen=True):
    reason: str
    worker_id: str | None = None  # set when only this worker could not be made and the launcher goes on


GatewayToLauncher = Prepare | Fork | Shutdown
LauncherToGateway = Prepared | Forked | Exited | LauncherFailed
