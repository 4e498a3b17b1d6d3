"""The drivers keep one contract: the emulated one here, the GPU's over a stand-in for libcuda and over a real one."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlesslora_ipc.cuda.driver import Driver, DriverError, OutOfDeviceMemory, Pinned, open_driver
from serverlesslora_ipc.cuda.emulated import (
    BYTES_VARIABLE,
    DEVICE_VARIABLE,
    GRANULARITY,
    REFUSES_VARIABLE,
    EmulatedDriver,
)
from serverlesslora_ipc.cuda.emulated_usage import held_anywhere
from tests import cuda_standin
from tests.cuda_contract import CONTRACT, map_anywhere, unmap

HAS_GPU = os.path.exists("/dev/nvidiactl")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, f"driver-{os.getpid()}")
    monkeypatch.setenv(BYTES_VARIABLE, str(64 * GRANULARITY))
    monkeypatch.delenv(REFUSES_VARIABLE, raising=False)


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    driver = EmulatedDriver()
    driver.start()
    before = driver.memory()
    num_fds = len(os.listdir("/proc/self/fd"))
    yield driver
    driver.start()
    assert driver.memory() == before
    assert len(os.listdir("/proc/self/fd")) == num_fds


def run(code: str, *arguments: str) -> str:
    """In a process of its own: what NVIDIA's bindings loaded once, they keep."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_the_emulated_driver_keeps_the_contract(promise: object, driver: Driver) -> None:
    assert callable(promise)
    promise(driver)


@pytest.mark.skipif(cuda_standin.COMPILER is None, reason="the stand-in for libcuda needs a C compiler")
def test_the_gpu_driver_keeps_the_contract_over_a_stand_in(tmp_path: Path) -> None:
    called = run(
        "import sys\n"
        "from pathlib import Path\n"
        "from serverlesslora_ipc.cuda.driver import open_driver\n"
        "from tests import cuda_contract, cuda_standin\n"
        "stand_in = cuda_standin.install(Path(sys.argv[1]))\n"
        "driver = open_driver('cuda')\n"
        "driver.start()\n"
        "for promise in cuda_contract.CONTRACT:\n"
        "    promise(driver)\n"
        "print(*sorted(stand_in.called))\n",
        str(cuda_standin.build(tmp_path)),
    )
    # The one missing needs another process: see the tests of regions.
    assert set(called.split()) == cuda_standin.FUNCTIONS - {"cuIpcCloseMemHandle"}


@pytest.mark.skipif(cuda_standin.COMPILER is None, reason="the stand-in for libcuda needs a C compiler")
def test_the_gpu_driver_finds_out_that_descriptors_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, "fds")
    said = run(
        "import sys\n"
        "from pathlib import Path\n"
        "from serverlesslora_ipc.cuda.driver import open_driver\n"
        "from tests import cuda_standin\n"
        "cuda_standin.install(Path(sys.argv[1]))\n"
        "driver = open_driver('cuda')\n"
        "driver.start()\n"
        "before = driver.memory()\n"
        "print(driver.can_export_fds())\n"
        "driver.release(driver.create(driver.granularity()))\n"
        "assert driver.memory() == before\n",
        str(cuda_standin.build(tmp_path)),
    )
    assert said == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_the_gpu_driver_keeps_the_contract_on_a_gpu() -> None:
    run(
        "from serverlesslora_ipc.cuda.driver import open_driver\n"
        "from tests import cuda_contract\n"
        "driver = open_driver('cuda')\n"
        "driver.start()\n"
        "driver.can_export_fds(), driver.free(driver.allocate(2 << 20))\n"  # what the driver sets up for itself
        "for promise in cuda_contract.CONTRACT:\n"
        "    promise(driver)\n"
    )


@pytest.mark.skipif(HAS_GPU, reason="this machine has the library")
def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    pytest.importorskip("cuda.bindings")
    said = run(
        "from serverlesslora_ipc.cuda.driver import DriverError, open_driver\n"
        "try:\n"
        "    open_driver('cuda').start()\n"
        "except DriverError as error:\n"
        "    print(error)\n"
    )
    assert said.startswith("cuInit: not available (install or update the NVIDIA driver: ")


def test_without_the_bindings_the_error_says_what_to_install() -> None:
    said = run(
        "import sys\n"
        "sys.modules['cuda.bindings'] = None\n"
        "from serverlesslora_ipc.cuda.driver import DriverError, open_driver\n"
        "try:\n"
        "    open_driver('cuda')\n"
        "except DriverError as error:\n"
        "    print(error)\n"
    )
    assert "pip install serverlesslora[cuda]" in said


