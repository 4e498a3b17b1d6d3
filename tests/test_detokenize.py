"""Incremental text equals the tokenizer's own decoding, never shows half a character, and log-probabilities add up."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from serverlesslora.engine.detokenize import Detokenizer
from serverlesslora.engine.logprobs import token_logprob
from serverlesslora.engine.sampler import Sampled
from serverlesslora.engine.vocabulary import Vocabulary
from serverlesslora_ipc.messages import TokenLogprob

CORPUS = ["hello world, the quick brown fox. 日本語 日本 😀😀👍🏽 👩‍👩‍👧 é ñ café e\u0301 ▁ Ġ   spaces\n\ttabs"] * 20
SPECIAL = ["<s>", "</s>"]
PIECES = [
    *("hello", " ", "  ", "wörld", "x", ".", "\n", "▁", "Ġ", "\u200b"),
    *("😀", "日本", "👩‍👩‍👧", "e\u0301", "🇩🇪", "שלום", "\ufffd", "𝔘"),
]


def byte_level(merges: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = 420 if merges else len(alphabet) + len(SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "日々"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    words = ["▁", "▁hello", "hello", "▁w", "日", "▁the", "▁▁", *"abcdefghijklmnopqrstuvwxyz.,!\n"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    tokenizer = Tokenizer(models.Unigram([*vocab, *((word, -2.0) for word in words)], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    words = ["▁", "▁hello", "hello", "▁w", *"abcdefghijklmnopqrstuvwxyz.,!"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -2.0) for word in words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "byte_level": byte_level(),
    "single_bytes": byte_level(False),
    "fallback": byte_fallback(),
    "metaspace": metaspace(),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]


def stream(
    tokenizer: PreTrainedTokenizerBase | Vocabulary, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def random_text(rng: random.Random) -> str:
    anything = [chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(3)]
    return "".join(rng.choice(PIECES + anything) for _ in range(rng.randrange(1, 15)))


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_random_unicode(tokenizer: PreTrainedTokenizerBase) -> None:
    rng, vocabulary = random.Random(1), Vocabulary(tokenizer)
    for _ in range(400):
        ids = encoded(tokenizer, random_text(rng))
        pieces, whole = stream(vocabulary, ids), tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) == whole
        assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


def test_text_goes_on_after_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    rng, vocabulary = random.Random(2), Vocabulary(tokenizer)
    for _ in range(300):
        ids = encoded(tokenizer, random_text(rng) + random_text(rng))
        for cut in {rng.randrange(len(ids) + 1), 0, len(ids)}:
            prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            if whole.startswith(prompt):  # the prompt does not end inside a character
                assert prompt + "".join(stream(vocabulary, ids[cut:], ids[:cut])) == whole


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids(tokenizer: PreTrainedTokenizerBase, skip: bool) -> None:
    rng, vocabulary = random.Random(3), Vocabulary(tokenizer)
    for _ in range(600):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 25))]
        if tokenizer is KINDS["fallback"]:
            assert "".join(stream(vocabulary, ids, skip=skip)) == forgiving(tokenizer, ids, skip)
        else:
            assert "".join(stream(vocabulary, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def forgiving(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip: bool) -> str:
    """Like decode, but a broken run of byte tokens keeps its complete characters (decode turns all of it to U+FFFD)."""
    tokens = [
        token for token in tokenizer.convert_ids_to_tokens(list(ids)) if not (skip and token in [*SPECIAL, "<unk>"])
    ]
    text = ""
    for run in re.findall(r"(?:<0x..>)+|(?:(?!<0x).)+", "".join(tokens), re.DOTALL):
        if run.startswith("<0x"):
            text += bytes(int(byte, 16) for byte in re.findall("0x(..)", run)).decode("utf-8", "replace")
        else:
            text += run.replace("▁", " ")
    return text.removeprefix(" ")


def test_no_half_characters_and_no_needless_delay() -> None:
    for kind in ("single_bytes", "fallback"):
        ids = encoded(KINDS[kind], "a😀b")[-6:]
        assert len(ids) == 6
        assert stream(KINDS[kind], ids, prompt=ids[:1]) == ["a", "", "", "", "😀", "b", ""]


def test_invalid_bytes_are_shown_once_it_is_certain() -> None:
    for kind in ("single_bytes", "fallback"):
        tokenizer = KINDS[kind]
        lead, letter = encoded(tokenizer, "日" if kind == "single_bytes" else "月")[-3], encoded(tokenizer, "a")[-1]
        assert stream(tokenizer, [letter, lead, letter, lead]) == ["a", "", "\ufffda", "", "\ufffd"]
        # and thousands of them are neither held back nor slow
        assert "".join(stream(tokenizer, [lead] * 5000)[:-1]) == "\ufffd" * 4999


def test_an_output_completes_the_character_its_prompt_began() -> None:
    for kind in ("single_bytes", "fallback"):
        tokenizer = KINDS[kind]
        smile, letter = encoded(tokenizer, "😀")[-4:], encoded(tokenizer, "a")[-1]
        assert "".join(stream(tokenizer, [*smile[2:], letter], prompt=smile[:2])) == "😀a"
        assert "".join(stream(tokenizer, [letter], prompt=smile[:2])) == "a"
        assert "".join(stream(tokenizer, smile, prompt=smile[:2])) == "😀"


def test_leading_space_after_prompt_and_special_tokens() -> None:
    tokenizer = KINDS["fallback"]
    hello = tokenizer.convert_tokens_to_ids("▁hello")
    bos = tokenizer.bos_token_id
    assert stream(tokenizer, [hello, hello]) == ["hello", " hello", ""]
    assert stream(tokenizer, [hello], prompt=[bos]) == ["hello", ""]
    assert stream(tokenizer, [hello], prompt=[bos, hello]) == [" hello", ""]
    assert stream(tokenizer, [hello], prompt=[bos, hello, tokenizer.eos_token_id]) == [" hello", ""]
    assert stream(tokenizer, [hello, bos, hello], skip=False) == ["hello", "<s>", " hello", ""]


def test_ids_without_a_token_are_silent(tokenizer: PreTrainedTokenizerBase) -> None:
    beyond = len(tokenizer) + 5
    assert "".join(stream(tokenizer, [beyond, beyond])) == ""
    assert Vocabulary(tokenizer).utf8(beyond) == b""


def test_bytes_of_tokens_concatenate_to_the_output() -> None:
    rng = random.Random(5)
    for tokenizer in (KINDS["byte_level"], KINDS["single_bytes"], KINDS["fallback"]):
        vocabulary = Vocabulary(tokenizer)
        for _ in range(100):
            ids = encoded(tokenizer, random_text(rng))
            joined = b"".join(map(vocabulary.utf8, ids)).decode("utf-8")
            lead = " " if tokenizer is KINDS["fallback"] else ""
            assert joined == lead + tokenizer.decode(ids)


def test_token_logprob() -> None:
    tokenizer = KINDS["single_bytes"]
    first, letter = encoded(tokenizer, "😀")[0], encoded(tokenizer, "a")[0]
    sampled = Sampled(first, -0.5, ((letter, -0.25), (tokenizer.eos_token_id, float("-inf"))))
    assert token_logprob(sampled, Vocabulary(tokenizer)) == TokenLogprob(
        first,
        "\ufffd",
        -0.5,
        b"\xf0",
        (TokenLogprob(letter, "a", -0.25, b"a"), TokenLogprob(tokenizer.eos_token_id, "</s>", -9999.0, b"</s>")),
    )
    for kind in ("fallback", "metaspace"):
        hello = KINDS[kind].convert_tokens_to_ids("▁hello")
        assert Vocabulary(KINDS[kind]).text(hello) == " hello"
