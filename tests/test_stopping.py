"""Ends of sequences: ids, lengths, stop strings however the text is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.engine.stopping import Outcome, Stopping, StopStrings
from serverlesslora_ipc.messages import SamplingParams

EOS = 2


def stopping(prompt_tokens: int = 3, context_length: int = 1000, **params: Any) -> Stopping:
    return Stopping(
        SamplingParams(**params), eos_token_ids=(EOS,), prompt_tokens=prompt_tokens, context_length=context_length
    )


def run(sequence: Stopping, pieces: list[str], first_id: int = 100) -> tuple[str, list[Outcome]]:
    outcomes: list[Outcome] = []
    for number, piece in enumerate(pieces):
        outcomes.append(sequence.push(first_id + number, piece))
        if outcomes[-1].finish_reason:
            break
    return "".join(outcome.text for outcome in outcomes), outcomes


def test_stop_string_across_tokens_is_held_back_and_removed() -> None:
    text, outcomes = run(stopping(stop=("\nUser:",)), ["Hi", " there\n", "Us", "er", ": more"])
    assert text == "Hi there"
    assert [outcome.text for outcome in outcomes] == ["Hi", " there", "", "", ""]
    assert outcomes[-1] == Outcome("", "stop", "\nUser:")


def test_held_back_text_returns_when_it_was_no_stop_string() -> None:
    text, outcomes = run(stopping(stop=("END",)), ["a E", "N", "N", "b"])
    assert text == "a ENNb"
    assert [outcome.text for outcome in outcomes] == ["a ", "", "ENN", "b"]


def test_stop_string_can_be_included() -> None:
    text, outcomes = run(stopping(stop=("END",), include_stop_str_in_output=True), ["a E", "NDING"])
    assert text == "a END"
    assert outcomes[-1].stop_reason == "END"


def test_length_flushes_what_was_held_back_and_the_half_character() -> None:
    sequence = stopping(stop=("END",), max_tokens=2)
    assert sequence.push(7, "a EN") == Outcome("a ")
    assert sequence.push(7, "", flush=lambda: "\ufffd") == Outcome("EN\ufffd", "length")


def test_length_gives_back_what_was_held_without_a_flush() -> None:
    assert stopping(stop=("END",), max_tokens=1).push(7, "a EN") == Outcome("a EN", "length")


def test_flush_can_complete_a_stop_string_and_is_only_called_at_the_end() -> None:
    sequence = stopping(stop=("b\ufffd",), max_tokens=2)
    assert sequence.push(7, "ab", flush=lambda: pytest.fail("too early")) == Outcome("a")
    assert sequence.push(7, "", flush=lambda: "\ufffd") == Outcome("", "stop", "b\ufffd")


def test_stop_wins_over_length_on_the_same_token() -> None:
    assert run(stopping(stop=("b",), max_tokens=2), ["a", "b"])[1][-1] == Outcome("", "stop", "b")
    assert stopping(max_tokens=1).push(EOS, "") == Outcome("", "stop")


def test_eos_and_stop_ids() -> None:
    assert stopping().push(EOS, "</s>") == Outcome("", "stop", None)
    assert stopping(ignore_eos=True).push(EOS, "</s>") == Outcome("</s>")
    assert stopping(stop_token_ids=(9,)).push(9, "x") == Outcome("", "stop", 9)
    assert stopping(stop_token_ids=(9,), include_stop_str_in_output=True).push(9, "x") == Outcome("x", "stop", 9)
    assert stopping(stop_token_ids=(EOS,)).push(EOS, "") == Outcome("", "stop", None)
    assert stopping(stop_token_ids=(EOS,), ignore_eos=True).push(EOS, "") == Outcome("", "stop", EOS)


def test_text_held_back_returns_at_eos() -> None:
    sequence = stopping(stop=("END",))
    assert sequence.push(5, "a EN").text == "a "
    assert sequence.push(EOS, "", flush=lambda: "") == Outcome("EN", "stop")


def test_min_tokens_bans_ids_and_ignores_strings() -> None:
    sequence = stopping(min_tokens=3, stop=("ab",), stop_token_ids=(9,))
    shown = []
    for text in ("ab", "a"):
        assert sequence.banned == (EOS, 9)
        shown.append(sequence.push(5, text).text)
    assert shown == ["ab", "a"]  # shown at once: nothing before the minimum can be part of a stop string
    assert sequence.push(5, "b") == Outcome("b")
    assert sequence.banned == ()
    assert sequence.push(5, "cab") == Outcome("c", "stop", "ab")


def test_min_tokens_with_ignored_eos_bans_only_stop_ids() -> None:
    assert stopping(min_tokens=1, ignore_eos=True, stop_token_ids=(9,)).banned == (9,)
    assert stopping().banned == ()


def test_the_context_ends_a_sequence() -> None:
    assert stopping(prompt_tokens=8, context_length=10).max_tokens == 2
    text, outcomes = run(stopping(prompt_tokens=8, context_length=10, max_tokens=50), ["a", "b", "c"])
    assert (text, outcomes[-1].finish_reason) == ("ab", "length")
    assert stopping(prompt_tokens=8, context_length=10, max_tokens=1).max_tokens == 1


def test_the_first_complete_stop_string_wins() -> None:
    assert run(stopping(stop=("world", "lo")), ["hello world"])[1][-1] == Outcome("hel", "stop", "lo")
    assert run(stopping(stop=("lo", "hello")), ["hello world"])[1][-1] == Outcome("", "stop", "hello")
    assert run(stopping(stop=("", "x")), ["ax"])[1][-1] == Outcome("a", "stop", "x")


def slow_search(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=6), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=7), min_size=1, max_size=4).map(tuple),
)
def test_any_cut_gives_the_text_before_the_first_match(pieces: list[str], stops: tuple[str, ...]) -> None:
    search, shown, found = StopStrings(stops), "", None
    for piece in pieces:
        text, found = search.feed(piece)
        shown += text
        if found:
            break
        # What is held back is a beginning of a stop string, and the longest one.
        fed = "".join(pieces)[: len(shown) + len(search._held)]
        longest = max(k for stop in stops for k in range(len(stop)) if fed.endswith(stop[:k]))
        assert len(search._held) == longest
    if not found:
        shown += search.release()
    assert (shown, found) == slow_search("".join(pieces), stops)


def test_a_long_stop_string_is_linear() -> None:
    search = StopStrings(("a" * 20_000 + "b",))
    shown = "".join(search.feed("a")[0] for _ in range(40_000))
    assert len(shown) == 20_000
    assert search.feed("b") == ("", "a" * 20_000 + "b")
