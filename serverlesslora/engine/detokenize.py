"""Text of a growing token sequence, piece by piece, never half a character.

Byte-level tokens go through an incremental UTF-8 decoder, which is exact and needs no look-back. Byte-fallback tokens
do the same for each run of them, other tokens are decoded after the piece before them (the *context*), which keeps
the leading space that SentencePiece drops at the beginning of a text. Where a broken run follows complete
characters, tokenizers replace the whole run by U+FFFD; the characters were sent already and we keep them. The
`DecodeStream` of the tokenizers library raises in that case and loses an incomplete end, so it is not used here.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serverlesslora.engine.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"

# An opaque tokenizer's text that ends in U+FFFD may be half a character, but not for longer than this many tokens.
MOST_PENDING = 8


class Detokenizer:
    """Continues the text of `prompt_ids`; the text pushed so far plus `flush()` is what they add to it.

    Pass the tokenizer's `Vocabulary` where one exists (`TextCodec.vocabulary`): its tables are then shared.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Vocabulary,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`shown_ids` are special tokens that are text all the same."""
        self._vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        self._skip_special = skip_special_tokens
        self._shown_ids = shown_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # last final piece
        self._pending: list[int] = []  # opaque tokens whose text may be incomplete
        self._prompt_is_open = False  # the prompt ended inside a character
        self._enter(prompt_ids)

    def push(self, token_id: int) -> str:
        """Text that is now certain."""
        if self._is_hidden(token_id):
            return ""
        raw = self._vocabulary.raw_bytes(token_id)
        if raw is not None:
            return self._push_bytes(token_id, raw)
        return self._close_bytes() + self._push_text(token_id)

    def flush(self) -> str:
        """The rest at the end of the sequence; an incomplete character becomes U+FFFD."""
        return self._close_bytes() + self._close_text()

    def _is_hidden(self, token_id: int) -> bool:
        return self._skip_special and self._vocabulary.is_special(token_id) and token_id not in self._shown_ids

    def _enter(self, prompt_ids: Sequence[int]) -> None:
        """Only the end of the prompt matters: its last piece, and its last bytes if they are half a character."""
        tail: list[int] = []
        for token_id in reversed(prompt_ids):
            if not self._is_hidden(token_id):
                tail.append(token_id)
            if len(tail) == 4:  # UTF-8 synchronises itself: four bytes back is always enough
                break
        if not tail:
            return
        raws = [self._vocabulary.raw_bytes(token_id) for token_id in tail]
        trailing = raws[: raws.index(None)] if None in raws else raws
        if not trailing:
            self._context = tail[:1]
            return
        self._utf8.decode(b"".join(raw for raw in reversed(trailing) if raw is not None))
        self._prompt_is_open = bool(self._utf8.getstate()[0])
        if not self._vocabulary.is_byte_level:
            self._context = self._vocabulary.anchor

    def _push_bytes(self, token_id: int, raw: bytes) -> str:
        text = self._close_text() if self._pending else ""
        decoded = self._after_prompt(self._utf8.decode(raw))
        if decoded and not self._vocabulary.is_byte_level:
            if not self._context and decoded.startswith(" "):
                # Whether a text loses its first space is the decoder's decision; the token is a whole character here.
                decoded = self._vocabulary.decode([token_id])
            # A broken run must not be decoded again with what follows; the anchor stands for "not the beginning".
            self._context = self._vocabulary.anchor
        return text + decoded

    def _close_bytes(self) -> str:
        text = self._after_prompt(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        if text:
            self._context = self._vocabulary.anchor if not self._vocabulary.is_byte_level else []
        return text

    def _after_prompt(self, text: str) -> str:
        if not text or not self._prompt_is_open:
            return text
        # The half character that the prompt ended with is shown by the prompt if the output did not complete it.
        self._prompt_is_open = False
        return text.removeprefix(REPLACEMENT)

    def _push_text(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._vocabulary.text_after(self._context, self._pending)
        if not text or (text.endswith(REPLACEMENT) and len(self._pending) < MOST_PENDING):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _close_text(self) -> str:
        if not self._pending:
            return ""
        text = self._vocabulary.text_after(self._context, self._pending)
        self._context, self._pending = self._pending, []
        return text
