"""Loads a checkpoint and describes it in a manifest: as sealed memory on the host, as a device's shared memory, or as
memory of this process's own.

What it takes from transformers: the module tree, every conversion of checkpoints it knows, and what it computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from serverlesslora.backbone import layout
from serverlesslora.backbone.destination import (
    Destination,
    DeviceDestination,
    HostDestination,
    Piece,
    Progress,
    Source,
    fill,
)
from serverlesslora.backbone.layout import TensorShape
from serverlesslora.backbone.private import PrivateMemory, protect
from serverlesslora.backbone.stream import Declined, Streamed, open_stream
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc.cuda.driver import Driver
from serverlesslora_ipc.cuda.region import Publication, RegionDraft
from serverlesslora_ipc.manifest import Manifest, TensorSpec
from serverlesslora_ipc.sealed import Draft

log = logging.getLogger("serverlesslora.backbone")

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
_M_MMAP_THRESHOLD = -3  # glibc's mallopt


class BackboneInvalid(Exception):
    """The checkpoint cannot be served; the message says why and what to do."""


class LoadReport(NamedTuple):
    """How a backbone was loaded; no process start, but what transformers imports for a model is in `open_s`."""

    path: Literal["stream", "transformers"]
    declined: str  # why not streamed; empty where it was
    size_bytes: int
    open_s: float  # the module tree and the layout; conversions, where not streamed
    copy_s: float  # files to region, and the digest

    @property
    def seconds(self) -> float:
        return self.open_s + self.copy_s

    @property
    def gb_s(self) -> float:
        return self.size_bytes / max(self.copy_s, 1e-9) / 1e9

    def __str__(self) -> str:
        why = f" ({self.declined})" if self.declined else ""
        size = f"{self.size_bytes / 1e9:.2f} GB"
        return f"{size} by {self.path}{why}: {self.open_s:.2f} s + {self.copy_s:.2f} s at {self.gb_s:.2f} GB/s"


class Backbone(NamedTuple):
    """Two read-only descriptors, owned by the caller, and what the second one holds."""

    weights_fd: int
    manifest_fd: int
    manifest: Manifest


class Placed(NamedTuple):
    manifest: Manifest
    report: LoadReport


class DeviceBackbone(NamedTuple):
    """A publication and a read-only descriptor, both owned by the caller."""

    publication: Publication
    manifest_fd: int
    manifest: Manifest
    report: LoadReport


class PrivateBackbone(NamedTuple):
    weights: mmap.mmap
    manifest: Manifest
    report: LoadReport


def load(
    model: str,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = lambda done, total: None,
) -> Backbone:
    """Into sealed host memory. `model` is a directory or a hub id. Needs memory for one copy and the largest tensor."""
    found = contents(model, dtype=dtype, revision=revision, allow_pickle=allow_pickle)
    with Draft("slora-weights", found.manifest.total_bytes) as draft:
        manifest, report = found.place(HostDestination(draft), progress)
        weights_fd = draft.seal()
    log.info("%s: %s", model, report)
    return Backbone(weights_fd, manifests.seal(manifest), manifest)


def load_to_device(
    model: str,
    driver: Driver,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = lambda done, total: None,
) -> DeviceBackbone:
    """The same bytes, into device memory. What is streamed needs no host memory but the ring it goes through."""
    found = contents(model, dtype=dtype, revision=revision, allow_pickle=allow_pickle, onto_device=True)
    with RegionDraft(driver, found.manifest.total_bytes) as draft:
        with DeviceDestination(driver, draft.address, draft.size) as destination:
            manifest, report = found.place(destination, progress)
        publication = draft.publish()
    log.info("%s: %s", model, report)
    return DeviceBackbone(publication, manifests.seal(manifest), manifest, report)


def load_private(
    model: str, *, dtype: str = "bfloat16", revision: str | None = None, allow_pickle: bool = False
) -> PrivateBackbone:
    """The same bytes, into memory nobody else sees, read-only when it is full."""
    found = contents(model, dtype=dtype, revision=revision, allow_pickle=allow_pickle)
    memory = PrivateMemory.of(found.manifest.total_bytes)
    manifest, report = found.place(HostDestination(memory))
    protect(memory.map)
    log.info("%s: %s", model, report)
    return PrivateBackbone(memory.map, manifest, report)


class Contents:
    """A checkpoint laid out: what goes where, and where it comes from."""

    def __init__(self, manifest: Manifest, pieces: list[Piece], declined: str, open_s: float) -> None:
        self.manifest = manifest  # without a content digest yet
        self._pieces = pieces
        self._declined = declined
        self._open_s = open_s

    def place(self, destination: Destination, progress: Progress = lambda done, total: None) -> Placed:
        """Once: each piece is forgotten here, so that its memory can go when it was written."""
        started = time.monotonic()
        digest = fill(destination, self._take_pieces(), progress)
        path: Literal["stream", "transformers"] = "transformers" if self._declined else "stream"
        report = LoadReport(
            path, self._declined, self.manifest.total_bytes, self._open_s, copy_s=time.monotonic() - started
        )
        return Placed(msgspec.structs.replace(self.manifest, content_digest=digest), report)

    def _take_pieces(self) -> Iterator[Piece]:
        self._pieces.reverse()
        while self._pieces:
            yield self._pieces.pop()


def contents(
    model: str,
    *,
    dtype: str,
    revision: str | None = None,
    allow_pickle: bool = False,
    onto_device: bool = False,
    streams: bool = True,
) -> Contents:
    """Raises BackboneInvalid. The checkpoint's files stay mapped until it was placed."""
    started = time.monotonic()
    if dtype not in ("bfloat16", "float16", "float32"):
        raise BackboneInvalid(f"dtype {dtype!r} is not one of bfloat16, float16, float32")
    _return_freed_memory_early()
    num_bytes = _check_files(model, allow_pickle=allow_pickle)
    config = _read_config(model, revision)
    streamed, declined = None, "not asked for"
    if streams:
        try:
            with _silent_progress_bars(), _silent_warnings():
                streamed, declined = open_stream(model, config, getattr(torch, dtype)), ""
        except Declined as error:
            declined = str(error)
    if streamed is None or not onto_device:
        _check_host_memory(model, num_bytes)
    if streamed is not None:
        module = streamed.module
    else:
        module = _from_pretrained(model, dtype=dtype, revision=revision, allow_pickle=allow_pickle)
    description = {
        "model": model,
        "architecture": type(module).__name__,
        "config": json.dumps(module.config.to_dict(), default=str),
        "generation_config": json.dumps(module.generation_config.to_dict() if module.generation_config else {}),
        "dtype": dtype,
        "tokenizer": _tokenizer_directory(model, revision),
        "revision": revision,
    }
    manifest, pieces = _lay_out(module, description, streamed)
    return Contents(manifest, pieces, declined, time.monotonic() - started)


