"""The embedded demo: where its files lie, and what the backbone and each adapter must answer.

The backbone repeats the text it is given; every adapter applies one function to it. The functions here are the golden
answers that tests and examples compare with. `scripts/train_demo.py` writes the files.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

ASSETS: Final = Path(__file__).resolve().parent / "assets"
BASE: Final = "base"

_LOWER: Final = "abcdefghijklmnopqrstuvwxyz"
_UPPER: Final = _LOWER.upper()
_TO_UPPER: Final = str.maketrans(_LOWER, _UPPER)
_SWAP: Final = str.maketrans(_LOWER + _UPPER, _UPPER + _LOWER)
_ROT13: Final = str.maketrans(_LOWER + _UPPER, _LOWER[13:] + _LOWER[:13] + _UPPER[13:] + _UPPER[:13])
_LEET: Final = str.maketrans("aeiostAEIOST", "431057431057")
_MASK: Final = str.maketrans(dict.fromkeys("aeiouAEIOU", "*"))

# Only ASCII letters change: a byte-level model sees "ü" as two bytes, which the letter functions leave as they are.
TASKS: Final[Mapping[str, Callable[[str], str]]] = MappingProxyType(
    {
        BASE: lambda text: text,
        "upper": lambda text: text.translate(_TO_UPPER),
        "swapcase": lambda text: text.translate(_SWAP),
        "rot13": lambda text: text.translate(_ROT13),
        "leet": lambda text: text.translate(_LEET),
        "reverse": lambda text: text[::-1],
        "mask": lambda text: text.translate(_MASK),
    }
)
ADAPTER_NAMES: Final = tuple(name for name in TASKS if name != BASE)

# Texts for examples and tests; every task is right on the first, the backbone repeats the second.
EXAMPLE_TEXTS: Final = ("hello world", "Cold start", "GPU 42", "LoRA", "serverless", "Ok!", "a", "Tea & Milk", "x=3*y")
UNICODE_TEXTS: Final = ("こんにちは世界", "🚀🎉", "Привет", "LoRA 🚀 42", "Hello 世界", "한국어", "👩‍🚀", "αβγ")


def backbone_path() -> Path:
    """The backbone as a Hugging Face directory: config, safetensors, tokenizer, chat template."""
    return ASSETS / "backbone"


def adapter_paths() -> dict[str, Path]:
    """Adapter name → PEFT directory, in the order of `ADAPTER_NAMES`."""
    return {name: ASSETS / "adapters" / name for name in ADAPTER_NAMES}


def completion_prompt(text: str) -> str:
    """The prompt that asks for the same answer through plain completion; `text` must not contain a newline.

    The tokenizer puts the begin-of-sequence token in front, as the chat template does by itself.
    """
    return text + "\n"


def is_held_out(text: str) -> bool:
    """Whether training never showed this text: one in sixteen, decided by a hash so that all runs and tests agree."""
    return zlib.crc32(text.encode()) % 16 == 0
