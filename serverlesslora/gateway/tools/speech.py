"""What one choice says: its text taken apart into content, reasoning and calls as it arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from serverlesslora.gateway.tools.formats import FORMATS, Format, after_reasoning, named, plain, required
from serverlesslora.gateway.tools.offer import Offer
from serverlesslora.gateway.tools.reader import CallArguments, CallBegun, Content, Piece, Reader, Reasoning


class Dialect(NamedTuple):
    """How the function that answers writes calls and reasoning, as its worker told."""

    tool_format: str = ""
    reasoning_tags: tuple[str, str] | None = None
    reasoning_open: bool = False


class Speech:
    """Feed it a choice's text; what it finds does not depend on how the text was cut."""

    def __init__(self, offer: Offer | None, dialect: Dialect) -> None:
        schemas: Mapping[str, Mapping[str, Any]] = offer.schemas if offer is not None else {}
        self._most_calls = 1 if offer is not None and not offer.parallel else None
        self._reader = Reader(schemas)
        self._steps = _format(offer, dialect)(self._reader)
        self._is_over = False
        self._advance()

    @property
    def is_reasoning(self) -> bool:
        return self._reader.is_reasoning

    def feed(self, text: str) -> list[Piece]:
        self._reader.add(text)
        self._advance()
        return self._taken()

    def end(self, text: str = "") -> list[Piece]:
        """`text` is the last; what was held back is said."""
        self._reader.add(text, is_last=True)
        self._advance()
        self._reader.close()
        return self._taken()

    def _advance(self) -> None:
        if not self._is_over:
            self._is_over = next(self._steps, self) is self

    def _taken(self) -> list[Piece]:
        pieces = self._reader.take()
        if self._most_calls is None:
            return pieces
        # Asked for one call at most: the further ones of a model that makes more are not the client's affair.
        return [
            piece
            for piece in pieces
            if not isinstance(piece, (CallBegun, CallArguments)) or piece.call < self._most_calls
        ]


def _format(offer: Offer | None, dialect: Dialect) -> Format:
    calls = plain if offer is None else _calls(offer, dialect)
    if dialect.reasoning_tags is None:
        return calls
    return after_reasoning(dialect.reasoning_tags, calls, is_open=dialect.reasoning_open)


def _calls(offer: Offer, dialect: Dialect) -> Format:
    if offer.forced is not None:
        return named(offer.forced)
    if offer.is_required:
        return required
    return FORMATS.get(dialect.tool_format, plain)


class SpokenCall(NamedTuple):
    name: str
    arguments: str


class Said(NamedTuple):
    """A whole answer."""

    content: str
    reasoning: str
    calls: tuple[SpokenCall, ...]


def joined(pieces: list[Piece]) -> Said:
    names = {piece.call: piece.name for piece in pieces if isinstance(piece, CallBegun)}
    arguments = dict.fromkeys(names, "")
    for piece in pieces:
        if isinstance(piece, CallArguments):
            arguments[piece.call] += piece.text
    return Said(
        "".join(piece.text for piece in pieces if isinstance(piece, Content)),
        "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        tuple(SpokenCall(names[index], arguments[index]) for index in names),
    )