class _TensorSource:
    """A tensor in host memory, or one that transformers left in its file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read_into(self, target: Tensor, start: int) -> None:
        if not self._tensor.is_contiguous():
            self._tensor = self._tensor.contiguous()
        target.copy_(self._tensor.reshape(-1).view(torch.uint8)[start : start + len(target)])


def _lay_out(module: nn.Module, description: dict[str, Any], streamed: Streamed | None) -> tuple[Manifest, list[Piece]]:
    """Moves every tensor out of `module`, which is useless afterwards."""
    parameters: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = stored.setdefault(id(parameter), name)
        if first == name:
            parameters[name] = parameter.detach()
        else:
            aliases[name] = first
    buffers = dict(_plain_tensors(module))
    tensors = parameters | buffers
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    sizes = {name: shape.size for name, shape in shapes.items()}
    parameter_offsets, end = layout.offsets(layout.runs({name: shapes[name] for name in parameters}), sizes)
    buffer_offsets, end = layout.offsets([(name,) for name in buffers], sizes, end)

    def specs(placed: dict[str, int]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, shapes[name].shape, shapes[name].dtype, offset, shapes[name].size)
            for name, offset in placed.items()
        )

    def source(name: str) -> Source:
        found = streamed.source(tensors[name]) if streamed else None
        return found or _TensorSource(tensors[name])

    for name in [*parameters, *aliases]:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = None  # from here on the pieces hold the only reference
    pieces = [
        Piece(offset, sizes[name], source(name))
        for name, offset in (parameter_offsets | buffer_offsets).items()
        if sizes[name]
    ]
    manifest = Manifest(
        tensors=specs(parameter_offsets),
        buffers=specs(buffer_offsets),
        aliases=aliases,
        total_bytes=max(end, 1),
        content_digest="",
        **description,
    )
    return manifest, pieces


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, persistent or not, and tensors kept as ordinary attributes.

    What a module computed when it was built (inverse frequencies, embedding scales) cannot be computed again on the
    meta device.
    """
    for prefix, owner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, value in (*owner._buffers.items(), *vars(owner).items()):
            if isinstance(value, Tensor):
                yield dot + name, value.detach()


