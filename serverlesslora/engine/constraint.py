"""Outputs that must match a grammar: compiled once per vocabulary, then followed token by token for each choice.

llguidance does both. It sees tokens as the bytes that `Vocabulary` says they add to a text, so whatever a tokenizer is
made of, what the grammar allows is what the client reads. A mask is one bit per token of the model's vocabulary.

Measured with 151,000 tokens: 0.4 s and 58 MB for a vocabulary, when it is first needed; about a millisecond to
compile a schema of a few fields; 0.03 ms for a mask. What compiles for long (at these limits most of a second) must
not hold up others: see `worker.compiling`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from serverlesslora.engine.grammar_sources import refusal, source_of
from serverlesslora.engine.tool_grammar import in_lark
from serverlesslora.errors import InvalidRequest
from serverlesslora_ipc.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from serverlesslora.engine.prompts import TextCodec
    from serverlesslora.engine.vocabulary import Vocabulary

_NOTHING = "nothing that this model's vocabulary can write matches it"

KEPT_GRAMMARS = 16  # compiled ones, the last used: clients repeat themselves


class Words(NamedTuple):
    """A vocabulary as llguidance knows it."""

    tokenizer: LLTokenizer
    vocabulary: Vocabulary
    size: int  # rows of the model's vocabulary
    eos_ids: tuple[int, ...]


class Grammars:
    """Of one worker. Any thread may compile; the lock guards the tables and is not held for long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._words: WeakKeyDictionary[Vocabulary, dict[tuple[int, tuple[int, ...]], Words]] = WeakKeyDictionary()
        self._compiled: OrderedDict[tuple[int, str, str], CompiledGrammar] = OrderedDict()

    def compile(self, grammar: Grammar, text: TextCodec) -> CompiledGrammar:
        """Raises InvalidRequest for what cannot be compiled, is too large, or has no match at all."""
        if grammar.kind == "tools":
            grammar = in_lark(grammar, text.dialect.tool_format, text.vocabulary)
        words = self._words_of(text)
        key = (id(words.tokenizer), grammar.kind, grammar.text)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
        if found is not None:
            return found._replace(grammar=grammar)  # it may have come in another parameter
        compiled = _compile(grammar, words)
        with self._lock:
            self._compiled[key] = compiled
            if len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return compiled

    def _words_of(self, text: TextCodec) -> Words:
        key = (text.vocab_size, text.eos_token_ids)
        with self._lock:
            known = self._words.setdefault(text.vocabulary, {})
            words = known.get(key)
        if words is None:
            words = _words(text.vocabulary, *key)
            with self._lock:
                words = known.setdefault(key, words)
        return words


class CompiledGrammar(NamedTuple):
    grammar: Grammar
    words: Words
    matcher: LLMatcher  # at the beginning; never moved

    def begin(self, *, after: str | None = None, shunned: Sequence[int] = ()) -> Constraint:
        """For one choice. `after`: the grammar begins behind this text, what comes before it is free. `shunned` ids
        are chosen only where the grammar leaves nothing else."""
        return Constraint(self, after=after, shunned=shunned)


class Constraint:
    """What one choice may say next. Tokens go in, as they were sampled; computing its keys again changes nothing."""

    def __init__(self, compiled: CompiledGrammar, *, after: str | None, shunned: Sequence[int]) -> None:
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()
        self._after = None if after is None else after.encode()
        self._tail = b""
        self._shunned = tuple(shunned)
        self._bits = np.zeros((compiled.words.size + 31) // 32, np.uint32)
        self._is_prepared = False
        self.fault: InvalidRequest | None = None  # why it allows nothing any more

    @property
    def is_active(self) -> bool:
        return self._after is None

    def prepare(self) -> None:
        """Compute what is allowed next, if that was not done yet."""
        if self._is_prepared or not self.is_active:
            return
        self._is_prepared = True
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self._fail()

    def allowed(self, size: int, banned: Sequence[int] = ()) -> NDArray[np.bool_]:
        """[size]: which ids may be sampled. `banned` ones may where nothing else is left: the grammar has the word."""
        self.prepare()
        mask = np.unpackbits(self._bits.view(np.uint8), count=size, bitorder="little").view(np.bool_)
        without = np.asarray([i for i in (*banned, *self._shunned) if 0 <= i < size], np.int64)
        if mask[without].any():
            rest = mask.copy()
            rest[without] = False
            if rest.any():
                return rest
        return mask

    def advance(self, token_id: int) -> bool:
        """Whether the output is complete: nothing may follow this token."""
        if self._after is not None:
            self._tail = (self._tail + self._compiled.words.vocabulary.utf8(token_id))[-len(self._after) - 64 :]
            if self._after in self._tail:
                self._after = None
            return False
        self._is_prepared = False
        if not self._matcher.consume_token(token_id) and self.fault is None:
            self._fail()
        return self.fault is None and self._matcher.is_stopped()

    def _fail(self) -> None:
        reason = self._matcher.get_error()
        self.fault = refusal(self._compiled.grammar, _NOTHING if reason.startswith("NoExtension") else reason)
        self._bits.fill(0)
        self._is_prepared = True


def _limits() -> LLParserLimits:
    """Seconds become milliseconds; what people write stays far below."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=400_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _compile(grammar: Grammar, words: Words) -> CompiledGrammar:
    from llguidance import LLMatcher

    matcher = LLMatcher(words.tokenizer, source_of(grammar), log_level=0, limits=_limits())
    if matcher.is_error():
        raise refusal(grammar, matcher.get_error())
    compiled = CompiledGrammar(grammar, words, matcher)
    first = compiled.begin()  # the first mask is the most expensive one, and says whether anything matches at all
    is_possible = first.allowed(words.size).any()
    if first.fault is not None:
        raise first.fault
    if not is_possible:
        raise refusal(grammar, _NOTHING)
    return compiled


class _Tokenizer:
    """What llguidance asks of a tokenizer, see `llguidance.TokenizerWrapper`."""

    def __init__(self, vocabulary: Vocabulary, size: int, eos_ids: tuple[int, ...]) -> None:
        self._backend = getattr(vocabulary.tokenizer, "backend_tokenizer", None)
        self._specials = vocabulary.special_ids | set(eos_ids)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids = [token_id for token_id in sorted(self._specials) if token_id < size]
        self.tokens = vocabulary.spellings(size)
        self.words: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Of text that a grammar leaves no choice about: as the tokenizer would, where that adds up to this text."""
        if self.words is None:  # the wrapper tries whether it takes bytes
            return list(text.encode())
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            if self._specials.isdisjoint(ids) and self.words.decode_bytes(ids) == text.encode():
                return ids
        return self.words.greedy_tokenize(text)


def _words(vocabulary: Vocabulary, size: int, eos_ids: tuple[int, ...]) -> Words:
    from llguidance import LLTokenizer, TokenizerWrapper

    if not eos_ids:
        raise InvalidRequest("This model has no end-of-sequence token, so its output cannot be constrained.")
    tokenizer = _Tokenizer(vocabulary, size, eos_ids)
    wrapper = TokenizerWrapper(tokenizer)
    tokenizer.words = LLTokenizer(wrapper, n_vocab=size, eos_token=list(eos_ids), slices=LLTokenizer.json_slices())
    tokenizer.tokens = wrapper.tokens = []  # copied
    return Words(tokenizer.words, vocabulary, size, eos_ids)
