"""Log-probabilities in the two shapes OpenAI has for them, and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from serverlesslora_ipc.messages import TokenLogprob

LOWEST = -9999.0  # JSON has no -inf


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


class ChatTopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                each.token,
                finite(each.logprob),
                list(each.utf8),
                [ChatTopLogprob(top.token, finite(top.logprob), list(top.utf8)) for top in each.top],
            )
            for each in tokens
        ]
    )


class CompletionLogprobs(msgspec.Struct):
    """Grows token by token: `text_offset` counts from the beginning of the choice, across stream chunks."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def extend(self, tokens: Sequence[TokenLogprob | None], offset: int, unknown: str = "") -> int:
        """Append `tokens`, the first at `offset`; returns the next offset. None is a token that nothing predicted."""
        for each in tokens:
            text = unknown if each is None else each.token
            self.tokens.append(text)
            self.token_logprobs.append(None if each is None else finite(each.logprob))
            self.top_logprobs.append(None if each is None else _by_text(each))
            self.text_offset.append(offset)
            offset += len(text)
        return offset


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The alternatives and the token itself; where two tokens read the same the more probable one stays."""
    by_text = {each.token: finite(each.logprob) for each in reversed(token.top)}
    by_text[token.token] = max(finite(token.logprob), by_text.get(token.token, LOWEST))
    return by_text


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


def prompt_logprobs(tokens: Sequence[TokenLogprob | None]) -> PromptLogprobs:
    """vLLM's extension: for every prompt token its own and the most probable alternatives, by token id."""
    return [None if each is None else _by_id(each) for each in tokens]


def _by_id(token: TokenLogprob) -> dict[str, PromptLogprob]:
    ranked = {
        str(each.token_id): PromptLogprob(finite(each.logprob), rank, each.token)
        for rank, each in enumerate(token.top, start=1)
    }
    ranked.setdefault(str(token.token_id), PromptLogprob(finite(token.logprob), None, token.token))
    return ranked
