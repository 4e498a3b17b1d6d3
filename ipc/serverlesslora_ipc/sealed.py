"""Memory that is written once, sealed, and then shared by descriptor with processes that can only read it.

The seals are the kernel's: no process, not even the owner, can map the memory for writing, write to it, or change its
size afterwards. Nothing has a name in the file system, so nothing is left behind when everybody is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Any

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3
_MADV_POPULATE_READ = 22  # Linux 5.14


class NotSealed(Exception):
    """A descriptor that should be sealed read-only memory is something else."""


class Draft:
    """Memory that is still being written. `seal` ends that; leaving the context without it throws the memory away."""

    def __init__(self, name: str, size: int) -> None:
        assert size > 0
        self.size = size
        self._fd = _memfd(name)
        try:
            os.ftruncate(self._fd, size)
            self.map = mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self._fd)
            raise
        _advise_huge(self.map)

    def seal(self) -> int:
        """Seals and returns a read-only descriptor. Every view of `map` must be gone (else BufferError)."""
        self.map.close()
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BufferError):  # a failed copy may still hold a view; the memory goes with it
            self.map.close()
        os.close(self._fd)


def seal_bytes(name: str, data: bytes) -> int:
    with Draft(name, len(data)) as draft:
        draft.map[:] = data
        return draft.seal()


def check_sealed(fd: int) -> None:
    """Raises NotSealed unless `fd` is read-only and carries every seal: received memory is checked before use."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise NotSealed("the descriptor is not a memory file") from error
    if seals & SEALS != SEALS:
        raise NotSealed(f"seals are {seals:#x}, expected {SEALS:#x}")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise NotSealed("the descriptor is open for writing")


def map_readonly(fd: int, size: int | None = None) -> mmap.mmap:
    """Maps the whole of `fd` (which must be `size` bytes, if given) for reading; the descriptor may be closed after."""
    actual = os.fstat(fd).st_size
    if size is not None and size != actual:
        raise NotSealed(f"the memory holds {actual} bytes, expected {size}")
    region = mmap.mmap(fd, actual, mmap.MAP_SHARED, mmap.PROT_READ)
    _advise_huge(region)
    return region


def populate(region: mmap.mmap) -> bool:
    """Fills this process's page tables for all of `region`; False where the kernel cannot.

    Called on a thread of its own it saves the first pass over the memory its page faults: it goes through ctypes
    because `mmap.madvise` would hold the interpreter lock all the while.
    """
    with _address(region) as address:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(region)), _MADV_POPULATE_READ)
    return bool(done == 0)


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)  # an older kernel


def _advise_huge(region: mmap.mmap) -> None:
    with contextlib.suppress(OSError):  # a kernel without huge pages for shared memory
        region.madvise(mmap.MADV_HUGEPAGE)


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


@contextlib.contextmanager
def _address(region: Any) -> Iterator[int]:
    """Where a read-only buffer lies; ctypes itself only tells for writable ones. The buffer stays pinned inside."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(region), ctypes.byref(buffer), 0)
    try:
        yield buffer.buf
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
