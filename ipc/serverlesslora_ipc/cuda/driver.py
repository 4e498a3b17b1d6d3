"""The one thin seam over the CUDA driver API: plain integers in and out, and errors that name the call and the remedy.

`CudaDriver` (in `real`) talks to a GPU. `EmulatedDriver` (in `emulated`) does the same with host memory, so everything
above the seam runs in real processes on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

DeviceKind = Literal["cuda", "emulated"]

REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the device is full: stop another process on it or ask for less",
    "CUDA_ERROR_NOT_INITIALIZED": "call start() first",
    "CUDA_ERROR_INVALID_CONTEXT": "call make_current() on this thread first",
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of this number: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU to itself: set its compute mode back to Default",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "libcuda and the kernel module differ: reboot or reinstall the NVIDIA driver",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an earlier kernel or copy touched memory it may not; this process must end",
    "CUDA_ERROR_MAP_FAILED": "the memory cannot be mapped here: is its owner alive and in the same container?",
    "CUDA_ERROR_OPERATING_SYSTEM": "the system refused: the container may lack a capability for sharing memory",
}


class DriverError(Exception):
    """A call of the driver failed."""

    def __init__(self, call: str, error: str, remedy: str | None = None) -> None:
        self.call = call
        self.error = error  # CUDA's name of it
        self.remedy = REMEDIES.get(error) if remedy is None else remedy
        super().__init__(f"{call}: {error}" + (f" ({self.remedy})" if self.remedy else ""))


class AccessRefused(DriverError):
    """This driver has no read-only mappings of device memory."""


class OutOfDeviceMemory(DriverError):
    """The device has no room; nothing was taken."""


class DeviceMemory(NamedTuple):
    free_bytes: int
    total_bytes: int


class Pinned:
    """Host memory that the device copies from and to without a detour.

    Arrays may be laid over `view`: the memory goes when it was closed and the last of them is gone.
    """

    def __init__(self, address: int, size: int, free: Callable[[int], None]) -> None:
        self.address = address
        self.size = size
        array = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(array, free, address).atexit = False  # the process takes it along anyway
        self.view = memoryview(array).cast("B")

    def close(self) -> None:
        """Safe to call twice. No copy from or to this memory may be under way."""
        self.view.release()

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Driver(Protocol):
    """One device as seen by one process. Sizes that go to `create`, `reserve`, `map` and their opposites are multiples
    of `granularity()`; contents of new memory are undefined; the caller waits for the device before taking memory away.
    """

    @property
    def name(self) -> DeviceKind: ...

    def start(self, device: int = 0) -> None:
        """Initialises the driver, retains the device's primary context (the one torch uses) and makes it current on
        this thread. Calling it again changes nothing."""

    def make_current(self) -> None:
        """Every further thread that allocates or copies calls this once."""

    def stop(self) -> None:
        """Releases the primary context. Calling it again changes nothing."""

    def device_name(self) -> str: ...

    def memory(self) -> DeviceMemory:
        """Of the whole device, whoever holds it."""

    def granularity(self) -> int: ...

    def can_export_fds(self) -> bool:
        """Whether memory can be shared by descriptor here; tried once, because containers differ from what they say."""

    def create(self, size: int) -> int:
        """Physical memory without an address; returns its handle."""

    def release(self, handle: int) -> None:
        """Memory lives on while it is mapped or exported anywhere."""

    def export_fd(self, handle: int) -> int:
        """A descriptor that keeps the memory alive; the caller closes it."""

    def import_fd(self, fd: int) -> int:
        """A handle of the same memory; the descriptor stays the caller's."""

    def reserve(self, size: int) -> int:
        """Addresses without memory."""

    def free_address(self, address: int, size: int) -> None: ...

    def map(self, address: int, size: int, handle: int) -> None:
        """Puts the whole memory of `handle` at a reserved address; nobody may touch it before `allow`."""

    def unmap(self, address: int, size: int) -> None: ...

    def allow(self, address: int, size: int, *, write: bool) -> None:
        """Raises AccessRefused where the driver has no read-only access."""

    def allocate(self, size: int) -> int:
        """Ordinary device memory, for sharing by legacy IPC handle; returns its address."""

    def free(self, address: int) -> None: ...

    def ipc_handle(self, address: int) -> bytes: ...

    def open_ipc(self, handle: bytes) -> int:
        """In another process than the owner's; the address allows writing."""

    def close_ipc(self, address: int) -> None: ...

    def pinned(self, size: int) -> Pinned: ...

    def copy_in(self, device_address: int, host_address: int, size: int, stream: int = 0) -> None:
        """Host to device; done after `synchronize(stream)`."""

    def copy_out(self, host_address: int, device_address: int, size: int, stream: int = 0) -> None:
        """Device to host; done after `synchronize(stream)`."""

    def create_stream(self) -> int:
        """A stream that does not wait for stream 0, nor stream 0 for it."""

    def destroy_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int = 0) -> None: ...


def open_driver(device_kind: DeviceKind) -> Driver:
    """The driver of that kind, not started yet."""
    if device_kind == "cuda":
        from serverlesslora_ipc.cuda.real import CudaDriver

        return CudaDriver()
    from serverlesslora_ipc.cuda.emulated import EmulatedDriver

    return EmulatedDriver()


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
