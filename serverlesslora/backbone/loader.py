"""Loads a checkpoint through transformers and publishes it as sealed memory with a manifest."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from serverlesslora.backbone import layout
from serverlesslora.backbone.layout import TensorShape
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc.manifest import Manifest, TensorSpec
from serverlesslora_ipc.sealed import Draft

Progress = Callable[[int, int], None]  # bytes placed, bytes in all

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


class Backbone(NamedTuple):
    """Two read-only descriptors, owned by the caller, and what the second one holds."""

    weights_fd: int
    manifest_fd: int
    manifest: Manifest


def load(
    model: str,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = lambda done, total: None,
) -> Backbone:
    """`model` is a directory or a hub id. Needs memory for one copy and the largest tensor."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise BackboneInvalid(f"dtype {dtype!r} is not one of bfloat16, float16, float32")
    _return_freed_memory_early()
    _check_files(model, allow_pickle=allow_pickle)
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
    return _publish(module, description, progress)


def _publish(module: nn.Module, description: dict[str, Any], progress: Progress) -> Backbone:
    """Moves every tensor out of `module` (which is useless afterwards) into sealed memory."""
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
    shapes = {name: _shape(tensor) for name, tensor in (parameters | buffers).items()}
    sizes = {name: shape.size for name, shape in shapes.items()}
    parameter_offsets, end = layout.offsets(layout.runs({name: shapes[name] for name in parameters}), sizes)
    buffer_offsets, end = layout.offsets([(name,) for name in buffers], sizes, end)
    total = max(end, 1)

    def specs(placed: dict[str, int]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, shapes[name].shape, shapes[name].dtype, offset, shapes[name].size)
            for name, offset in placed.items()
        )

    del parameter
    for name in [*parameters, *aliases]:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = None  # from here on `parameters` holds the only reference
    tensors = parameters | buffers
    parameters.clear()
    with Draft("slora-weights", total) as draft:
        digest = xxhash.xxh3_128()
        done = 0
        for name, offset in (parameter_offsets | buffer_offsets).items():
            _write(draft, offset, tensors.pop(name))
            with memoryview(draft.map) as view:
                digest.update(view[done : offset + sizes[name]])
            done = offset + sizes[name]
            progress(done, total)
        with memoryview(draft.map) as view:
            digest.update(view[done:])
        weights_fd = draft.seal()
    manifest = Manifest(
        tensors=specs(parameter_offsets),
        buffers=specs(buffer_offsets),
        aliases=aliases,
        total_bytes=total,
        content_digest=digest.hexdigest(),
        **description,
    )
    return Backbone(weights_fd, manifests.seal(manifest), manifest)


def _write(draft: Draft, offset: int, tensor: Tensor) -> None:
    if tensor.numel():
        target = torch.frombuffer(draft.map, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        target.copy_(tensor.reshape(-1))


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


def _from_pretrained(
    model: str, *, dtype: str, revision: str | None, allow_pickle: bool
) -> transformers.PreTrainedModel:
    options: dict[str, Any] = {"revision": revision} if revision else {}
    with _silent_progress_bars():
        try:
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False, **options)
            if getattr(config, "quantization_config", None):
                raise BackboneInvalid(f"{model} is a quantised checkpoint; serve its bfloat16 or float32 original")
            module, info = transformers.AutoModelForCausalLM.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                attn_implementation="eager",
                output_loading_info=True,
                **options,
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


def _check_files(model: str, *, allow_pickle: bool) -> None:
    """Says in one sentence what transformers would say in a page."""
    directory = Path(model)
    if not directory.is_dir():
        if directory.is_absolute() or model.startswith((".", "~")):
            raise BackboneInvalid(f"there is no directory {model}")
        return  # a hub id
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
    needed, free = sum(path.stat().st_size for path in weights or pickles), available_bytes()
    if needed > free:
        raise BackboneInvalid(f"{model} needs {needed >> 20} MiB of memory, {free >> 20} MiB are available")


def available_bytes() -> int:
    """Memory that can still be had: the machine's, or what the control group leaves of it."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # no limit, or no control groups
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
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


def _return_freed_memory_early() -> None:
    """Keeps tensors over 256 KiB out of malloc's heap, so that one that was copied is really gone."""
    with contextlib.suppress(AttributeError, OSError):  # a C library without mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 << 10)
