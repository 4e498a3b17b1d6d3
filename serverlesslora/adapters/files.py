"""Which files an adapter may have, how large they may be, and its identity: the digest of what changes outputs.

Files are read through descriptors that refuse symlinks and anything but regular files, so that what is hashed is what
is kept, whatever happens to a path meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from serverlesslora.errors import AdapterInvalid

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
KNOWN_FILES = (CONFIG, WEIGHTS, *TEXT_FILES)
# Two saves of the same adapter differ in these; its outputs do not.
NOT_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "auto_mapping")
MAX_CONFIG_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 << 20
CHUNK = 1 << 20
_THEIR_FAULT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV)


class Identity(NamedTuple):
    digest: str
    size_bytes: int  # of weights and tokenizer files


def limit_of(name: str, max_bytes: int) -> int:
    """Bytes the file may have; `max_bytes` is for the weights."""
    return {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: max_bytes}.get(name, MAX_TEXT_BYTES)


def check_size(name: str, size: int, max_bytes: int) -> None:
    """Raises AdapterInvalid."""
    if size > (limit := limit_of(name, max_bytes)):
        raise AdapterInvalid(f"{name} has {size} bytes; the limit is {limit}", param="lora_path")


def wanted_files(names: Collection[str]) -> tuple[str, ...]:
    """Of what lies beside each other, the files that are an adapter. Raises AdapterInvalid when it is none."""
    if CONFIG not in names:
        raise AdapterInvalid(f"{CONFIG} is missing: this is not a PEFT adapter directory")
    if WEIGHTS not in names:
        pickled = sorted(set(names) & set(PICKLED))
        hint = (
            f"only {pickled[0]} is there, a pickle, which is never loaded; save it again as safetensors"
            if pickled
            else "it holds no weights"
        )
        raise AdapterInvalid(f"{WEIGHTS} is missing: {hint}")
    return tuple(name for name in KNOWN_FILES if name in names)


def identify(
    directory: Path,
    *,
    max_bytes: int,
    copy_to: Path | None = None,
    confine: Callable[[Path], None] = lambda opened: None,
) -> Identity:
    """Read an adapter's files once, copying what is read.

    `confine` may refuse the directory that was opened: a path can lead elsewhere than when it was looked at. Raises
    AdapterInvalid, and OSError for what is not the directory's fault.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable("the adapter directory cannot be read", error) from error
    try:
        confine(Path(os.readlink(f"/proc/self/fd/{fd}")))
        size = 0
        digest = hashlib.sha256()
        for name in wanted_files(_names_in(fd)):
            chunks = read_regular(fd, name, limit=limit_of(name, max_bytes))
            if copy_to is not None:
                chunks = _copied(chunks, copy_to / name)
            if name == CONFIG:
                content = canonical_config(b"".join(chunks))
            else:
                hasher = hashlib.sha256()
                for chunk in chunks:
                    hasher.update(chunk)
                    size += len(chunk)
                content = hasher.digest()
            # Lengths keep (name, content) pairs from running into each other.
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        return Identity(digest.hexdigest(), size)
    finally:
        os.close(fd)


def _names_in(directory_fd: int) -> list[str]:
    """Of the files that matter, those there are. The directory is not listed: it may hold a million others."""
    found = []
    for name in (*KNOWN_FILES, *PICKLED):
        try:
            os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(f"{name} cannot be read", error) from error
        found.append(name)
    return found


def _unreadable(what: str, error: OSError) -> Exception:
    """The fault of the directory, or our own: no descriptors are left, or a disk fails."""
    return AdapterInvalid(f"{what}: {error.strerror}") if error.errno in _THEIR_FAULT else error


def canonical_config(text: bytes) -> bytes:
    """The config reduced to what changes outputs, in one spelling. Raises AdapterInvalid if it is no JSON object."""
    try:
        config: Any = json.loads(text)
        if not isinstance(config, dict):
            raise AdapterInvalid(f"{CONFIG} must hold a JSON object, not {type(config).__name__}")
        kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
        return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as error:  # writing may nest deeper than reading did
        raise AdapterInvalid(f"{CONFIG} is not valid JSON: {error}") from error


def _copied(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    with open(path, "wb") as out:
        for chunk in chunks:
            out.write(chunk)
            yield chunk
        out.flush()
        os.fsync(out.fileno())


def read_regular(directory_fd: int, name: str, *, limit: int) -> Iterator[bytes]:
    """The file's bytes in chunks. O_NONBLOCK because opening a FIFO would wait for its writer for ever."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError as error:
        raise _unreadable(f"{name} cannot be read (links are not followed)", error) from error
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