def _shape(tensor: Tensor) -> TensorShape:
    return TensorShape(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        size=tensor.numel() * tensor.element_size(),
    )


def _read_config(model: str, revision: str | None) -> transformers.PreTrainedConfig:
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False, **_at(revision))
    except (OSError, ValueError, ImportError) as error:
        raise BackboneInvalid(f"{model} cannot be loaded: {error}") from error
    if getattr(config, "quantization_config", None):
        raise BackboneInvalid(f"{model} is a quantised checkpoint; serve its bfloat16 or float32 original")
    assert isinstance(config, transformers.PreTrainedConfig)
    return config


def _at(revision: str | None) -> dict[str, Any]:
    return {"revision": revision} if revision else {}


def _from_pretrained(
    model: str, *, dtype: str, revision: str | None, allow_pickle: bool
) -> transformers.PreTrainedModel:
    with _silent_progress_bars():
        try:
            module, info = transformers.AutoModelForCausalLM.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                attn_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `info` names them
                **_at(revision),
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise BackboneInvalid(f"{model} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise BackboneInvalid(
            f"{model} lacks {len(missing)} weights its config asks for (or has them in another shape), "
            f"the first is {missing[0]}: the checkpoint is incomplete, or it is not a causal language model"
        )
    assert isinstance(module, transformers.PreTrainedModel)
    return module


def _check_files(model: str, *, allow_pickle: bool) -> int:
    """Says in one sentence what transformers would say in a page; returns the bytes of the weights, 0 if remote."""
    directory = Path(model)
    if not directory.is_dir():
        if directory.is_absolute() or model.startswith((".", "~")):
            raise BackboneInvalid(f"there is no directory {model}")
        return 0  # a hub id
    if not (directory / "config.json").is_file():
        raise BackboneInvalid(f"{model} holds no config.json: it is not a Hugging Face model directory")
    weights = sorted(directory.glob("*.safetensors"))
    pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
    if not weights and pickles and not allow_pickle:
        raise BackboneInvalid(
            f"{model} holds only pickled weights ({pickles[0].name}), which may run code when they are read: "
            "convert them to safetensors, or allow pickle for this backbone if you trust its author"
        )
    if not weights and not pickles:
        raise BackboneInvalid(f"{model} holds no *.safetensors weights")
    return sum(path.stat().st_size for path in weights or pickles)


def _check_host_memory(model: str, needed: int) -> None:
    free = available_bytes()
    if needed > free:
        raise BackboneInvalid(f"{model} needs {needed >> 20} MiB of memory, {free >> 20} MiB are available")


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be had: the machine's, or what the control group leaves of it."""
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # no limit, or no control groups
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, such as a checkpoint that was just fetched, but give way.
        used = int((group / "memory.current").read_text()) - int(counts.get("inactive_file", 0))
        free = min(free, limit - used)
    return free


def _tokenizer_directory(model: str, revision: str | None) -> str | None:
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(model, revision=revision, allow_patterns=list(_TOKENIZER_FILES)))
    found = any(True for pattern in ("tokenizer*", "vocab*", "*.model") for _ in directory.glob(pattern))
    return str(directory.resolve()) if found else None


@contextlib.contextmanager
def _silent_progress_bars() -> Iterator[None]:
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _silent_warnings() -> Iterator[None]:
    """What is wrong with a checkpoint is said when it is loaded in earnest."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _return_freed_memory_early() -> None:
    """Keeps tensors over 256 KiB out of malloc's heap, so that one that was copied is really gone."""
    with contextlib.suppress(AttributeError, OSError):  # a C library without mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 << 10)
