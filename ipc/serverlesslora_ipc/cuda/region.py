"""Device memory that is written once and then shared read-only with other processes: the twin of `sealed` on a device.

    draft ── publish ──▶ publication (descriptor or handle) ── attach ──▶ region, in every worker

What a device can do differs, so there are three ways of sharing, best first (see `messages.Sharing`): `vmm`, memory by
descriptor that workers map read-only; `vmm-writable` where the driver has no read-only access; `cuda-ipc` where memory
cannot leave as a descriptor. A publication names its way and why it is not a better one.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from serverlesslora_ipc.cuda.driver import AccessRefused, Driver, DriverError, Pinned, round_up
from serverlesslora_ipc.messages import Sharing

_NO_DESCRIPTORS = "this driver does not export memory as descriptors here"


class DeviceRegion:
    """Shared memory as this process sees it. `close` unmaps it; nothing on the device may still use it then."""

    def __init__(self, address: int, size: int, sharing: Sharing, undo: ExitStack) -> None:
        self.address = address
        self.size = size
        self.sharing = sharing
        self._undo = undo

    def close(self) -> None:
        """Safe to call twice."""
        self._undo.close()

    def __enter__(self) -> DeviceRegion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Publication:
    """The owner's side: keeps the memory alive and can read it. What travels to workers is `sharing`, `fd`, `handle`.

    The descriptor belongs to the publication. With `vmm` the owner itself can no longer write.
    """

    def __init__(
        self, driver: Driver, region: DeviceRegion, *, fd: int | None, handle: bytes, reason: str, undo: ExitStack
    ) -> None:
        self.address = region.address
        self.size = region.size
        self.sharing = region.sharing
        self.fd = fd
        self.handle = handle
        self.reason = reason  # why this is not a better way of sharing; empty for the best
        self._driver = driver
        self._undo = undo

    def read_into(self, offset: int, buffer: Pinned, *, stream: int = 0) -> int:
        """Fills `buffer` from `offset` on and waits for it; returns how many bytes there were, 0 at the end."""
        size = min(buffer.size, self.size - offset)
        if size <= 0:
            return 0
        self._driver.copy_out(buffer.address, self.address + offset, size, stream)
        self._driver.synchronize(stream)
        return size

    def close(self) -> None:
        """Safe to call twice. Workers that attached by descriptor keep the memory alive, those by handle do not."""
        self._undo.close()

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RegionDraft:
    """Memory that is still being written. `publish` ends that; leaving the context without it throws the memory away.

    How it can be shared at all is found out here, before anybody spends time on filling it.
    """

    def __init__(self, driver: Driver, size: int) -> None:
        assert size > 0
        self.size = size
        self._driver = driver
        self._fd: int | None = None
        self._handle = b""
        padded = round_up(size, driver.granularity())
        with ExitStack() as undo:
            if driver.can_export_fds():
                physical = driver.create(padded)
                try:
                    self._fd = driver.export_fd(physical)
                except BaseException:
                    driver.release(physical)
                    raise
                undo.callback(os.close, self._fd)
                self.address = _map(driver, physical, padded, write=True, undo=undo)
            else:
                self.address = driver.allocate(padded)
                undo.callback(driver.free, self.address)
                self._handle = driver.ipc_handle(self.address)
            self._undo = undo.pop_all()

    def publish(self) -> Publication:
        """Call it once, when every stream that wrote has been synchronized. `address` may no longer be used then."""
        self._driver.synchronize()
        if self._fd is None:
            return self._published("cuda-ipc", _NO_DESCRIPTORS)
        try:
            # What a worker will do, tried where it can still be answered with another way of sharing.
            region = attach(self._driver, "vmm", self._fd, b"", self.size)
        except AccessRefused as error:
            return self._published("vmm-writable", str(error))
        with ExitStack() as undo:
            undo.callback(region.close)
            fd = os.dup(self._fd)
            undo.callback(os.close, fd)
            self._undo.close()  # the writable mapping is gone before anybody else hears of the memory
            return Publication(self._driver, region, fd=fd, handle=b"", reason="", undo=undo.pop_all())

    def __enter__(self) -> RegionDraft:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _published(self, sharing: Sharing, reason: str) -> Publication:
        undo = self._undo.pop_all()  # from now on the publication's
        region = DeviceRegion(self.address, self.size, sharing, undo)
        return Publication(self._driver, region, fd=self._fd, handle=self._handle, reason=reason, undo=undo)


def adopt(driver: Driver, fd: int, size: int) -> Publication:
    """For the successor of a host that died: the descriptor, which stays the caller's, still holds the memory.

    There is nothing to adopt of a `cuda-ipc` publication: that memory died with its host.
    """
    reason = ""
    with ExitStack() as undo:
        try:
            region = attach(driver, "vmm", fd, b"", size)
        except AccessRefused as error:
            region, reason = attach(driver, "vmm-writable", fd, b"", size), str(error)
        undo.callback(region.close)
        own = os.dup(fd)
        undo.callback(os.close, own)
        return Publication(driver, region, fd=own, handle=b"", reason=reason, undo=undo.pop_all())


def attach(driver: Driver, sharing: Sharing, fd: int | None, handle: bytes, size: int) -> DeviceRegion:
    """Maps what somebody published; the descriptor stays the caller's and may be closed after."""
    with ExitStack() as undo:
        if sharing == "cuda-ipc":
            address = driver.open_ipc(handle)
            undo.callback(driver.close_ipc, address)
        elif fd is None or sharing == "memfd":
            raise DriverError("attach", f"sharing {sharing!r} without device memory", "send what the host published")
        else:
            padded = round_up(size, driver.granularity())
            address = _map(driver, driver.import_fd(fd), padded, write=sharing == "vmm-writable", undo=undo)
        return DeviceRegion(address, size, sharing, undo.pop_all())


def _map(driver: Driver, physical: int, size: int, *, write: bool, undo: ExitStack) -> int:
    """Maps and lets go of the handle (the mapping holds the memory from then on), whatever happens."""
    try:
        address = driver.reserve(size)
        undo.callback(driver.free_address, address, size)
        driver.map(address, size, physical)
        undo.callback(driver.unmap, address, size)
        driver.allow(address, size, write=write)
    finally:
        driver.release(physical)
    return address
