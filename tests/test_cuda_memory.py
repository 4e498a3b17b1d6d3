"""Tensors over memory that torch did not allocate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.cuda.emulated import DEVICE_VARIABLE
from serverlesslora_ipc.cuda.region import RegionDraft
from serverlesslora_kernels.cuda.memory import bytes_at

CPU = torch.device("cpu")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setenv(DEVICE_VARIABLE, f"memory-{os.getpid()}")
    driver = open_driver("emulated")
    driver.start()
    yield driver
    driver.stop()


def test_writes_go_to_the_memory_itself(driver: Driver) -> None:
    size = 3 * driver.granularity()
    address = driver.allocate(size)
    region = bytes_at(address, size, CPU)
    assert (region.dtype, region.shape, region.data_ptr()) == (torch.uint8, (size,), address)
    region.fill_(7)
    region[100:164].view(torch.float32).copy_(torch.arange(16))
    again = bytes_at(address, size, CPU)
    assert again[99] == 7
    assert again[100:164].view(torch.float32)[15] == 15
    driver.free(address)


def test_memory_that_can_only_be_read(driver: Driver) -> None:
    with RegionDraft(driver, 1000) as draft:
        bytes_at(draft.address, 1000, CPU).fill_(9)
        publication = draft.publish()
    with publication:
        assert bytes_at(publication.address, 1000, CPU).sum() == 9000


def test_holes_may_be_covered(driver: Driver) -> None:
    """An elastic range gives addresses to memory that is not there yet."""
    chunk = driver.granularity()
    address = driver.reserve(4 * chunk)
    region = bytes_at(address, 4 * chunk, CPU)
    physical = driver.create(chunk)
    driver.map(address + chunk, chunk, physical)
    driver.allow(address + chunk, chunk, write=True)
    region[chunk : 2 * chunk].fill_(3)
    assert region[chunk : 2 * chunk].sum() == 3 * chunk
    driver.unmap(address + chunk, chunk)
    driver.release(physical)
    driver.free_address(address, 4 * chunk)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_what_torch_is_told_of_a_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A number, so that torch asks no driver whose memory it is; and writable, since torch refuses anything else."""
    seen: list[tuple[dict[str, Any], torch.device]] = []

    class Answer:
        def data_ptr(self) -> int:
            return 4096

    def as_tensor(data: Any, *, device: torch.device) -> Answer:
        seen.append((data.__cuda_array_interface__, device))
        return Answer()

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    bytes_at(4096, 10, torch.device(device))
    ((interface, told),) = seen
    assert interface == {"shape": (10,), "typestr": "|u1", "data": (4096, False), "strides": None, "version": 3}
    assert told == torch.device("cuda", torch.device(device).index or 0)
    with pytest.raises(AssertionError, match="copied"):
        bytes_at(8192, 10, torch.device(device))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    driver = open_driver("cuda")
    driver.start()
    torch.zeros(1, device="cuda")
    with RegionDraft(driver, 1000) as draft:
        bytes_at(draft.address, 1000, torch.device("cuda")).fill_(9)
        torch.cuda.synchronize()
        publication = draft.publish()
    with publication:
        assert bytes_at(publication.address, 1000, torch.device("cuda")).sum() == 9000
    driver.stop()
