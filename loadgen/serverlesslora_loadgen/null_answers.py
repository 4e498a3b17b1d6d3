"""What the null server reads and says: text that follows from the model and the prompt, as events encoded once."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

MAX_TOKENS = 1 << 17  # nothing waits for slow readers, so what one request can make us hold is bounded
WORDS = tuple(f" {consonant}{vowel}" for consonant in "bdfghjklmnprstvz" for vowel in "aeio")

_encode = msgspec.json.Encoder().encode


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Body(msgspec.Struct, frozen=True):
    """Of a request to either endpoint; whatever else it says changes nothing."""

    model: Annotated[str, Meta(min_length=1)]
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def num_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 16

    @property
    def prompt_tokens(self) -> int:
        """Token ids are counted; of text every word is one token."""
        if isinstance(self.prompt, list):
            return len(self.prompt)
        texts = [self.prompt] if self.prompt is not None else [each.get("content") for each in self.messages or ()]
        return sum(len(str(text).split()) for text in texts)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


_decoder = msgspec.json.Decoder(Body)


def decode(data: bytes, *, chat: bool) -> Body:
    """Raises msgspec.DecodeError naming what is wrong."""
    body = _decoder.decode(data)
    if (body.messages if chat else body.prompt) is None:
        raise msgspec.ValidationError(f"Object missing required field `{'messages' if chat else 'prompt'}`")
    return body


def words_of(model: str, prompt: object, count: int) -> list[int]:
    """Places in WORDS: the answer to a prompt, the same in every process, another for every model.

    A linear congruential generator (the constants of Numerical Recipes, section 7.1) started at a checksum of both;
    its high bits are taken, the low ones repeat too soon.
    """
    state = zlib.crc32(_encode((model, prompt)))
    places = []
    for _ in range(count):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        places.append(state >> 26)
    return places


def chunk(data: bytes) -> bytes:
    """A chunk of HTTP's chunked transfer."""
    return b"%x\r\n%b\r\n" % (len(data), data)


END = chunk(b"data: [DONE]\n\n") + chunk(b"")


class Phrases(NamedTuple):
    """The events of one model, encoded once: all that is left to do for a token is to pick one of them."""

    opening: bytes  # said before the first token
    words: list[bytes]
    last_words: list[bytes]  # with the reason why it ends
    usage: bytes  # `usage` of a body goes into its one %b


def phrases(chat: bool, model: str, with_ids: bool) -> Phrases:
    """Of a stream, each in its HTTP chunk except `usage`."""
    envelope = b'data: {"id":"null","object":"%b","created":0,"model":%b,' % (
        b"chat.completion.chunk" if chat else b"text_completion",
        _encode(model),
    )

    def event(text: str, place: int, reason: bytes) -> bytes:
        said = b'"delta":{"content":%b}' if chat else b'"text":%b'
        ids = b',"token_ids":[%d]' % place if with_ids else b""
        choice = b'{"index":0,%b,"logprobs":null,"finish_reason":%b%b}' % (said % _encode(text), reason, ids)
        return chunk(b'%b"choices":[%b]}\n\n' % (envelope, choice))

    role = b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    return Phrases(
        opening=chunk(envelope + role) if chat else b"",
        words=[event(word, place, b"null") for place, word in enumerate(WORDS)],
        last_words=[event(word, place, b'"length"') for place, word in enumerate(WORDS)],
        usage=envelope.replace(b"%", b"%%") + b'"choices":[],"usage":%b}\n\n',
    )


def usage(body: Body) -> bytes:
    asked, made = body.prompt_tokens, body.num_tokens
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (asked, made, asked + made)


def whole(chat: bool, body: Body, places: Sequence[int]) -> bytes:
    """The answer to a request that does not want a stream."""
    text = _encode("".join(WORDS[place] for place in places))
    said = b'"message":{"role":"assistant","content":%b}' % text if chat else b'"text":%b' % text
    ids = b',"token_ids":%b' % _encode(places) if body.return_token_ids else b""
    return (
        b'{"id":"null","object":"%b","created":0,"model":%b,"choices":'
        b'[{"index":0,%b,"logprobs":null,"finish_reason":"length"%b}],"usage":%b}'
    ) % (b"chat.completion" if chat else b"text_completion", _encode(body.model), said, ids, usage(body))


# --- HTTP


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\nx-request-id: null-%d\r\n%b\r\n"
)
CLOSE = b"connection: close\r\n"


def json_answer(status: bytes, body: bytes, *, keep_alive: bool = True) -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (status, len(body))
    return head + (b"" if keep_alive else CLOSE) + b"\r\n" + body


def refusal(status: bytes, message: str, *, keep_alive: bool = True) -> bytes:
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return json_answer(status, _encode(error), keep_alive=keep_alive)
