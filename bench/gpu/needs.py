"""What must be installed before anything is imported, so that a bare machine hears of everything it lacks at once."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping

# By import name; what the sections reach in their own process and in those they start.
PACKAGES = {
    "torch": "torch>=2.11",
    "triton": "triton>=3.6",
    "transformers": "transformers>=5.17",
    "peft": "peft>=0.19",
    "safetensors": "safetensors>=0.6",
    "tokenizers": "tokenizers>=0.22",
    "msgspec": "msgspec>=0.20",
    "xxhash": "xxhash>=3.5",
    "numpy": "numpy>=2",
    "rich": "rich>=13",
    "jinja2": "jinja2>=3.1",
    "tqdm": "tqdm",
}
ON_A_GPU = {"cuda.bindings": "cuda-bindings>=12.8"}


def missing(*, on_a_gpu: bool) -> list[str]:
    """Requirements, as pip takes them."""
    wanted: Mapping[str, str] = PACKAGES | (ON_A_GPU if on_a_gpu else {})
    return [requirement for name, requirement in wanted.items() if not _is_there(name)]


def sentence(requirements: list[str]) -> str:
    names = ", ".join(requirement.split(">=")[0] for requirement in requirements)
    command = "pip install " + " ".join(f"'{requirement}'" for requirement in requirements)
    return (
        f"not installed here: {names}; run {command}, or without a network unpack the wheels into a folder and name it "
        "in PYTHONPATH, which every process of this check inherits"
    )


def has_compiler() -> bool:
    """Triton builds a small C file for every program it launches."""
    return bool(os.environ.get("CC")) or any(shutil.which(name) for name in ("gcc", "clang", "cc"))


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
