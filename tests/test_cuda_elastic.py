"""Chunks of device memory behind addresses that never move: taken, given back, and faults where nothing is."""

from __future__ import annotations

import ctypes
import os
import random
import signal
from collections.abc import Iterator

import pytest

from serverlesslora_ipc.cuda.driver import DriverError, OutOfDeviceMemory
from serverlesslora_ipc.cuda.elastic import ElasticRange
from serverlesslora_ipc.cuda.emulated import (
    BYTES_VARIABLE,
    DEVICE_VARIABLE,
    GRANULARITY,
    REFUSES_VARIABLE,
    EmulatedDriver,
)
from serverlesslora_ipc.messages import Progress, Shutdown
from tests.cuda_child import DEADLINE_S, Child, Chunk

CHUNK = 2 * GRANULARITY
TOTAL = 16 * GRANULARITY


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    monkeypatch.setenv(DEVICE_VARIABLE, f"elastic-{os.getpid()}")
    monkeypatch.setenv(BYTES_VARIABLE, str(TOTAL))
    monkeypatch.delenv(REFUSES_VARIABLE, raising=False)
    driver = EmulatedDriver()
    driver.start()
    assert driver.memory() == (TOTAL, TOTAL)
    yield driver
    assert driver.memory() == (TOTAL, TOTAL)
    driver.stop()


def fill(chunks: ElasticRange, chunk: int, value: int) -> None:
    ctypes.memset(chunks.chunk_address(chunk), value, chunks.chunk_bytes)


def holds(chunks: ElasticRange, chunk: int, value: int) -> bool:
    return ctypes.string_at(chunks.chunk_address(chunk), chunks.chunk_bytes) == bytes([value]) * chunks.chunk_bytes


def test_addresses_cost_nothing_and_round_up(driver: EmulatedDriver) -> None:
    with ElasticRange(driver, 1000 * TOTAL + 1, CHUNK) as chunks:
        assert chunks.num_chunks == 1000 * TOTAL // CHUNK + 1
        assert chunks.capacity_bytes == chunks.num_chunks * CHUNK
        assert chunks.resident == frozenset()
        assert driver.memory().free_bytes == TOTAL
    assert ElasticRange.chunk_size(driver, 1) == GRANULARITY
    assert ElasticRange.chunk_size(driver, GRANULARITY + 1) == 2 * GRANULARITY


def test_memory_goes_back_and_addresses_stay(driver: EmulatedDriver) -> None:
    with ElasticRange(driver, 100 * CHUNK, CHUNK) as chunks:
        address = chunks.address
        for chunk in (0, 99, 50):
            chunks.map_chunk(chunk)
            fill(chunks, chunk, chunk)
        assert chunks.resident == {0, 50, 99}
        assert driver.memory().free_bytes == TOTAL - 3 * CHUNK == TOTAL - chunks.resident_bytes
        chunks.unmap_chunk(50)
        assert driver.memory().free_bytes == TOTAL - 2 * CHUNK
        assert not chunks.is_resident(50) and chunks.is_resident(99)
        assert holds(chunks, 0, 0) and holds(chunks, 99, 99)
        chunks.map_chunk(50)
        fill(chunks, 50, 7)
        assert holds(chunks, 50, 7) and holds(chunks, 99, 99)
        assert chunks.address == address
        chunks.check()
    chunks.check()
    chunks.close()


def test_a_full_device_changes_nothing(driver: EmulatedDriver) -> None:
    with ElasticRange(driver, 2 * TOTAL, CHUNK) as chunks:
        for chunk in range(TOTAL // CHUNK):
            chunks.map_chunk(chunk)
            fill(chunks, chunk, chunk)
        full = chunks.resident
        with pytest.raises(OutOfDeviceMemory, match="0 free"):
            chunks.map_chunk(15)
        assert chunks.resident == full
        chunks.check()
        assert all(holds(chunks, chunk, chunk) for chunk in full)
        chunks.unmap_chunk(3)
        chunks.map_chunk(15)
        assert chunks.resident == full - {3} | {15}


@pytest.mark.parametrize("step", ["create", "map", "allow"])
def test_a_failed_step_is_undone(step: str, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise DriverError("test", "out of luck")

    with ElasticRange(driver, 4 * CHUNK, CHUNK) as chunks:
        with monkeypatch.context() as patch:
            patch.setattr(driver, step, failing)
            with pytest.raises(DriverError, match="out of luck"):
                chunks.map_chunk(1)
        assert driver.memory().free_bytes == TOTAL
        assert chunks.resident == frozenset()
        chunks.map_chunk(1)
        fill(chunks, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_life_against_a_model(seed: int, driver: EmulatedDriver) -> None:
    dice = random.Random(seed)
    model: dict[int, int] = {}
    with ElasticRange(driver, 12 * CHUNK, CHUNK) as chunks:
        for _ in range(60):
            chunk = dice.randrange(12)
            if chunk in model:
                assert holds(chunks, chunk, model.pop(chunk))
                chunks.unmap_chunk(chunk)
            elif len(model) == TOTAL // CHUNK:
                with pytest.raises(OutOfDeviceMemory):
                    chunks.map_chunk(chunk)
            else:
                chunks.map_chunk(chunk)
                model[chunk] = dice.randrange(256)
                fill(chunks, chunk, model[chunk])
            chunks.check()
            assert chunks.resident == model.keys()
        assert driver.memory().free_bytes == TOTAL - len(model) * CHUNK
        assert all(holds(chunks, chunk, value) for chunk, value in model.items())


def test_touching_what_is_not_there_is_a_fault_of_that_process_alone(driver: EmulatedDriver) -> None:
    with Child("elastic", "emulated", 4) as child, ElasticRange(driver, CHUNK, CHUNK) as ours:
        ours.map_chunk(0)
        mapped = child.ask(Chunk(index=2, action="map"))
        assert child.ask(Chunk(index=2, action="touch")) == mapped
        assert driver.memory().free_bytes == TOTAL - CHUNK - GRANULARITY
        child.channel.send([Chunk(index=1, action="touch")])
        assert child.dies_of() == signal.SIGSEGV
        assert driver.memory().free_bytes == TOTAL - CHUNK
        fill(ours, 0, 1)


def test_one_process_takes_what_another_gave_back(driver: EmulatedDriver) -> None:
    num_chunks = TOTAL // GRANULARITY
    with Child("elastic", "emulated", num_chunks) as child, ElasticRange(driver, CHUNK, CHUNK) as ours:
        for chunk in range(num_chunks):
            mapped = child.ask(Chunk(index=chunk, action="map"))
        assert mapped.done_bytes == TOTAL
        with pytest.raises(OutOfDeviceMemory):
            ours.map_chunk(0)
        for chunk in (4, 9):
            answer = child.ask(Chunk(index=chunk, action="unmap"))
        assert answer == Progress(done_bytes=TOTAL - 2 * GRANULARITY, total_bytes=mapped.total_bytes)
        ours.map_chunk(0)
        fill(ours, 0, 3)
        child.channel.send([Shutdown()])
        assert child.process.wait(DEADLINE_S) == 0
        assert driver.memory().free_bytes == TOTAL - CHUNK
