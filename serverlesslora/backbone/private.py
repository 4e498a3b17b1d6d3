"""Weights in memory of a process's own: what each worker pays for where backbones are not shared."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

_MAP_FIXED = 0x10  # mmap has no name for it
_SLICE_BYTES = 32 << 20

Turn = Callable[[], AbstractContextManager[object]]


class PrivateMemory(NamedTuple):
    """Anonymous memory that weights can be loaded into."""

    map: mmap.mmap
    size: int

    @classmethod
    def of(cls, size: int) -> PrivateMemory:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return cls(memory, size)


def make_private(shared: mmap.mmap, fd: int, *, threads: int, cores: Collection[int], turn: Turn) -> None:
    """Puts a private copy of all of `fd` in the place of `shared`, its mapping.

    The address stays the same, so every tensor, and whatever else was made of them before a fork, stays as it is; of
    the shared pages none is mapped any more. Each `turn` copies one slice per thread; the threads may run on `cores`
    (none given: where the caller may). Raises OSError when memory is short; `shared` must not be used any more then.
    """
    size, address = len(shared), _address(shared)
    _map_over(address, size)
    view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    starts = range(0, size, _SLICE_BYTES)
    cores = cores or os.sched_getaffinity(0)
    with ThreadPoolExecutor(threads, "copy", os.sched_setaffinity, (0, cores)) as pool:
        for first in range(0, len(starts), threads):
            with turn():
                list(pool.map(lambda start: _read_slice(fd, view, start), starts[first : first + threads]))
    protect(shared)


def protect(memory: mmap.mmap) -> None:
    """A stray write ends the process from here on, as it would on shared memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(_address(memory)), ctypes.c_size_t(len(memory)), mmap.PROT_READ) != 0:
        raise _last_error()


def _map_over(address: int, size: int) -> None:
    """Anonymous memory where something else was mapped: who owned that mapping unmaps this one in its time."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
        raise _last_error()
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def _read_slice(fd: int, view: memoryview, start: int) -> None:
    """Reading needs no second mapping, whose pages would have to be faulted in first."""
    end = min(start + _SLICE_BYTES, len(view))
    while start < end:
        size = os.preadv(fd, [view[start:end]], start)
        if not size:
            raise OSError(f"the memory ends at {start} bytes, expected {len(view)}")
        start += size


def _address(memory: mmap.mmap) -> int:
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
