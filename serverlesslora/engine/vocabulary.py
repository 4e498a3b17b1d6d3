"""What single tokens stand for: their bytes where the tokenizer works on bytes, their text elsewhere.

Three kinds of tokenizers exist. *Byte-level* ones (GPT-2's alphabet: Llama 3, Qwen, ...) map every token to bytes, and
text is the UTF-8 decoding of their concatenation. *Byte-fallback* ones (SentencePiece: Llama 2, Mistral, Gemma, ...)
have 256 extra tokens `<0x00>` to `<0xFF>` for characters they do not know. *Opaque* ones are only asked to decode.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """Build it once per tokenizer: its tables are made on first use and kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = self._tokenizer = tokenizer
        self._shown: dict[int, str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included; spaces stay as they are because clean-up cannot be incremental."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) or ""
        )

    def has(self, token: str) -> bool:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        return token_id is not None and self._tokenizer.convert_ids_to_tokens(token_id) == token

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def raw_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that is made of bytes, None for one that only has text."""
        if not self.is_byte_level:
            return self._fallback_bytes.get(token_id)
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not token:
            return b""  # a padding row of the model's vocabulary
        try:
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
        except KeyError:  # an added token that is not spelled in the byte alphabet is its own text
            return str(token).encode("utf-8", "replace")

    def text(self, token_id: int) -> str:
        """What the token looks like inside a text (with its leading space); U+FFFD where it is part of a character."""
        shown = self._shown.get(token_id)
        if shown is None:
            shown = self._shown[token_id] = self._text(token_id)
        return shown

    def utf8(self, token_id: int) -> bytes:
        """The bytes the token adds to the output: concatenated over an output they are its UTF-8."""
        raw = self.raw_bytes(token_id)
        return self.text(token_id).encode("utf-8", "replace") if raw is None else raw

    def spellings(self, size: int) -> list[bytes]:
        """`utf8` of the ids from 0 to `size`, in a fraction of the time that asking one by one takes."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self.is_byte_level or backend is None:
            return [self.utf8(token_id) for token_id in range(size)]
        before = self.decode(self.anchor)
        wholes = backend.decode_batch([[*self.anchor, token_id] for token_id in range(size)], skip_special_tokens=False)
        return [
            self._fallback_bytes.get(token_id) or whole[len(before) :].encode("utf-8", "replace")
            if whole.startswith(before)
            else self.utf8(token_id)
            for token_id, whole in enumerate(wholes)
        ]

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def _text(self, token_id: int) -> str:
        raw = self.raw_bytes(token_id)
        if raw is not None:
            return raw.decode("utf-8", "replace")
        return self.text_after(self.anchor, [token_id])

    def text_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to a text that ends with `context`: decoders treat the beginning of a text differently."""
        before, whole = self.decode(context), self.decode([*context, *ids])
        if whole.startswith(before):
            return whole[len(before) :]
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        return whole[shared:]

    @cached_property
    def anchor(self) -> list[int]:
        """A context that is a plain letter, to see tokens as they look in the middle of a text."""
        for token_id, raw in self._fallback_bytes.items():
            if raw == b"a":
                return [token_id]
        return list(self._tokenizer.encode("a", add_special_tokens=False))[-1:]

    @cached_property
    def is_byte_level(self) -> bool:
        return self._decoder_kind == "ByteLevel"

    @cached_property
    def _decoder_kind(self) -> str | None:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        if decoder is None:
            return None
        kind = json.loads(decoder.__getstate__()).get("type")
        return str(kind)

    @cached_property
    def _fallback_bytes(self) -> dict[int, bytes]:
        """Ids of the 256 byte tokens, empty if the tokenizer does not have or not decode them."""
        if self.is_byte_level:
            return {}
        unknown = self._tokenizer.unk_token_id
        ids = self._tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        if None in ids or unknown in ids or self.decode(ids[0x61:0x62]) != "a":
            return {}
        return {token_id: bytes([byte]) for byte, token_id in enumerate(ids)}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset(i for i, token in added.items() if token.special) | frozenset(self._tokenizer.all_special_ids)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are themselves, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
