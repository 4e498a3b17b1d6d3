"""A CUDA device on host memory, for whoever asks for it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from serverlesslora_ipc.cuda.driver import Driver, open_driver

if TYPE_CHECKING:
    from serverlesslora.engine.cuda.device import CudaDevice

_NUMBERS = itertools.count()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """An emulated device of this test's own, so that its memory is its own as well."""
    monkeypatch.setenv("SERVERLESSLORA_EMULATED_DEVICE", f"test-{os.getpid()}-{next(_NUMBERS)}")
    driver = open_driver("emulated")
    driver.start()
    yield driver
    driver.stop()


@pytest.fixture
def device(driver: Driver) -> CudaDevice:
    from serverlesslora.engine.cuda.device import CudaDevice

    return CudaDevice("emulated", driver)
