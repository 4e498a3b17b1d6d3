"""Reads a safetensors file into one private buffer: never mapped, never pickled, every byte accounted for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from serverlesslora.errors import AdapterInvalid

MAX_HEADER_BYTES = 16 << 20
MAX_NAME_CHARS = 500
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def read_tensors(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the file, cast to `dtype`, finite, as views of one contiguous buffer per dtype in the file."""
    try:
        with path.open("rb") as file:
            header, data = _read(file.fileno(), path.name)
    except OSError as error:
        raise AdapterInvalid(f"{path.name} cannot be read: {error.strerror or error}") from error
    return _views(header, data, dtype, path.name)


def _read(fd: int, name: str) -> tuple[dict[str, Any], Tensor]:
    # read(2) only: a mapped file that somebody truncates is a SIGBUS.
    size = os.fstat(fd).st_size
    prefix = os.read(fd, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise AdapterInvalid(f"{name} is not a complete safetensors file: its header is missing or cut off")
    try:
        header = json.loads(os.read(fd, length))
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{name} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterInvalid(f"{name} is not a safetensors file: its header is not an object")
    data = torch.empty(size - 8 - length, dtype=torch.uint8)
    view, done = memoryview(cast(Any, data.numpy())), 0
    while done < len(view):
        count = os.readv(fd, [view[done:]])
        if count == 0:
            raise AdapterInvalid(f"{name} became shorter while it was read; upload the adapter again")
        done += count
    return header, data


def _views(header: dict[str, Any], data: Tensor, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    header.pop("__metadata__", None)
    if not header:
        raise AdapterInvalid(f"{name} holds no tensors")
    entries = sorted(((*_entry(key, value, name), key) for key, value in header.items()), key=lambda entry: entry[:2])
    expected = 0
    for begin, end, _, _, key in entries:
        if begin != expected:
            raise AdapterInvalid(f"{name}: the bytes of tensor {key!r} do not follow those of the tensor before it")
        expected = end
    if expected != len(data):
        problem = "cut off" if expected > len(data) else "followed by bytes that belong to no tensor"
        raise AdapterInvalid(f"{name} is {problem}: its header describes {expected} bytes, the file has {len(data)}")
    kinds = {kind for _, _, kind, _, _ in entries}
    if len(kinds) == 1:  # the usual case: cast and check the whole file in two passes
        kind = kinds.pop()
        joined = _cast(data.view(kind), dtype)
        if _finite(joined):
            splits = joined.split_with_sizes([(end - begin) // kind.itemsize for begin, end, _, _, _ in entries])
            return {key: part.view(shape) for part, (_, _, _, shape, key) in zip(splits, entries, strict=True)}
    tensors: dict[str, Tensor] = {}
    for begin, end, kind, shape, key in entries:
        piece = data[begin:end]
        if begin % kind.itemsize:
            piece = piece.clone()
        tensor = _cast(piece.view(kind), dtype).view(shape)
        if not _finite(tensor):
            raise AdapterInvalid(f"tensor {key!r} holds NaN or Inf values (as {str(dtype).removeprefix('torch.')})")
        tensors[key] = tensor
    return tensors


def _entry(key: str, value: Any, name: str) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    if len(key) > MAX_NAME_CHARS:
        raise AdapterInvalid(f"{name}: the tensor name that begins with {key[:80]!r} is too long")
    try:
        dtype_name, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise AdapterInvalid(f"{name}: the header entry of tensor {key!r} is not valid") from error
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers) or len(shape) > 8:
        raise AdapterInvalid(f"{name}: the header entry of tensor {key!r} is not valid")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise AdapterInvalid(
            f"tensor {key!r} has type {str(dtype_name)[:20]}; adapters may be {', '.join(DTYPES)}: convert it"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise AdapterInvalid(f"{name}: tensor {key!r} has shape {list(shape)} but {end - begin} bytes")
    if end == begin:
        raise AdapterInvalid(f"tensor {key!r} is empty (shape {list(shape)}): its shards were not gathered on saving")
    return begin, end, dtype, shape


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # one pass, nothing allocated; NaN wins over every number
    return math.isfinite(low.item()) and math.isfinite(high.item())
