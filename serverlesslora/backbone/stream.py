"""The fast way from a checkpoint into a region: bytes of its files, read once, straight to where they belong.

It is open where the checkpoint's tensors are the model's parameters. Whether they are is not guessed: transformers
loads placeholders of the same names and shapes, of which no byte is ever touched, and each parameter that comes out as
the very placeholder that went in needs nothing but the bytes from the file (and their type changed on the way). Names
it maps, what it ties, ignores, or computes by itself, such as buffers, are thus right by construction. Where it
converts a tensor, this way declines and says why.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from serverlesslora.backbone import layout

_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_MAP_NORESERVE = 0x4000  # mmap has no name for it before Python 3.13
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_IGNORED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # buffers that older releases saved
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Declined(Exception):
    """This checkpoint must be loaded by transformers; the message says why."""


class _Entry(msgspec.Struct, frozen=True):
    """How safetensors describes a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class FileSource:
    """A tensor as it lies in a mapped file, in the type it is wanted in. Copying it reads it, on all of torch's threads
    at once."""

    def __init__(self, stored: Tensor, wanted: torch.dtype) -> None:
        self._stored = stored  # flat
        self._wanted = wanted

    def read_into(self, target: Tensor, start: int) -> None:
        if self._stored.dtype == self._wanted:
            target.copy_(self._stored.view(torch.uint8)[start : start + len(target)])
        else:
            values, first = target.view(self._wanted), start // self._wanted.itemsize
            values.copy_(self._stored[first : first + len(values)])


class _Stored(NamedTuple):
    values: Tensor  # flat, over the mapped file
    shape: tuple[int, ...]


class Streamed(NamedTuple):
    """A module whose parameters hold placeholders, and the bytes they stand for."""

    module: transformers.PreTrainedModel
    sources: dict[int, FileSource]  # by the address of the placeholder

    def source(self, tensor: Tensor) -> FileSource | None:
        return self.sources.get(tensor.data_ptr())


def open_stream(model: str, config: transformers.PreTrainedConfig, dtype: torch.dtype) -> Streamed:
    """Raises Declined."""
    directory = Path(model)
    if not directory.is_dir():
        raise Declined("the model is not a local directory")
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise Declined(f"{type(config).__name__} stands for no single architecture")
    architecture: Any = found
    if architecture.config_class is not type(config):
        raise Declined(f"{architecture.__name__} is a part of what {type(config).__name__} describes")
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        raise Declined("the config names other files")
    if converted := _converted(architecture, config):
        raise Declined(f"transformers converts {converted}")
    stored = dict(_read_headers(directory))
    placeholders = _placeholders(stored, dtype)
    try:
        module, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(placeholders),
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # for `info` to name them
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise Declined(f"transformers takes no placeholders: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise Declined(f"{kind.replace('_', ' ')}: {sorted(str(key) for key in info[kind])[0]}")
    names = {tensor.data_ptr(): name for name, tensor in placeholders.items()}
    _check_kept(module, placeholders, names)
    module.config.name_or_path = model
    if module.can_generate():
        _read_generation_config(module, directory)
    sources = {address: FileSource(stored[name].values, placeholders[name].dtype) for address, name in names.items()}
    return Streamed(module, sources)


def _converted(architecture: Any, config: transformers.PreTrainedConfig) -> str:
    """The first pattern that transformers would split, join or permute, or nothing."""
    with torch.device("meta"), no_init_weights():
        tree = architecture._from_config(config)
    for conversion in get_model_conversion_mapping(tree):
        if isinstance(conversion, WeightConverter):
            return str(conversion.source_patterns[0])
    return ""


def _check_kept(module: transformers.PreTrainedModel, placeholders: dict[str, Tensor], names: dict[int, str]) -> None:
    """Everything that is loaded came out as it went in, and nothing went in that is not known to be ignored: which of
    two tied parameters is used, for one, depends on what they contain."""
    unused = set(names.values())
    for name, value in module.state_dict(keep_vars=True).items():
        found = names.get(value.data_ptr())
        if found is None or not _is_same(value, placeholders[found]):
            raise Declined(f"{name} is converted")
        unused.discard(found)
    ignored = re.compile(
        "|".join(f"({each})" for each in (*_IGNORED, *(module._keys_to_ignore_on_load_unexpected or ())))
    )
    for name in sorted(unused):
        if not ignored.search(name):
            raise Declined(f"{name} is in the files and not used")


def _is_same(value: Tensor, placeholder: Tensor) -> bool:
    """Given that both begin at the same address."""
    return (value.shape, value.dtype, value.stride()) == (placeholder.shape, placeholder.dtype, placeholder.stride())


def _read_generation_config(module: transformers.PreTrainedModel, directory: Path) -> None:
    """As `from_pretrained` does when it is given a path."""
    read = transformers.GenerationConfig.from_pretrained
    try:
        module.generation_config = read(directory)
    except OSError:  # there is none
        module.generation_config = read(directory, config_file_name="config.json", _from_model_config=True)


def _read_headers(directory: Path) -> Iterator[tuple[str, _Stored]]:
    """Every tensor of the files. They stay mapped for as long as one of these is used."""
    for path in _weight_files(directory):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise Declined(f"{path.name} is not a safetensors file")
            header = file.read(length)
            mapped = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ)
        try:
            raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
            raw.pop("__metadata__", None)
            entries = {name: msgspec.json.decode(each, type=_Entry) for name, each in raw.items()}
        except msgspec.MsgspecError as error:
            raise Declined(f"{path.name} is not a safetensors file: {error}") from error
        for name, entry in entries.items():
            yield name, _stored(path.name, mapped, 8 + length, name, entry)


def _stored(file: str, mapped: mmap.mmap, start: int, name: str, entry: _Entry) -> _Stored:
    begin, end = entry.data_offsets
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise Declined(f"{name} is stored as {entry.dtype}")
    count = math.prod(entry.shape)
    if not 0 <= begin <= end <= len(mapped) - start or end - begin != count * dtype.itemsize:
        raise Declined(f"{file} is truncated, or its header is wrong about {name}")
    if not count or (start + begin) % dtype.itemsize:
        raise Declined(f"{name} is empty or not aligned in {file}")
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return _Stored(torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin), entry.shape)


def _weight_files(directory: Path) -> list[Path]:
    """The files transformers would read."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    try:
        index = json.loads((directory / _INDEX).read_text())
        return [directory / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Declined(f"neither {_SINGLE} nor a usable {_INDEX} is there") from error


def _placeholders(stored: dict[str, _Stored], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of addresses of their own in memory that is promised and never touched. Of the type that is wanted, so
    that nothing is converted."""
    wanted = {
        name: dtype if each.values.dtype.is_floating_point else each.values.dtype for name, each in stored.items()
    }
    sizes = {name: math.prod(each.shape) * wanted[name].itemsize for name, each in stored.items()}
    places, room = layout.offsets([(name,) for name in stored], sizes)
    try:
        promised = mmap.mmap(-1, max(room, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:  # a limit on addresses, or a kernel that promises only what it has
        raise Declined(f"{room >> 20} MiB of addresses cannot be had: {error.strerror}") from error
    memory = torch.frombuffer(promised, dtype=torch.uint8)
    return {
        name: memory[place : place + sizes[name]].view(wanted[name]).view(stored[name].shape)
        for name, place in places.items()
    }