def test_importing_is_light() -> None:
    loaded = run(
        "import sys\n"
        "import serverlesslora_ipc.cuda.region, serverlesslora_ipc.cuda.elastic\n"
        "import serverlesslora_ipc.cuda.emulated, serverlesslora_ipc.cuda.real\n"
        "print(*{'torch', 'numpy', 'cuda'} & set(sys.modules))\n"
    )
    assert loaded == ""


# --- the emulated driver alone -----------------------------------------------------------------------------------


def test_nothing_works_before_start() -> None:
    driver = open_driver("emulated")
    for call in (driver.memory, driver.make_current, lambda: driver.create(GRANULARITY), lambda: driver.allocate(1)):
        with pytest.raises(DriverError, match="CUDA_ERROR_NOT_INITIALIZED"):
            call()


def test_unknown_refusals_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, "fds,sleep")
    with pytest.raises(DriverError, match="choose from fds, ipc, read-only"):
        EmulatedDriver().start()


def test_misuse_is_an_error_as_on_a_gpu(driver: EmulatedDriver) -> None:
    size = GRANULARITY
    handle = driver.create(2 * size)
    address = driver.reserve(4 * size)
    with pytest.raises(DriverError, match="cuMemMap"):
        driver.map(address + 3 * size, 2 * size, handle)  # past the end of what is reserved
    with pytest.raises(DriverError, match="cuMemMap"):
        driver.map(address, size, handle)  # not the whole memory
    driver.map(address, 2 * size, handle)
    with pytest.raises(DriverError, match="cuMemMap"):
        driver.map(address + size, 2 * size, handle)  # occupied
    with pytest.raises(DriverError, match="cuMemUnmap"):
        driver.unmap(address, size)  # a part
    with pytest.raises(DriverError, match="cuMemUnmap"):
        driver.unmap(address + 2 * size, size)  # nothing there
    with pytest.raises(DriverError, match="cuMemAddressFree"):
        driver.free_address(address, 4 * size)  # still mapped
    driver.unmap(address, 2 * size)
    driver.free_address(address, 4 * size)
    driver.release(handle)
    for call, value in ((driver.release, handle), (driver.free, 1), (driver.close_ipc, 1)):
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
            call(value)
    with pytest.raises(DriverError, match="create_stream"):
        driver.synchronize(77)


def test_what_is_used_is_what_somebody_holds(driver: EmulatedDriver) -> None:
    name = f"emulated-{os.environ[DEVICE_VARIABLE]}"
    handle = driver.create(4 * GRANULARITY)
    assert sorted(held_anywhere(name).values()) == [4 * GRANULARITY], "by descriptor"
    fd = driver.export_fd(handle)
    address = map_anywhere(driver, handle, 4 * GRANULARITY, write=True)
    driver.release(handle)
    os.close(fd)
    assert sorted(held_anywhere(name).values()) == [4 * GRANULARITY], "by mapping"
    driver.allow(address + GRANULARITY, GRANULARITY, write=False)
    assert sorted(held_anywhere(name).values()) == [4 * GRANULARITY], "by a mapping in pieces"
    assert held_anywhere(name[:-1]) == {} == held_anywhere(name + "0"), "another device"
    unmap(driver, address, 4 * GRANULARITY)
    assert held_anywhere(name) == {}


def test_other_processes_fill_the_same_device(driver: EmulatedDriver) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from serverlesslora_ipc.cuda.driver import open_driver\n"
            "driver = open_driver('emulated')\n"
            "driver.start()\n"
            f"driver.create({60 * GRANULARITY})\n"
            "print('holding', flush=True)\n"
            "input()\n",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"holding\n"
        assert driver.memory().free_bytes == 4 * GRANULARITY
        with pytest.raises(OutOfDeviceMemory, match=f"{4 * GRANULARITY} free"):
            driver.create(5 * GRANULARITY)
        child.kill()
    assert driver.memory().free_bytes == 64 * GRANULARITY


def test_pinned_memory_goes_with_the_last_array_over_it() -> None:
    memory = mmap.mmap(-1, 1000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    freed: list[int] = []
    with Pinned(address, 1000, freed.append) as pinned:
        assert (len(pinned.view), pinned.view.readonly, pinned.view.format) == (1000, False, "B")
    assert freed == [address]
    pinned.close()
    assert freed == [address]
    with Pinned(address, 1000, freed.append) as pinned:
        part = pinned.view[10:20]
        array = (ctypes.c_char * 5).from_buffer(part)
    assert freed == [address]
    del part
    assert freed == [address]
    del array
    assert freed == [address, address]
