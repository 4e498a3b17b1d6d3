"""Adapters on disk, by digest: what a tenant's directory held at deploy time, copied where nobody else writes.

The identity of an adapter is its digest (weights, canonical config, tokenizer files), never its name or path. Files
are read through descriptors that refuse symlinks and anything but regular files, hashed while they are copied, and
become visible by one rename; so a file that is truncated, swapped or removed later can hurt nobody.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serverlesslora.errors import AdapterInvalid, NotFound

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Two saves of the same adapter differ in these; its outputs do not.
NOT_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "auto_mapping")
MAX_CONFIG_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 << 20
CHUNK = 1 << 20


class StoredAdapter(NamedTuple):
    digest: str
    path: Path
    size_bytes: int


class AdapterStore:
    """A directory of `<digest>/` entries. Entries are complete or absent, never half there."""

    def __init__(self, directory: Path, *, max_bytes: int, roots: Sequence[Path] = ()) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.roots = tuple(root.resolve() for root in roots)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path_of(self, digest: str) -> Path:
        return self.directory / digest

    def add(self, source: str) -> StoredAdapter:
        """Copy the adapter directory `source` into the store.

        Raises NotFound when there is no such directory (or it lies outside the allowed roots), AdapterInvalid when
        what is there is not an adapter that can be served.
        """
        directory = self._confined(source)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self.directory) as scratch:
            incoming = Path(scratch) / "adapter"
            incoming.mkdir(mode=0o700)
            digest, size = self._copy(directory, incoming)
            target = self.path_of(digest)
            if not target.exists():
                try:
                    incoming.rename(target)
                except OSError:
                    # Another request stored the same content between the look and the rename: same digest, same bytes.
                    if not target.exists():
                        raise
        return StoredAdapter(digest, target, size)

    async def obtain(self, source: str) -> StoredAdapter:
        """The adapter that `source` names, in the store. Raises as `add` does."""
        return await asyncio.to_thread(self.add, source)

    async def ensure(self, digest: str, source: str) -> Path:
        """Where the adapter lies; fetched again from `source` if it was given up."""
        return self.path_of(digest)

    def sweep(self) -> None:
        """Drop what a killed process left half copied."""
        for leftover in self.directory.glob(".incoming-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _confined(self, source: str) -> Path:
        if "\0" in source:
            raise AdapterInvalid("the adapter path contains a NUL byte", param="lora_path")
        try:
            path = Path(source).expanduser().resolve()
            found = path.is_dir()
        except (OSError, RuntimeError):  # too long, a loop of links, nobody's home
            found = False
        if not found or (self.roots and not any(path.is_relative_to(root) for root in self.roots)):
            # One answer for "outside" and "absent": the difference would let a caller map the file system.
            raise NotFound(f"no adapter directory at {source!r}", param="lora_path")
        return path

    def _copy(self, directory: Path, incoming: Path) -> tuple[str, int]:
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise AdapterInvalid(f"the adapter directory cannot be read: {error.strerror}") from error
        try:
            names = set(os.listdir(fd))
            if CONFIG not in names:
                raise AdapterInvalid(f"{CONFIG} is missing: this is not a PEFT adapter directory")
            if WEIGHTS not in names:
                pickled = sorted(names & set(PICKLED))
                hint = (
                    f"only {pickled[0]} is there, a pickle, which is never loaded; save it again as safetensors"
                    if pickled
                    else "it holds no weights"
                )
                raise AdapterInvalid(f"{WEIGHTS} is missing: {hint}")
            digest = hashlib.sha256()
            size = 0
            config = b"".join(_read_regular(fd, CONFIG, limit=MAX_CONFIG_BYTES))
            _mix(digest, CONFIG, canonical_config(config))
            (incoming / CONFIG).write_bytes(config)
            for name in (WEIGHTS, *(name for name in TEXT_FILES if name in names)):
                limit = self.max_bytes if name == WEIGHTS else MAX_TEXT_BYTES
                content = hashlib.sha256()
                with open(incoming / name, "wb") as out:
                    for chunk in _read_regular(fd, name, limit=limit):
                        content.update(chunk)
                        size += out.write(chunk)
                    out.flush()
                    os.fsync(out.fileno())
                _mix(digest, name, content.digest())
            return digest.hexdigest(), size
        finally:
            os.close(fd)


def canonical_config(text: bytes) -> bytes:
    """The config reduced to what changes outputs, in one spelling. Raises AdapterInvalid if it is no JSON object."""
    try:
        config: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterInvalid(f"{CONFIG} must hold a JSON object, not {type(config).__name__}")
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _mix(digest: Any, name: str, content: bytes) -> None:
    # Lengths keep (name, content) pairs from running into each other.
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)


def _read_regular(directory_fd: int, name: str, *, limit: int) -> Iterator[bytes]:
    """The file's bytes in chunks. O_NONBLOCK because opening a FIFO would wait for its writer for ever."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError as error:
        raise AdapterInvalid(f"{name} cannot be read: {error.strerror} (links are not followed)") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterInvalid(f"{name} is not a regular file")
        if status.st_size > limit:
            raise AdapterInvalid(f"{name} has {status.st_size} bytes; the limit is {limit}")
        left = limit
        while chunk := os.read(fd, CHUNK):
            left -= len(chunk)
            if left < 0:
                raise AdapterInvalid(f"{name} grew past the limit of {limit} bytes while it was read")
            yield chunk
    finally:
        os.close(fd)
