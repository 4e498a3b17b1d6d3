"""Random texts and conversations that teach the demo model its tasks."""

import random
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from serverlesslora.demo import BASE, TASKS, is_held_out

# How often each skill is seen in pre-training; reversing and sorting are harder than changing letters one by one.
# Sorting is practice in looking things up by content: it stays near 60 % at this size, so no adapter is made of it.
# "mask" is missing on purpose: its adapter has to learn something new.
PRETRAINING_MIX: Final = {
    BASE: 4.0,
    "upper": 0.7,
    "swapcase": 0.9,
    "rot13": 1.2,
    "leet": 0.7,
    "reverse": 2.0,
    "sort": 2.0,
}
_ANSWERS: Final[dict[str, Callable[[str], str]]] = {**TASKS, "sort": lambda text: "".join(sorted(text))}

# Ids 0..255 are the bytes themselves.
SPECIAL_TOKENS: Final = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    *(f"<|skill_{name}|>" for name in PRETRAINING_MIX if name != BASE),
)
TOKEN_ID: Final = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
VOCAB_SIZE: Final = 272
BOS, EOS, PAD = TOKEN_ID["<|bos|>"], TOKEN_ID["<|eos|>"], TOKEN_ID["<|pad|>"]
SYSTEM, USER, ASSISTANT = TOKEN_ID["<|system|>"], TOKEN_ID["<|user|>"], TOKEN_ID["<|assistant|>"]
IGNORED: Final = -100

MAX_CHARS: Final = 12  # the length every task is held to
MAX_COPY_CHARS: Final = 32  # the backbone alone copies longer texts, UTF-8 among them

_VOWELS: Final = "aeiou"
_CONSONANTS: Final = "bcdfghjklmnpqrstvwxyz"
_PRINTABLE: Final = "".join(map(chr, range(32, 127)))
_PUNCTUATION: Final = "!?.,;:'\"()-+*/=#@&%$_<>[]{}|~^`\\"
_WIDE: Final = (
    "äöüÄÖÜßéèçñåøœ€£°§µ",
    "αβγδεζηλμπρσωЖИКЛМНПРСТУабвгдежик",
    "世界你好中文字日本語東京大学今天水火山人口한국어안녕",
    "😀😁😂🤣😊😍🤔🙏👍👋🎉🔥🚀🌍🐍🦙🍎🍕⚡✨❤",
)
_SYSTEM_TEXTS: Final = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a helpful, honest and concise assistant. Always answer in English.",
    "Be terse",
    "Reply in JSON.",
)


class Example(NamedTuple):
    """One training sequence; a label is `IGNORED` where nothing is to be learned."""

    ids: list[int]
    labels: list[int]


def ascii_text(rng: random.Random, max_chars: int = MAX_CHARS) -> str:
    """A short line of printable ASCII: words, mostly, with digits, capitals, spaces and punctuation."""
    length = rng.randint(1, max_chars)
    style = rng.random()
    if style < 0.25:
        return "".join(rng.choices(_PRINTABLE, k=length))
    if style < 0.32:
        return "".join(rng.choices(rng.sample(_PRINTABLE, 3), k=length))
    if style < 0.42:
        return "".join(rng.choices(_CONSONANTS + _VOWELS, k=length))
    text = ""
    while len(text) < length:
        text += _word(rng) + rng.choice((" ", " ", " ", "", "-", rng.choice(_PUNCTUATION)))
    return text[:length]


def _word(rng: random.Random) -> str:
    if rng.random() < 0.15:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    word = "".join(
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + (rng.choice(_CONSONANTS) if rng.random() < 0.3 else "")
        for _ in range(rng.randint(1, 3))
    )
    case = rng.random()
    return word.capitalize() if case < 0.25 else word.upper() if case < 0.4 else word


def unicode_text(rng: random.Random, max_chars: int = MAX_COPY_CHARS) -> str:
    """A line that mixes ASCII words with one or two other scripts, as `max_chars` characters at most."""
    length = rng.randint(1, max_chars)
    alphabets = rng.sample(_WIDE, rng.randint(1, 2))
    text = ""
    while len(text) < length:
        if rng.random() < 0.45:
            text += _word(rng) + " "
        elif rng.random() < 0.3:
            # Any code point at all, so that copying does not depend on a list of characters.
            text += chr(
                rng.choice((rng.randrange(0xA1, 0x800), rng.randrange(0x800, 0xD800), rng.randrange(0x1F300, 0x1FA00)))
            )
        else:
            text += "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 4)))
    return text[:length]


def held_out_texts(seed: int, count: int, draw: Callable[[random.Random], str] = ascii_text) -> list[str]:
    """`count` different texts that training never sees."""
    rng = random.Random(f"held-out {seed}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = draw(rng)
        if is_held_out(text):
            texts[text] = None
    return list(texts)


def examples(rng: random.Random, tasks: dict[str, float], *, max_chars: int, skill_tokens: bool) -> Iterator[Example]:
    """Conversations without end, drawn from `tasks` by weight.

    With `skill_tokens` a task other than the base's is announced by its own token in the place of the
    begin-of-sequence token: so the backbone learns every skill while repeating stays what it does unasked. An adapter
    is trained without them, on the tokens its users send.
    """
    names, weights = list(tasks), list(tasks.values())
    while True:
        task = rng.choices(names, weights)[0]
        first = TOKEN_ID[f"<|skill_{task}|>"] if skill_tokens and task != BASE else BOS
        yield _conversation(rng, task, first, max_chars)


def _conversation(rng: random.Random, task: str, first: int, max_chars: int) -> Example:
    answer = _ANSWERS[task]
    example = Example([first], [IGNORED])
    form = rng.random()
    if form < 0.3:
        _append(example, (_text(rng, task, max_chars, lines=False) + "\n").encode(), learn=False)
        text = bytes(example.ids[1:-1]).decode()
        _append(example, (*answer(text).encode(), EOS), learn=True)
        return example
    if rng.random() < 0.15:
        _append(example, (SYSTEM, *_system_text(rng).encode()), learn=False)
    turns = 1 if rng.random() < 0.88 else rng.randint(2, 4)
    for _ in range(turns):
        if rng.random() < 0.03:  # two user messages in a row: the last one counts
            _append(example, (USER, *_text(rng, task, max_chars).encode()), learn=False)
        text = _text(rng, task, max_chars)
        _append(example, (USER, *text.encode(), ASSISTANT), learn=False)
        _append(example, (*answer(text).encode(), EOS), learn=True)
    return example


def _append(example: Example, ids: tuple[int, ...] | bytes, *, learn: bool) -> None:
    example.ids.extend(ids)
    example.labels.extend(ids if learn else [IGNORED] * len(ids))


def _text(rng: random.Random, task: str, max_chars: int, *, lines: bool = True) -> str:
    while True:
        kind = rng.random()
        if kind < 0.005:
            return ""
        if task == BASE and kind < 0.2:
            text = unicode_text(rng, min(MAX_COPY_CHARS, max_chars * 8 // 3))
        elif task == BASE and kind < 0.4:
            text = ascii_text(rng, min(MAX_COPY_CHARS, max_chars * 8 // 3))
        else:
            text = ascii_text(rng, max_chars)
        if lines and rng.random() < 0.02:
            text = text[:-1] + "\n" if len(text) > 1 else text
        if not is_held_out(text):
            return text


def _system_text(rng: random.Random) -> str:
    return rng.choice(_SYSTEM_TEXTS) if rng.random() < 0.4 else ascii_text(rng, 60)
