"""A `libcuda.so.1` whose functions are the emulated driver's, so that NVIDIA's bindings run without a GPU.

The bindings ask the library for every function by name; a dozen lines of C pass the question on to Python. What they
then call has the C signature of cuda.h, so a wrong argument, order, enumerator or struct field shows here.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from ctypes import POINTER, c_char, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from serverlesslora_ipc.cuda.driver import DriverError
from serverlesslora_ipc.cuda.emulated import EmulatedDriver

COMPILER = shutil.which("cc") or shutil.which("gcc")
_SOURCE = """
static int (*resolve)(const char *, void **);
void set_resolver(int (*function)(const char *, void **)) { resolve = function; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
    int result = resolve(name, found);
    (void)version, (void)flags;
    if (status) *status = *found ? 0 : 1;
    return result;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""
_CONTEXT = 0xC0DE


class _IpcHandle(ctypes.Structure):
    _fields_ = (("bytes", c_char * 64),)


class _Properties(ctypes.Structure):
    """The start of CUmemAllocationProp."""

    _fields_ = (("type", c_int), ("handle_types", c_int), ("location_type", c_int), ("location_id", c_int))


class _Access(ctypes.Structure):
    _fields_ = (("location_type", c_int), ("location_id", c_int), ("flags", c_int))


_OUT = POINTER(c_uint64)
_SIZE_OUT = POINTER(c_size_t)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (POINTER(c_char), c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuDevicePrimaryCtxRelease": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo": (_SIZE_OUT, _SIZE_OUT),
    "cuMemGetAllocationGranularity": (_SIZE_OUT, POINTER(_Properties), c_int),
    "cuMemCreate": (_OUT, c_size_t, POINTER(_Properties), c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemExportToShareableHandle": (POINTER(c_int), c_uint64, c_int, c_uint64),
    "cuMemImportFromShareableHandle": (_OUT, c_void_p, c_int),
    "cuMemAddressReserve": (_OUT, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(_Access), c_size_t),
    "cuMemAlloc": (_OUT, c_size_t),
    "cuMemFree": (c_uint64,),
    "cuIpcGetMemHandle": (POINTER(_IpcHandle), c_uint64),
    "cuIpcOpenMemHandle": (_OUT, _IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemHostAlloc": (_OUT, c_size_t, c_uint),
    "cuMemFreeHost": (c_uint64,),
    "cuMemcpyHtoDAsync": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_OUT, c_uint),
    "cuStreamDestroy": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
}
FUNCTIONS = frozenset(_SIGNATURES)


class StandIn:
    """The functions, each with the arguments of its C declaration. Numbers are spelt out: they are the contract."""

    def __init__(self, error_numbers: Any) -> None:
        self.called: set[str] = set()
        self._driver = EmulatedDriver()
        self._error_numbers = error_numbers
        self._pinned: dict[int, Any] = {}
        self._exportable: dict[int, bool] = {}
        self._functions: dict[str, Any] = {}

    def resolve(self, name: bytes, found: Any) -> int:
        function = name.decode()
        signature = _SIGNATURES.get(function)
        if signature is None:
            found[0] = None
            return 500  # CUDA_ERROR_NOT_FOUND
        if function not in self._functions:
            self._functions[function] = ctypes.CFUNCTYPE(c_int, *signature)(self._answering(function))
        found[0] = ctypes.cast(self._functions[function], c_void_p).value
        return 0

    def _answering(self, function: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.called.add(function)
            try:
                answer = getattr(self, f"_{function}")(*arguments)
                return 0 if answer is None else int(answer)
            except DriverError as error:
                return int(getattr(self._error_numbers, error.error))
            except AssertionError:
                return 1  # CUDA_ERROR_INVALID_VALUE

        return call

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int | None:
        if ordinal > 1:
            return 101  # CUDA_ERROR_INVALID_DEVICE
        device[0] = ordinal
        return None

    def _cuDeviceGetName(self, name: Any, length: int, device: int) -> None:
        text = b"Stand-in\0"
        assert length >= len(text)
        ctypes.memmove(name, text, len(text))

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        assert attribute in (102, 103)  # virtual memory management, POSIX descriptors
        value[0] = 1

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        self._driver.start(device)
        self._device = device
        context[0] = _CONTEXT

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        assert device == self._device
        self._driver.stop()

    def _cuCtxSetCurrent(self, context: int) -> None:
        assert context == _CONTEXT
        self._driver.make_current()

    def _cuMemGetInfo(self, free: Any, total: Any) -> None:
        free[0], total[0] = self._driver.memory()

    def _cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: int) -> None:
        self._check(properties[0])
        assert option in (0, 1)
        size[0] = self._driver.granularity()

    def _check(self, properties: _Properties) -> None:
        assert (properties.type, properties.location_type, properties.location_id) == (1, 1, self._device)
        assert properties.handle_types in (0, 1)

    def _cuMemCreate(self, handle: Any, size: int, properties: Any, flags: int) -> int | None:
        self._check(properties[0])
        assert flags == 0
        if properties[0].handle_types == 1 and not self._driver.can_export_fds():
            return 801  # CUDA_ERROR_NOT_SUPPORTED
        handle[0] = self._driver.create(size)
        self._exportable[handle[0]] = properties[0].handle_types == 1
        return None

    def _cuMemRelease(self, handle: int) -> None:
        self._driver.release(handle)

    def _cuMemExportToShareableHandle(self, fd: Any, handle: int, kind: int, flags: int) -> None:
        assert (kind, flags) == (1, 0) and self._exportable[handle]
        fd[0] = self._driver.export_fd(handle)

    def _cuMemImportFromShareableHandle(self, handle: Any, fd: int | None, kind: int) -> None:
        assert kind == 1
        handle[0] = self._driver.import_fd(fd or 0)

    def _cuMemAddressReserve(self, address: Any, size: int, alignment: int, fixed: int, flags: int) -> None:
        assert alignment % self._driver.granularity() == 0 and (fixed, flags) == (0, 0)
        address[0] = self._driver.reserve(size)

    def _cuMemAddressFree(self, address: int, size: int) -> None:
        self._driver.free_address(address, size)

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> None:
        assert (offset, flags) == (0, 0)
        self._driver.map(address, size, handle)

    def _cuMemUnmap(self, address: int, size: int) -> None:
        self._driver.unmap(address, size)

    def _cuMemSetAccess(self, address: int, size: int, access: Any, count: int) -> None:
        assert count == 1
        assert (access[0].location_type, access[0].location_id) == (1, self._device)
        assert access[0].flags in (1, 3)  # read, read and write
        self._driver.allow(address, size, write=access[0].flags == 3)

    def _cuMemAlloc(self, address: Any, size: int) -> None:
        address[0] = self._driver.allocate(size)

    def _cuMemFree(self, address: int) -> None:
        self._driver.free(address)

    def _cuIpcGetMemHandle(self, handle: Any, address: int) -> None:
        ctypes.memmove(handle, self._driver.ipc_handle(address), 64)

    def _cuIpcOpenMemHandle(self, address: Any, handle: _IpcHandle, flags: int) -> None:
        assert flags == 1
        address[0] = self._driver.open_ipc(bytes(memoryview(handle)))

    def _cuIpcCloseMemHandle(self, address: int) -> None:
        self._driver.close_ipc(address)

    def _cuMemHostAlloc(self, address: Any, size: int, flags: int) -> None:
        assert flags == 0
        pinned = self._driver.pinned(size)
        self._pinned[pinned.address] = pinned
        address[0] = pinned.address

    def _cuMemFreeHost(self, address: int) -> None:
        self._pinned.pop(address).close()

    def _cuMemcpyHtoDAsync(self, device: int, host: int, size: int, stream: int | None) -> None:
        self._driver.copy_in(device, host, size, stream or 0)

    def _cuMemcpyDtoHAsync(self, host: int, device: int, size: int, stream: int | None) -> None:
        self._driver.copy_out(host, device, size, stream or 0)

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1  # non-blocking
        stream[0] = self._driver.create_stream()

    def _cuStreamDestroy(self, stream: int) -> None:
        self._driver.destroy_stream(stream)

    def _cuStreamSynchronize(self, stream: int | None) -> None:
        self._driver.synchronize(stream or 0)


def build(folder: Path) -> Path:
    """Compiles the library; whoever loads it into a process must not have loaded a real one."""
    assert COMPILER is not None
    source, library = folder / "standin.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return library


def install(library: Path) -> StandIn:
    """From here on this process's bindings find the stand-in, by its name, and nothing else."""
    from cuda.bindings.driver import CUresult

    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stand_in = StandIn(CUresult)
    resolver = ctypes.CFUNCTYPE(c_int, ctypes.c_char_p, POINTER(c_void_p))(stand_in.resolve)
    loaded.set_resolver(resolver)
    _KEPT.append((loaded, resolver, stand_in))
    return stand_in


_KEPT: list[Any] = []  # the C side keeps no references
