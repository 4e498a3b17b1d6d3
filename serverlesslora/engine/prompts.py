"""From prompts to token ids, with the tokenizer and chat template of a backbone or of an adapter that has its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from serverlesslora.engine import chat_template
from serverlesslora.engine.detokenize import Detokenizer
from serverlesslora.engine.dialect import Dialect, dialect_of
from serverlesslora.engine.tokenizer_files import TokenizerFiles
from serverlesslora.engine.vocabulary import Vocabulary
from serverlesslora.errors import AdapterInvalid, ContextLengthExceeded, InvalidRequest
from serverlesslora_ipc.messages import ChatPrompt, Prompt, TextPrompt, TokensPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text that needs fewer tokens than one for this many characters is not a prompt (English has 4, runs of spaces more):
# such a text is refused before the tokenizer has to walk through megabytes of it.
MAX_CHARS_PER_TOKEN = 32

_TAIL = 32  # tokens at the end of a prompt that hold an opening tag and the white space behind it, even byte by byte


class TextCodec:
    """Build the backbone's once, before workers are forked; `from_directory` derives an adapter's from it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation_eos_ids: Iterable[int] = (),
        *,
        context_length: int = 1 << 17,
        vocab_size: int | None = None,
        files: TokenizerFiles | None = None,
        template: str | dict[str, str] | None = None,
        eos_token: str | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self.vocabulary = vocabulary or Vocabulary(tokenizer)
        self.files = files
        self.chat_template = template or tokenizer.chat_template
        self._generation_eos_ids = tuple(generation_eos_ids)
        own_eos = tokenizer.eos_token_id if eos_token is None else tokenizer.convert_tokens_to_ids(eos_token)
        self.eos_token_ids: tuple[int, ...] = tuple(
            sorted({*self._generation_eos_ids, *([own_eos] if own_eos is not None else [])})
        )

    @classmethod
    def from_directory(
        cls,
        path: Path,
        fallback: TextCodec | None = None,
        *,
        context_length: int | None = None,
        vocab_size: int | None = None,
    ) -> TextCodec:
        """The codec of a model directory, or of an adapter's where `fallback` is its backbone's.

        An adapter without tokenizer files shares the fallback itself; one that only brings a chat template or an eos
        token, or a copy of the backbone's tokenizer, shares its tokenizer. Nothing is fetched, no code is executed.
        """
        files = TokenizerFiles.read(path)
        if fallback is not None:
            context_length = context_length or fallback.context_length
            vocab_size = vocab_size or fallback.vocab_size
            says_nothing = files.is_empty and files.eos_token_ids is None
            if says_nothing and (context_length, vocab_size) == (fallback.context_length, fallback.vocab_size):
                return fallback
        assert context_length is not None, "a backbone's codec must be told its context length"
        eos_ids = files.eos_token_ids
        if eos_ids is None:
            eos_ids = fallback._generation_eos_ids if fallback is not None else ()
        if fallback is not None and (files.vocabulary_digest is None or _is_copy(files, fallback.files)):
            eos_token = files.eos_token
            if eos_token is not None and not fallback.vocabulary.has(eos_token):
                raise AdapterInvalid(f"tokenizer_config.json names {eos_token!r} as eos_token; the backbone lacks it.")
            return cls(
                fallback.tokenizer,
                eos_ids,
                context_length=context_length,
                vocab_size=vocab_size,
                files=fallback.files,
                template=files.chat_template or fallback.chat_template,
                eos_token=eos_token,
                vocabulary=fallback.vocabulary,
            )
        tokenizer = _load(path)
        return cls(
            tokenizer,
            eos_ids,
            context_length=context_length,
            vocab_size=vocab_size,
            files=files,
            template=files.chat_template or (fallback.chat_template if fallback is not None else None),
        )

    def encode(self, prompt: Prompt) -> list[int]:
        match prompt:
            case TextPrompt():
                ids = self._encode_text(prompt.text, add_special_tokens=prompt.add_special_tokens, param="prompt")
            case TokensPrompt():
                ids = list(prompt.token_ids)
            case ChatPrompt():
                ids = self._encode_text(
                    chat_template.render(self.tokenizer, self.chat_template, prompt),
                    add_special_tokens=False,  # the template writes them
                    param="messages",
                )
        param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
        if not ids:
            raise InvalidRequest("The prompt must have at least one token.", param=param)
        outside = next((token_id for token_id in ids if not 0 <= token_id < self.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(
                f"Token id {outside} is out of vocabulary: ids go from 0 to {self.vocab_size - 1}.", param=param
            )
        return ids

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True, prompt: Prompt | None = None
    ) -> Detokenizer:
        """The marks by which the answer to this chat is taken apart are text, also where they are special tokens."""
        shown = self._mark_ids(with_tools=bool(prompt.tools)) if isinstance(prompt, ChatPrompt) else frozenset()
        return Detokenizer(self.vocabulary, prompt_ids, skip_special_tokens, shown)

    @cached_property
    def dialect(self) -> Dialect:
        return dialect_of(self.chat_template)

    def begins_reasoning(self, prompt: Prompt, prompt_ids: Sequence[int]) -> bool:
        """Whether the output begins inside of reasoning, because the template has opened it."""
        if self.dialect.reasoning_tags is None or not isinstance(prompt, ChatPrompt):
            return False
        return self.dialect.is_open(self.vocabulary.decode(prompt_ids[-_TAIL:]))

    def _mark_ids(self, *, with_tools: bool) -> frozenset[int]:
        marks = (*(self.dialect.reasoning_tags or ()), *(self.dialect.tool_marks if with_tools else ()))
        return frozenset(self.tokenizer.convert_tokens_to_ids(mark) for mark in marks if self.vocabulary.has(mark))

    @property
    def max_chars(self) -> int:
        return self.context_length * MAX_CHARS_PER_TOKEN

    def _encode_text(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        if len(text) > self.max_chars:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.context_length} tokens; a prompt of {len(text)} "
                "characters cannot fit. Please reduce its length.",
                param=param,
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = ord(text[error.start])
            raise InvalidRequest(
                f"The text is not valid Unicode: it has the lone surrogate U+{surrogate:04X}.", param=param
            ) from None
        # `verbose`: no advice about the model's length on stderr; the engine checks it against the real limit.
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _is_copy(files: TokenizerFiles, base: TokenizerFiles | None) -> bool:
    return base is not None and files.tokenizes_like(base)


def _load(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the files are somebody's upload, and every tokenizer class fails in its own way
        reason = " ".join(str(error).replace(str(path), "the directory").split())[:500] or type(error).__name__
        raise AdapterInvalid(f"The tokenizer cannot be loaded: {reason}") from error
