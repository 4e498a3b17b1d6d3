"""When a sequence ends and which of its text may be shown.

Pure: tokens and their text go in, text and a verdict come out. Stop strings are followed character by character with
one Knuth-Morris-Pratt automaton each, so the outcome does not depend on how the text is cut into tokens, a long stop
string costs no more than a short one, and the text that must be held back is exactly the longest beginning of a stop
string that the output currently ends with. Among several stop strings the one that is complete first wins; of those
complete at the same character, the one that began first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from serverlesslora_ipc.messages import FinishReason, SamplingParams


class Outcome(NamedTuple):
    """`text` can be shown now; the sequence goes on while `finish_reason` is None."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id; None for eos and for "length"


class Stopping:
    """The end of one sequence. `context_length` counts the prompt's and the output's tokens together."""

    def __init__(
        self, params: SamplingParams, *, eos_token_ids: Sequence[int], prompt_tokens: int, context_length: int
    ) -> None:
        room = max(context_length - prompt_tokens, 0)
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.num_tokens = 0
        self._min_tokens = params.min_tokens
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._ending_ids = tuple(sorted(self._eos_ids | self._stop_ids))
        self._include_stop = params.include_stop_str_in_output
        self._strings = StopStrings(params.stop)

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that must not be sampled next: those that would end the sequence before its minimum."""
        return self._ending_ids if self.num_tokens < self._min_tokens else ()

    def push(
        self, token_id: int, text: str, flush: Callable[[], str] | None = None, *, is_complete: bool = False
    ) -> Outcome:
        """Account for one token, whose `text` may be empty (part of a character) or hold earlier tokens' text too.

        `is_complete`: nothing may follow it, because the output is all that its grammar allows.

        `flush` (the detokenizer's) is asked for the last text when the sequence ends for another reason than a stop
        string. A token that ends the sequence is not shown unless `include_stop_str_in_output` asks for it.
        """
        assert self.num_tokens < self.max_tokens, "the sequence has ended"
        self.num_tokens += 1
        ends = token_id in self._eos_ids or token_id in self._stop_ids
        is_full = self.num_tokens == self.max_tokens
        if ends and not self._include_stop:
            text = ""
        if (ends or is_full or is_complete) and flush is not None:
            rest = flush()
            text += "" if ends and not self._include_stop else rest
        if self.num_tokens < self._min_tokens:
            shown, stop = text, None
        else:
            shown, stop = self._strings.feed(text)
        if stop is not None:
            return Outcome(shown + (stop if self._include_stop else ""), "stop", stop)
        if ends:
            reason = None if token_id in self._eos_ids else token_id
            return Outcome(shown + self._strings.release(), "stop", reason)
        if is_full or is_complete:
            return Outcome(shown + self._strings.release(), "stop" if is_complete else "length")
        return Outcome(shown)


class StopStrings:
    """Looks for the stop strings in a text that arrives in pieces; holds back what may become one of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string that was found behind it (which ends the search)."""
        if not self._automata:
            return text, None
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = [automaton.stop for automaton in self._automata if automaton.advance(character)]
            if found:
                stop = max(found, key=len)
                return buffer[: end - len(stop)], stop
        held = max(automaton.matched for automaton in self._automata)
        split = len(buffer) - held
        self._held = buffer[split:]
        return buffer[:split], None

    def release(self) -> str:
        """The text held back, once nothing can complete it any more."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Knuth-Morris-Pratt: `matched` is the length of the longest beginning of `stop` that the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = [0]  # per length of a match: length of the next shorter match that ends at the same character
        length = 0
        for character in stop[1:]:
            while length and stop[length] != character:
                length = self._fallback[length - 1]
            length += stop[length] == character
            self._fallback.append(length)

    def advance(self, character: str) -> bool:
        """True when `stop` is complete; the search is over then."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)
