"""What is going to be sent, complete before the first request leaves: bytes, times, and what to hold the answers to."""

from __future__ import annotations

from typing import Literal

import msgspec

Endpoint = Literal["completions", "chat"]
PromptStyle = Literal["ids", "text"]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server and how it is spoken to."""

    url: str  # without /v1
    endpoint: Endpoint = "completions"
    prompt: PromptStyle = "ids"  # ids: exact lengths, for servers that take token ids; text: for all others
    token_ids: tuple[int, int] = (300, 4000)  # made-up prompts are drawn from [low, high)
    tokens_per_word: float = 1.0  # of made-up text, for lengths
    temperature: float = 0.0
    ignore_eos: bool = True  # ask for exactly `output_length` tokens, and hold the server to it
    token_counts: bool = True  # ask for token ids in events (`return_token_ids`), to count them
    headers: dict[str, str] = {}
    cold_header: str = "x-serverlesslora-cold"
    deadline_header: str | None = None  # such as x-slo-ttft-ms; None: deadlines are not told
    timeout_s: float = 600.0
    stall_s: float = 60.0


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    at_s: float  # after the start of the run
    model: str
    class_: str | None = None
    body: bytes
    input_tokens: int
    output_tokens: int
    headers: dict[str, str] = {}
    deadline_s: float | None = None
    golden: str | None = None  # the text that must come


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process is given."""

    target: Target
    requests: tuple[Planned, ...]
    concurrency: int | None = None  # closed loop: as many at a time as this, times ignored; None: open loop
