"""What every driver of a device promises, told without touching device memory from the host."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from serverlesslora_ipc.cuda.driver import AccessRefused, Driver, DriverError, OutOfDeviceMemory


def put(driver: Driver, address: int, data: bytes, stream: int = 0) -> None:
    with driver.pinned(len(data)) as buffer:
        buffer.view[:] = data
        driver.copy_in(address, buffer.address, len(data), stream)
        driver.synchronize(stream)


def get(driver: Driver, address: int, size: int, stream: int = 0) -> bytes:
    with driver.pinned(size) as buffer:
        driver.copy_out(buffer.address, address, size, stream)
        driver.synchronize(stream)
        return buffer.view.tobytes()


def map_anywhere(driver: Driver, handle: int, size: int, *, write: bool) -> int:
    address = driver.reserve(size)
    driver.map(address, size, handle)
    driver.allow(address, size, write=write)
    return address


def unmap(driver: Driver, address: int, size: int) -> None:
    driver.unmap(address, size)
    driver.free_address(address, size)


def what_it_is(driver: Driver) -> None:
    assert driver.name in ("cuda", "emulated")
    assert driver.device_name()
    free_bytes, total_bytes = driver.memory()
    assert 0 < free_bytes <= total_bytes
    assert driver.granularity() > 0 and driver.granularity() % 4096 == 0


def memory_behind_an_address(driver: Driver) -> None:
    before, size = driver.memory(), 2 * driver.granularity()
    handle = driver.create(size)
    address = map_anywhere(driver, handle, size, write=True)
    driver.release(handle)
    data = os.urandom(1000)
    put(driver, address + size - 1000, data)
    assert get(driver, address + size - 1000, 1000) == data, "a mapping holds its memory"
    assert driver.memory().free_bytes < before.free_bytes
    unmap(driver, address, size)
    assert driver.memory() == before


def one_memory_at_two_addresses(driver: Driver) -> None:
    assert driver.can_export_fds()
    before, size = driver.memory(), driver.granularity()
    handle = driver.create(size)
    fd = driver.export_fd(handle)
    first = map_anywhere(driver, handle, size, write=True)
    driver.release(handle)
    imported = driver.import_fd(fd)
    second = map_anywhere(driver, imported, size, write=True)
    driver.release(imported)
    put(driver, first, b"through a descriptor")
    assert get(driver, second, 20) == b"through a descriptor"
    unmap(driver, first, size)
    unmap(driver, second, size)
    assert driver.memory().free_bytes < before.free_bytes, "a descriptor holds its memory"
    os.close(fd)  # would fail if importing had taken it over
    assert driver.memory() == before


def memory_comes_and_goes_behind_addresses(driver: Driver) -> None:
    before, chunk = driver.memory(), driver.granularity()
    address = driver.reserve(3 * chunk)
    for round_ in range(2):
        for i in (2, 0):
            handle = driver.create(chunk)
            driver.map(address + i * chunk, chunk, handle)
            driver.allow(address + i * chunk, chunk, write=True)
            driver.release(handle)
            put(driver, address + i * chunk, bytes([round_, i]))
        assert get(driver, address, 2) == bytes([round_, 0])
        driver.unmap(address, chunk)
        assert get(driver, address + 2 * chunk, 2) == bytes([round_, 2])
        driver.unmap(address + 2 * chunk, chunk)
    driver.free_address(address, 3 * chunk)
    assert driver.memory() == before


def reading_alone(driver: Driver) -> None:
    size = driver.granularity()
    handle = driver.create(size)
    writable = map_anywhere(driver, handle, size, write=True)
    put(driver, writable, b"written elsewhere")
    readable = driver.reserve(size)
    driver.map(readable, size, handle)
    try:
        driver.allow(readable, size, write=False)
    except AccessRefused:  # an answer too: see `vmm-writable`
        pass
    else:
        assert get(driver, readable, 17) == b"written elsewhere"
    unmap(driver, readable, size)
    unmap(driver, writable, size)
    driver.release(handle)


def ordinary_allocations(driver: Driver) -> None:
    before = driver.memory()
    address = driver.allocate(driver.granularity())
    put(driver, address, b"ordinary")
    assert get(driver, address, 8) == b"ordinary"
    handle = driver.ipc_handle(address)
    assert len(handle) == 64 and any(handle)
    with pytest.raises(DriverError, match="cuIpcOpenMemHandle"):  # never in the owner itself
        driver.open_ipc(handle)
    with pytest.raises(DriverError, match="cuIpcOpenMemHandle"):
        driver.open_ipc(b"short")
    driver.free(address)
    assert driver.memory() == before


def streams(driver: Driver) -> None:
    stream = driver.create_stream()
    assert stream != 0
    address = driver.allocate(driver.granularity())
    put(driver, address, b"aside", stream)
    assert get(driver, address, 5, stream) == b"aside"
    driver.free(address)
    driver.destroy_stream(stream)


def more_than_there_is(driver: Driver) -> None:
    before = driver.memory()
    too_much = (before.total_bytes // driver.granularity() + 1) * driver.granularity()
    with pytest.raises(OutOfDeviceMemory, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.create(too_much)
    with pytest.raises(OutOfDeviceMemory, match="cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.allocate(too_much)
    assert driver.memory() == before


def mistakes_are_named(driver: Driver) -> None:
    size = driver.granularity()
    with pytest.raises(DriverError, match="cuMemCreate: CUDA_ERROR_INVALID_VALUE"):
        driver.create(size + 1)
    address = driver.reserve(size)
    with pytest.raises(DriverError, match="cuMemSetAccess: CUDA_ERROR_INVALID_VALUE") as caught:
        driver.allow(address, size, write=True)  # nothing is mapped there
    assert not isinstance(caught.value, AccessRefused)
    driver.free_address(address, size)


def threads_make_it_current(driver: Driver) -> None:
    said: list[object] = []

    def other() -> None:
        try:
            driver.allocate(driver.granularity())
        except DriverError as error:
            said.append(error.error)
        driver.make_current()
        driver.free(driver.allocate(driver.granularity()))
        said.append("done")

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said == ["CUDA_ERROR_INVALID_CONTEXT", "done"]


def starting_and_stopping(driver: Driver) -> None:
    driver.start()
    with pytest.raises(DriverError, match="already uses"):
        driver.start(1)
    driver.stop()
    driver.stop()
    with pytest.raises(DriverError, match="CUDA_ERROR_NOT_INITIALIZED"):
        driver.make_current()
    driver.start()
    driver.free(driver.allocate(driver.granularity()))


CONTRACT: list[Callable[[Driver], None]] = [
    what_it_is,
    memory_behind_an_address,
    one_memory_at_two_addresses,
    memory_comes_and_goes_behind_addresses,
    reading_alone,
    ordinary_allocations,
    streams,
    more_than_there_is,
    mistakes_are_named,
    threads_make_it_current,
    starting_and_stopping,
]
