"""The driver of a GPU, through NVIDIA's `cuda.bindings`."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, Final

from serverlesslora_ipc.cuda.driver import (
    AccessRefused,
    DeviceKind,
    DeviceMemory,
    DriverError,
    OutOfDeviceMemory,
    Pinned,
)

_IPC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_NAME_BYTES = 256


def _bindings() -> Any:
    """Importing them needs no GPU; the first call does."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverError(
            "import cuda.bindings", "not installed", "pip install serverlesslora[cuda], or use --device cpu"
        ) from error
    return driver


class CudaDriver:
    """Handles and addresses are plain integers here; the bindings' own types stay inside."""

    name: Final[DeviceKind] = "cuda"

    def __init__(self) -> None:
        self._api = _bindings()
        self._lock = threading.Lock()
        self._device: Any = None
        self._context: Any = None
        self._ordinal = 0
        self._granularity: int | None = None
        self._can_export_fds: bool | None = None

    def start(self, device: int = 0) -> None:
        with self._lock:
            if self._context is None:
                self._call("cuInit", 0)
                self._device = self._call("cuDeviceGet", device)
                self._ordinal = device
                self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        if device != self._ordinal:
            raise DriverError("start", f"this process already uses device {self._ordinal}", "one process, one device")
        self.make_current()

    def make_current(self) -> None:
        self._call("cuCtxSetCurrent", self._started())

    def stop(self) -> None:
        with self._lock:
            if self._context is not None:
                self._context = None
                self._call("cuDevicePrimaryCtxRelease", self._device)

    def device_name(self) -> str:
        self._started()
        name: bytes = self._call("cuDeviceGetName", _NAME_BYTES, self._device)
        return name.split(b"\0", 1)[0].decode()

    def memory(self) -> DeviceMemory:
        free_bytes, total_bytes = self._call("cuMemGetInfo")
        return DeviceMemory(int(free_bytes), int(total_bytes))

    def granularity(self) -> int:
        if self._granularity is None:
            # The recommended one keeps large pages where the minimum is smaller: fewer misses in the device's TLB.
            option = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
            properties = self._properties(exportable=False)
            self._granularity = int(self._call("cuMemGetAllocationGranularity", properties, option))
        return self._granularity

    def can_export_fds(self) -> bool:
        if self._can_export_fds is None:
            self._can_export_fds = self._says_it_exports() and self._exports()
        return self._can_export_fds

    def create(self, size: int) -> int:
        return self._create(size, exportable=self.can_export_fds())

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def export_fd(self, handle: int) -> int:
        return int(self._call("cuMemExportToShareableHandle", handle, self._posix_fd(), 0))

    def import_fd(self, fd: int) -> int:
        return int(self._call("cuMemImportFromShareableHandle", fd, self._posix_fd()))

    def reserve(self, size: int) -> int:
        return int(self._call("cuMemAddressReserve", size, self.granularity(), 0, 0))

    def free_address(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int, handle: int) -> None:
        self._call("cuMemMap", address, size, 0, handle, 0)

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", address, size)

    def allow(self, address: int, size: int, *, write: bool) -> None:
        flags = self._api.CUmemAccess_flags
        access = self._api.CUmemAccessDesc()
        access.location = self._location()
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if write else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        try:
            self._call("cuMemSetAccess", address, size, [access], 1)
        except DriverError as error:
            if not write:  # whatever this driver calls it; a deeper trouble shows in the next call, which asks for more
                raise AccessRefused(error.call, error.error, "no read-only mappings with this driver") from error
            raise

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def ipc_handle(self, address: int) -> bytes:
        handle = self._call("cuIpcGetMemHandle", address)
        # By address: the field that holds the bytes has not the same name in every release of the bindings.
        return ctypes.string_at(handle.getPtr(), _IPC_HANDLE_BYTES)

    def open_ipc(self, handle: bytes) -> int:
        if len(handle) != _IPC_HANDLE_BYTES:
            raise DriverError(
                "cuIpcOpenMemHandle", f"a handle of {len(handle)} bytes", f"expected {_IPC_HANDLE_BYTES} bytes"
            )
        opened = self._api.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, _IPC_HANDLE_BYTES)
        lazy = self._api.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(self._call("cuIpcOpenMemHandle", opened, int(lazy)))

    def close_ipc(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)

    def pinned(self, size: int) -> Pinned:
        return Pinned(int(self._call("cuMemHostAlloc", size, 0)), size, self._free_pinned)

    def copy_in(self, device_address: int, host_address: int, size: int, stream: int = 0) -> None:
        self._call("cuMemcpyHtoDAsync", device_address, host_address, size, stream)

    def copy_out(self, host_address: int, device_address: int, size: int, stream: int = 0) -> None:
        self._call("cuMemcpyDtoHAsync", host_address, device_address, size, stream)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", int(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int = 0) -> None:
        self._call("cuStreamSynchronize", stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """What the call returns besides its status: nothing, one value, or a list of several."""
        try:
            status, *values = getattr(self._api, function)(*arguments)
        except (RuntimeError, AttributeError) as error:  # no libcuda, or one too old to have this function
            raise DriverError(function, "not available", f"install or update the NVIDIA driver: {error}") from error
        except ValueError as error:  # a status that these bindings are too old to know
            raise DriverError(function, str(error), "update cuda-bindings") from error
        if int(status) != 0:
            name = getattr(status, "name", str(status))
            raise (OutOfDeviceMemory if name == "CUDA_ERROR_OUT_OF_MEMORY" else DriverError)(function, name)
        return values[0] if len(values) == 1 else values or None

    def _started(self) -> Any:
        if self._context is None:
            raise DriverError("cuCtxSetCurrent", "CUDA_ERROR_NOT_INITIALIZED")
        return self._context

    def _location(self) -> Any:
        location = self._api.CUmemLocation()
        location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self._ordinal
        return location

    def _posix_fd(self) -> Any:
        return self._api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _properties(self, *, exportable: bool) -> Any:
        properties = self._api.CUmemAllocationProp()
        properties.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location()
        kinds = self._api.CUmemAllocationHandleType
        properties.requestedHandleTypes = self._posix_fd() if exportable else kinds.CU_MEM_HANDLE_TYPE_NONE
        return properties

    def _create(self, size: int, *, exportable: bool) -> int:
        return int(self._call("cuMemCreate", size, self._properties(exportable=exportable), 0))

    def _says_it_exports(self) -> bool:
        self._started()
        attributes = self._api.CUdevice_attribute
        needed = (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        )
        return all(self._call("cuDeviceGetAttribute", attribute, self._device) for attribute in needed)

    def _exports(self) -> bool:
        """One smallest allocation goes out as a descriptor and comes back."""
        try:
            handle = self._create(self.granularity(), exportable=True)
        except OutOfDeviceMemory:  # says nothing about descriptors
            raise
        except DriverError:
            return False
        try:
            fd = self.export_fd(handle)
            try:
                self.release(self.import_fd(fd))
            finally:
                os.close(fd)
        except DriverError:
            return False
        finally:
            self.release(handle)
        return True

    def _free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", address)
