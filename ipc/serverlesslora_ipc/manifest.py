"""What lies where in a published backbone; travels as a second, small piece of sealed memory."""

from __future__ import annotations

import os

import msgspec
import xxhash

from serverlesslora_ipc import sealed


class ManifestInvalid(Exception):
    """The memory does not hold a manifest, or one that does not fit the weights."""


class TensorSpec(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name, as in "bfloat16"
    offset: int  # bytes
    size: int  # bytes


class Manifest(msgspec.Struct, frozen=True, tag=True):
    """Enough to rebuild the model without its directory; only the tokenizer is still read from there."""

    model: str  # directory or hub id, as it was given
    architecture: str  # name of the class in transformers
    config: str  # JSON
    generation_config: str  # JSON
    dtype: str  # of the backbone as a whole; single tensors may differ
    tensors: tuple[TensorSpec, ...]  # parameters, in memory order
    buffers: tuple[TensorSpec, ...]  # persistent or not, and plain tensor attributes; in memory order, after `tensors`
    aliases: dict[str, str]  # tied parameter -> the name it is stored under
    total_bytes: int
    content_digest: str  # xxh3_128 over the whole region
    tokenizer: str | None = None  # directory or hub id; None where the model came without one
    revision: str | None = None

    @property
    def layout_digest(self) -> str:
        """Equal for two backbones exactly when a worker prepared for one could map the other."""
        layout = (self.architecture, self.config, self.dtype, self.tensors, self.buffers, sorted(self.aliases.items()))
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(layout))


def seal(manifest: Manifest) -> int:
    """Puts the manifest into sealed memory; returns its read-only descriptor."""
    return sealed.seal_bytes("slora-manifest", msgspec.msgpack.encode(manifest))


def read(fd: int) -> Manifest:
    """Reads the manifest without moving a file position (the descriptor is shared)."""
    try:
        manifest = msgspec.msgpack.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=Manifest)
    except msgspec.MsgspecError as error:
        raise ManifestInvalid(f"not a manifest: {error}") from error
    end = 0
    for spec in (*manifest.tensors, *manifest.buffers):
        if spec.offset < end or spec.size < 0:
            raise ManifestInvalid(f"{spec.name} overlaps the tensor before it")
        end = spec.offset + spec.size
    if end > manifest.total_bytes:
        raise ManifestInvalid(f"tensors end at {end}, the region at {manifest.total_bytes}")
    return manifest
