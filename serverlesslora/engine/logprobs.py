"""Log-probabilities as clients read them: ids with their text and bytes."""

from __future__ import annotations

from serverlesslora.engine.sampler import Sampled
from serverlesslora.engine.vocabulary import Vocabulary
from serverlesslora_ipc.messages import TokenLogprob


def token_logprob(sampled: Sampled, vocabulary: Vocabulary) -> TokenLogprob:
    """For a token that was sampled (or scored) with `logprobs`; `top` may or may not hold the token itself."""
    assert sampled.ok
    assert sampled.logprob is not None
    top = tuple(_entry(vocabulary, token_id, logprob) for token_id, logprob in sampled.top)
    return _entry(vocabulary, sampled.token_id, sampled.logprob, top)


def _entry(vocabulary: Vocabulary, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    # JSON has no infinity: an impossible prompt token is reported with the smallest float32 (vLLM uses -9999).
    return TokenLogprob(
        token_id=token_id,
        token=vocabulary.text(token_id),
        logprob=max(logprob, LOWEST),
        utf8=vocabulary.utf8(token_id),
        top=top,
    )


LOWEST = -9999.0
