"""Which tokenizer files a model or adapter directory brings, and whether they say anything new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from serverlesslora.errors import AdapterInvalid

# Any of these holds a vocabulary; tokenizer_config.json alone does not.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

MAX_TEMPLATE_BYTES = 1 << 20

# Settings that change neither which ids a text has nor which text an id has; eos is looked at separately.
_IRRELEVANT = frozenset({
    "chat_template", "eos_token", "pad_token", "model_max_length", "padding_side", "truncation_side", "name_or_path",
    "processor_class", "tokenizer_file", "clean_up_tokenization_spaces", "is_local", "local_files_only", "max_length",
    "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "backend",
})  # fmt: skip


class TokenizerFiles(msgspec.Struct, frozen=True):
    """The tokenizer part of one directory."""

    directory: Path
    config: dict[str, Any]  # tokenizer_config.json, empty without one
    vocabulary_digest: str | None  # of the vocabulary files, None without any
    chat_template: str | dict[str, str] | None
    eos_token_ids: tuple[int, ...] | None  # from generation_config.json or config.json, None without either

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        config = _read_json(directory / "tokenizer_config.json")
        return cls(
            directory=directory,
            config=config,
            vocabulary_digest=_digest(directory),
            chat_template=_chat_template(directory, config),
            eos_token_ids=_eos_token_ids(directory),
        )

    @property
    def is_empty(self) -> bool:
        return self.vocabulary_digest is None and not self.config and self.chat_template is None

    @property
    def eos_token(self) -> str | None:
        token = self.config.get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) else None

    def tokenizes_like(self, other: TokenizerFiles) -> bool:
        """True when a tokenizer loaded from `other` gives the same ids and texts as one loaded from here.

        Trainers save the base's tokenizer beside the adapter as a matter of course; loading it again costs half a
        second for a large vocabulary, comparing digests a few milliseconds.
        """
        if self.vocabulary_digest is None:
            return True
        return self.vocabulary_digest == other.vocabulary_digest and _relevant(self.config) == _relevant(other.config)


def _relevant(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _IRRELEVANT}


def _digest(directory: Path) -> str | None:
    present = {path.name for path in directory.iterdir()}
    if present.isdisjoint(VOCABULARY_FILES):
        return None
    hasher = xxhash.xxh3_128()
    for name in (*VOCABULARY_FILES, "merges.txt", "added_tokens.json"):
        if name in present:
            content = (directory / name).read_bytes()
            hasher.update(f"{name}:{len(content)}:".encode())
            hasher.update(content)
    return hasher.hexdigest()


def _chat_template(directory: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    named = {
        path.stem: _read_template(path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    path = directory / "chat_template.jinja"
    if path.is_file():
        default = _read_template(path)
        return {"default": default, **named} if named else default
    template = config.get("chat_template")
    if isinstance(template, list):  # the older spelling of several named templates
        template = {
            entry["name"]: entry["template"] for entry in template if isinstance(entry, dict) and entry.keys() >= _ENTRY
        }
    if isinstance(template, dict):
        return {str(name): str(source) for name, source in template.items()} | named
    return template if isinstance(template, str) else None


_ENTRY = {"name", "template"}


def _read_template(path: Path) -> str:
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise AdapterInvalid(f"{path.name} is larger than {MAX_TEMPLATE_BYTES} bytes; a chat template is a few KB.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterInvalid(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _eos_token_ids(directory: Path) -> tuple[int, ...] | None:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if isinstance(ids, list) and all(isinstance(token_id, int) for token_id in ids):
            return tuple(ids)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterInvalid(f"{path.name} must hold a JSON object.")
    return content
