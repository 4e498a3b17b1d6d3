"""The same driver over host memory, for machines without a GPU: real processes, real descriptors, real faults.

Device memory is made of memory files named after the device. A read-only mapping is one the kernel guards, so a write
to it kills the writer alone with SIGSEGV. What is used is counted from what the processes of this machine really hold,
so a leak shows here as it would on a GPU. Copies are done when the call returns, whatever the stream.

Environment, read by `start`: SERVERLESSLORA_EMULATED_BYTES (size of the device), SERVERLESSLORA_EMULATED_DEVICE (which
device this is: processes that name the same one share it) and SERVERLESSLORA_EMULATED_REFUSES (what this driver cannot
do: any of `read-only`, `fds` and `ipc`, separated by commas).
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import struct
import threading
from typing import Final, NamedTuple

from serverlesslora_ipc.cuda.driver import (
    AccessRefused,
    DeviceKind,
    DeviceMemory,
    DriverError,
    OutOfDeviceMemory,
    Pinned,
    round_up,
)
from serverlesslora_ipc.cuda.emulated_usage import held_anywhere, link_of

BYTES_VARIABLE = "SERVERLESSLORA_EMULATED_BYTES"
DEVICE_VARIABLE = "SERVERLESSLORA_EMULATED_DEVICE"
REFUSES_VARIABLE = "SERVERLESSLORA_EMULATED_REFUSES"
GRANULARITY = 64 << 10  # 2 MiB on a GPU; small here so that tests are
_DEFAULT_BYTES = 4 << 30
_CAN_REFUSE = frozenset({"read-only", "fds", "ipc"})

_IPC_HANDLE = struct.Struct("<qqqq32x")  # pid, descriptor, inode, size; as long as CUDA's

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MAP_FAILED = ctypes.c_void_p(-1).value


class _File(NamedTuple):
    fd: int
    size: int


class EmulatedDriver:
    name: Final[DeviceKind] = "emulated"

    def __init__(self) -> None:
        self._libc = _libc()
        self._file_name = ""  # empty until started
        self._total_bytes = 0
        self._refuses: frozenset[str] = frozenset()
        self._contexts = threading.local()  # what is current on each thread
        self._has_context = False
        self._numbers = itertools.count(1)
        self._handles: dict[int, _File] = {}
        self._reserved: dict[int, int] = {}  # address -> size
        self._mapped: dict[int, int] = {}  # address -> size, inside what is reserved
        self._allocated: dict[int, _File] = {}
        self._opened: dict[int, int] = {}  # address of somebody else's allocation -> size
        self._streams: set[int] = set()

    def start(self, device: int = 0) -> None:
        refuses = frozenset(filter(None, os.environ.get(REFUSES_VARIABLE, "").split(",")))
        if not refuses <= _CAN_REFUSE:
            raise DriverError(
                "start",
                f"{REFUSES_VARIABLE}={','.join(sorted(refuses))}",
                f"choose from {', '.join(sorted(_CAN_REFUSE))}",
            )
        file_name = f"emulated-{os.environ.get(DEVICE_VARIABLE, '0')}" + (f".{device}" if device else "")
        if self._file_name not in ("", file_name):
            raise DriverError("start", f"this process already uses {self._file_name}", "one process, one device")
        self._file_name = file_name
        self._total_bytes = int(os.environ.get(BYTES_VARIABLE, _DEFAULT_BYTES))
        self._refuses = refuses
        self._has_context = True
        self.make_current()

    def make_current(self) -> None:
        if not self._has_context:
            raise DriverError("cuCtxSetCurrent", "CUDA_ERROR_NOT_INITIALIZED")
        self._contexts.is_current = True

    def stop(self) -> None:
        self._has_context = False

    def device_name(self) -> str:
        return f"host memory as device {self._file_name.removeprefix('emulated-')}"

    def memory(self) -> DeviceMemory:
        self._need_context("cuMemGetInfo")
        free_bytes = self._total_bytes - sum(held_anywhere(self._file_name).values())
        return DeviceMemory(max(0, free_bytes), self._total_bytes)

    def granularity(self) -> int:
        return GRANULARITY

    def can_export_fds(self) -> bool:
        return "fds" not in self._refuses

    # --- physical memory -----------------------------------------------------------------------------------------

    def create(self, size: int) -> int:
        self._need_start("cuMemCreate")
        _check_multiple("cuMemCreate", size)
        return self._new_handle(self._memory_file("cuMemCreate", size))

    def release(self, handle: int) -> None:
        os.close(self._handles.pop(self._checked("cuMemRelease", handle)).fd)

    def export_fd(self, handle: int) -> int:
        file = self._handles[self._checked("cuMemExportToShareableHandle", handle)]
        if not self.can_export_fds():
            raise DriverError("cuMemExportToShareableHandle", "CUDA_ERROR_NOT_SUPPORTED")
        return os.dup(file.fd)

    def import_fd(self, fd: int) -> int:
        self._need_start("cuMemImportFromShareableHandle")
        if "fds" in self._refuses or not self._is_memory(fd):
            raise DriverError("cuMemImportFromShareableHandle", "CUDA_ERROR_INVALID_VALUE")
        return self._new_handle(_File(os.dup(fd), os.fstat(fd).st_size))

    # --- addresses -----------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        self._need_start("cuMemAddressReserve")
        _check_multiple("cuMemAddressReserve", size)
        # The kernel aligns to pages only; mapping at any page is all that is needed here.
        address = self._mmap("cuMemAddressReserve", None, size, _PROT_NONE, _RESERVED, -1)
        self._reserved[address] = size
        return address

    def free_address(self, address: int, size: int) -> None:
        if self._reserved.get(address) != size or self._mapped_within(address, size):
            raise DriverError("cuMemAddressFree", "CUDA_ERROR_INVALID_VALUE", "free what was reserved, once unmapped")
        del self._reserved[address]
        self._munmap(address, size)

    def map(self, address: int, size: int, handle: int) -> None:
        file = self._handles[self._checked("cuMemMap", handle)]
        inside = any(start <= address and address + size <= start + room for start, room in self._reserved.items())
        if size != file.size or not inside or self._mapped_within(address, size):
            raise DriverError("cuMemMap", "CUDA_ERROR_INVALID_VALUE", "map whole memory at free reserved addresses")
        self._mmap("cuMemMap", address, size, _PROT_NONE, mmap.MAP_SHARED | _MAP_FIXED, file.fd)
        self._mapped[address] = size

    def unmap(self, address: int, size: int) -> None:
        within = self._mapped_within(address, size)
        if sum(within.values()) != size or min(within) < address:
            raise DriverError("cuMemUnmap", "CUDA_ERROR_INVALID_VALUE", "unmap whole mappings")
        self._mmap("cuMemUnmap", address, size, _PROT_NONE, _RESERVED | _MAP_FIXED, -1)
        for start in within:
            del self._mapped[start]

    def allow(self, address: int, size: int, *, write: bool) -> None:
        _check_multiple("cuMemSetAccess", size)
        if sum(self._mapped_within(address, size).values()) < size:
            raise DriverError("cuMemSetAccess", "CUDA_ERROR_INVALID_VALUE", "map memory there first")
        if not write and "read-only" in self._refuses:
            raise AccessRefused("cuMemSetAccess", "CUDA_ERROR_NOT_SUPPORTED", "no read-only mappings with this driver")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        if self._libc.mprotect(address, size, access) != 0:
            raise _os_error("cuMemSetAccess")

    # --- ordinary allocations ------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        self._need_context("cuMemAlloc")
        file = self._memory_file("cuMemAlloc", round_up(size, GRANULARITY))
        try:
            address = self._mmap_writable("cuMemAlloc", file)
        except DriverError:
            os.close(file.fd)
            raise
        self._allocated[address] = file
        return address

    def free(self, address: int) -> None:
        file = self._allocated.pop(address, None)
        if file is None:
            raise DriverError("cuMemFree", "CUDA_ERROR_INVALID_VALUE", "free what was allocated")
        self._munmap(address, file.size)
        os.close(file.fd)

    def ipc_handle(self, address: int) -> bytes:
        if "ipc" in self._refuses:
            raise DriverError("cuIpcGetMemHandle", "CUDA_ERROR_NOT_SUPPORTED")
        file = self._allocated.get(address)
        if file is None:
            raise DriverError("cuIpcGetMemHandle", "CUDA_ERROR_INVALID_VALUE", "only what `allocate` returned")
        return _IPC_HANDLE.pack(os.getpid(), file.fd, os.fstat(file.fd).st_ino, file.size)

    def open_ipc(self, handle: bytes) -> int:
        self._need_context("cuIpcOpenMemHandle")
        if len(handle) != _IPC_HANDLE.size:
            raise DriverError("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_VALUE")
        pid, owner_fd, inode, size = _IPC_HANDLE.unpack(handle)
        if pid == os.getpid():
            raise DriverError("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_CONTEXT", "open it in another process")
        try:
            fd = os.open(f"/proc/{pid}/fd/{owner_fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DriverError("cuIpcOpenMemHandle", "CUDA_ERROR_MAP_FAILED") from error
        try:
            status = os.fstat(fd)
            if not self._is_memory(fd) or (status.st_ino, status.st_size) != (inode, size):
                raise DriverError("cuIpcOpenMemHandle", "CUDA_ERROR_MAP_FAILED")
            address = self._mmap_writable("cuIpcOpenMemHandle", _File(fd, size))
        finally:
            os.close(fd)
        self._opened[address] = size
        return address

    def close_ipc(self, address: int) -> None:
        size = self._opened.pop(address, None)
        if size is None:
            raise DriverError("cuIpcCloseMemHandle", "CUDA_ERROR_INVALID_VALUE", "close what was opened")
        self._munmap(address, size)

    # --- host memory and copies ----------------------------------------------------------------------------------

    def pinned(self, size: int) -> Pinned:
        self._need_context("cuMemHostAlloc")
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = self._mmap("cuMemHostAlloc", None, size, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        return Pinned(address, size, lambda address: self._munmap(address, size))

    def copy_in(self, device_address: int, host_address: int, size: int, stream: int = 0) -> None:
        self._need_stream("cuMemcpyHtoDAsync", stream)
        ctypes.memmove(device_address, host_address, size)

    def copy_out(self, host_address: int, device_address: int, size: int, stream: int = 0) -> None:
        self._need_stream("cuMemcpyDtoHAsync", stream)
        ctypes.memmove(host_address, device_address, size)

    def create_stream(self) -> int:
        self._need_context("cuStreamCreate")
        stream = next(self._numbers)
        self._streams.add(stream)
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._need_stream("cuStreamDestroy", stream)
        self._streams.remove(stream)

    def synchronize(self, stream: int = 0) -> None:
        self._need_stream("cuStreamSynchronize", stream)

    # --- the same mistakes fail here as on a GPU -----------------------------------------------------------------

    def _need_start(self, call: str) -> None:
        if not self._file_name:
            raise DriverError(call, "CUDA_ERROR_NOT_INITIALIZED")

    def _need_context(self, call: str) -> None:
        self._need_start(call)
        if not (self._has_context and getattr(self._contexts, "is_current", False)):
            raise DriverError(call, "CUDA_ERROR_INVALID_CONTEXT")

    def _need_stream(self, call: str, stream: int) -> None:
        self._need_context(call)
        if stream != 0 and stream not in self._streams:
            raise DriverError(call, "CUDA_ERROR_INVALID_HANDLE", "use a stream of create_stream()")

    def _checked(self, call: str, handle: int) -> int:
        if handle not in self._handles:
            raise DriverError(call, "CUDA_ERROR_INVALID_VALUE", "use a handle that was not released")
        return handle

    def _mapped_within(self, address: int, size: int) -> dict[int, int]:
        """Every mapping that overlaps these addresses."""
        end = address + size
        return {start: length for start, length in self._mapped.items() if start < end and address < start + length}

    # --- memory files --------------------------------------------------------------------------------------------

    def _memory_file(self, call: str, size: int) -> _File:
        free_bytes = self._total_bytes - sum(held_anywhere(self._file_name).values())
        if size > free_bytes:
            raise OutOfDeviceMemory(call, "CUDA_ERROR_OUT_OF_MEMORY", f"{size} bytes asked, {max(0, free_bytes)} free")
        fd = os.memfd_create(self._file_name, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return _File(fd, size)

    def _new_handle(self, file: _File) -> int:
        handle = next(self._numbers)
        self._handles[handle] = file
        return handle

    def _is_memory(self, fd: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{fd}") == link_of(self._file_name)
        except OSError:
            return False

    def _mmap_writable(self, call: str, file: _File) -> int:
        return self._mmap(call, None, file.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fd)

    def _mmap(self, call: str, address: int | None, size: int, access: int, flags: int, fd: int) -> int:
        mapped: int | None = self._libc.mmap(address, size, access, flags, fd, 0)
        if mapped is None or mapped == _MAP_FAILED:
            raise _os_error(call)
        return mapped

    def _munmap(self, address: int, size: int) -> None:
        if self._libc.munmap(address, size) != 0:
            raise _os_error("munmap")


def _check_multiple(call: str, size: int) -> None:
    if size <= 0 or size % GRANULARITY:
        raise DriverError(call, "CUDA_ERROR_INVALID_VALUE", f"{size} is no multiple of granularity() {GRANULARITY}")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    place, length = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = place
    libc.mmap.argtypes = (place, length, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (place, length)
    libc.mprotect.argtypes = (place, length, ctypes.c_int)
    return libc


def _os_error(call: str) -> DriverError:
    code = ctypes.get_errno()
    if code == errno.ENOMEM:
        return OutOfDeviceMemory(call, "CUDA_ERROR_OUT_OF_MEMORY", os.strerror(code))
    return DriverError(call, "CUDA_ERROR_OPERATING_SYSTEM", os.strerror(code))
