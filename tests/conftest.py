"""A CUDA device on host memory, for whoever asks for it; how all property tests run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from serverlesslora_ipc.cuda.driver import Driver, open_driver

if TYPE_CHECKING:
    from serverlesslora.engine.cuda.device import CudaDevice

_NUMBERS = itertools.count()

# How long an example takes says more about who else uses the machine; and a failure should be there again next time.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


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
