"""Shared device memory between real processes: who sees it, who may write it, what is left when somebody is killed."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serverlesslora_ipc.cuda.driver import AccessRefused, DriverError
from serverlesslora_ipc.cuda.emulated import (
    BYTES_VARIABLE,
    DEVICE_VARIABLE,
    GRANULARITY,
    REFUSES_VARIABLE,
    EmulatedDriver,
)
from serverlesslora_ipc.cuda.region import Publication, RegionDraft, adopt, attach
from serverlesslora_ipc.messages import Attach, Progress, Published, Sharing, Shutdown, Verified, Verify
from tests import cuda_standin
from tests.cuda_child import DEADLINE_S, Child, Write, digest, pattern, read_back

SIZE = 5 * GRANULARITY + 123  # not a whole number of pages: rounding must not show
WAYS: list[tuple[str, Sharing]] = [("", "vmm"), ("read-only", "vmm-writable"), ("fds", "cuda-ipc")]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that only this test knows."""
    monkeypatch.setenv(DEVICE_VARIABLE, f"region-{os.getpid()}")
    monkeypatch.setenv(BYTES_VARIABLE, str(64 * GRANULARITY))
    monkeypatch.delenv(REFUSES_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if cuda_standin.COMPILER is None:
        pytest.skip("the stand-in for libcuda needs a C compiler")
    return cuda_standin.build(tmp_path_factory.mktemp("standin"))


@pytest.fixture(params=["emulated", "stand-in"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every protocol test runs on the emulated driver and on the GPU's driver over a stand-in for libcuda."""
    if request.param == "emulated":
        return "emulated"
    return f"stand-in:{request.getfixturevalue('library')}"


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    """This process's own look at the device; whatever a test does, all of the memory comes back."""
    driver = EmulatedDriver()
    driver.start()
    before = driver.memory()
    assert before.free_bytes == before.total_bytes
    num_fds = len(os.listdir("/proc/self/fd"))
    yield driver
    assert driver.memory() == before
    assert len(os.listdir("/proc/self/fd")) == num_fds
    driver.stop()


class Host(Child):
    """Announces three moments before it hands out what it made."""

    def __init__(self, kind: str, size: int = SIZE) -> None:
        super().__init__("host", kind, size)

    def reach(self, moment: int) -> None:
        """0: memory taken; 1: half written; 2: published."""
        done_bytes = [0, SIZE // 2, SIZE]
        assert self.answer() == Progress(done_bytes=0, total_bytes=SIZE)
        for done in done_bytes[1 : moment + 1]:
            assert self.ask(Attach()) == Progress(done_bytes=done, total_bytes=SIZE)

    def publish(self) -> tuple[Published, tuple[int, ...]]:
        self.reach(2)
        self.channel.send([Attach()])
        assert self.channel.poll(DEADLINE_S)
        frame = self.channel.receive()
        return frame.messages[0], tuple(frame.fds)


def close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


def start_worker(stack: ExitStack, kind: str, published: Published, fds: tuple[int, ...]) -> Child:
    worker = stack.enter_context(Child("worker", kind))
    assert worker.ask(published, fds) == Progress(done_bytes=SIZE, total_bytes=SIZE)
    return worker


RIGHT = Verified(content_digest=digest(pattern(SIZE)), intact=True)


@pytest.mark.parametrize(("refuses", "sharing"), WAYS)
def test_two_processes_read_what_a_third_wrote(
    kind: str, refuses: str, sharing: Sharing, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, refuses)
    with ExitStack() as stack:
        host = stack.enter_context(Host(kind))
        published, fds = host.publish()
        assert published.sharing == sharing
        assert (published.layout_digest == "") == (sharing == "vmm"), "what is not the best way says why"
        assert (len(fds), len(published.handle)) == ((0, 64) if sharing == "cuda-ipc" else (1, 0))
        workers = [start_worker(stack, kind, published, fds) for _ in range(2)]
        close_all(fds)
        for process in (host, *workers):
            assert process.ask(Verify()) == RIGHT
        memory = driver.memory()
        assert memory.total_bytes - memory.free_bytes == 6 * GRANULARITY, "one copy, rounded up"
        for process in (*workers, host):
            process.channel.send([Shutdown()])
            assert process.process.wait(DEADLINE_S) == 0


def test_a_worker_that_writes_dies_alone(kind: str, driver: EmulatedDriver) -> None:
    with ExitStack() as stack:
        host = stack.enter_context(Host(kind))
        published, fds = host.publish()
        writer, reader = (start_worker(stack, kind, published, fds) for _ in range(2))
        close_all(fds)
        writer.channel.send([Write(offset=SIZE // 3)])
        assert writer.dies_of() == signal.SIGSEGV
        assert reader.ask(Verify()) == RIGHT
        assert host.ask(Verify()) == RIGHT


@pytest.mark.parametrize(("refuses", "sharing"), WAYS[1:])
def test_where_writing_is_possible_the_digest_tells(
    kind: str, refuses: str, sharing: Sharing, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, refuses)
    with ExitStack() as stack:
        host = stack.enter_context(Host(kind))
        published, fds = host.publish()
        assert published.sharing == sharing
        writer, reader = (start_worker(stack, kind, published, fds) for _ in range(2))
        close_all(fds)
        assert writer.ask(Write(offset=SIZE // 3)) == Verified(content_digest="", intact=False)
        assert writer.process.poll() is None
        for process in (reader, host):
            assert not process.ask(Verify()).intact


def test_the_host_cannot_write_either_once_it_published(kind: str, driver: EmulatedDriver) -> None:
    with Host(kind) as host:
        _, fds = host.publish()
        close_all(fds)
        host.channel.send([Write(offset=0)])
        assert host.dies_of() == signal.SIGSEGV


@pytest.mark.parametrize("refuses", ["", "read-only", "fds"])
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_host_killed_at_any_moment_leaves_nothing(
    refuses: str, moment: int, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, refuses)
    with Host("emulated") as host:
        host.reach(moment)
        assert driver.memory().free_bytes == driver.memory().total_bytes - 6 * GRANULARITY
        host.kill()
        assert driver.memory().free_bytes == driver.memory().total_bytes


@pytest.mark.parametrize("refuses", ["", "read-only", "fds"])
def test_workers_killed_at_any_moment_leave_nothing(
    refuses: str, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, refuses)
    with ExitStack() as stack:
        host = stack.enter_context(Host("emulated"))
        published, fds = host.publish()
        idle, attached, reading, survivor = (
            stack.enter_context(Child("worker", "emulated")),
            *(start_worker(stack, "emulated", published, fds) for _ in range(3)),
        )
        taken = driver.memory()
        idle.channel.send([published], fds)  # it may be anywhere between starting and having attached
        reading.channel.send([Verify()])
        for worker in (idle, attached, reading):
            worker.kill()
            assert survivor.ask(Verify()) == RIGHT
        for worker in (idle, reading):
            worker.channel.close()  # the frame nobody took held a descriptor
        assert driver.memory() == taken
        close_all(fds)
        host.kill()
        if refuses != "fds":  # on a GPU memory by handle would go with its owner; the emulated one stays while mapped
            assert survivor.ask(Verify()) == RIGHT
            assert driver.memory() == taken
        survivor.kill()
        assert driver.memory().free_bytes == driver.memory().total_bytes


def test_a_descriptor_alone_keeps_the_memory_for_the_next_host(kind: str, driver: EmulatedDriver) -> None:
    with ExitStack() as stack:
        host = stack.enter_context(Host(kind))
        published, fds = host.publish()
        host.kill()
        with adopt(driver, fds[0], SIZE) as adopted:
            close_all(fds)
            assert (adopted.sharing, adopted.reason) == ("vmm", "")
            assert read_back(driver, adopted) == published.content_digest
            assert adopted.fd is not None
            worker = start_worker(stack, kind, published, (adopted.fd,))
            assert worker.ask(Verify()) == RIGHT


def test_adopting_without_read_only_access(driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, "read-only")
    driver.start()
    with published_here(driver) as publication:
        assert publication.fd is not None
        with adopt(driver, publication.fd, SIZE) as adopted:
            assert adopted.sharing == publication.sharing == "vmm-writable"
            assert "cuMemSetAccess: CUDA_ERROR_NOT_SUPPORTED" in adopted.reason
            assert read_back(driver, adopted) == digest(pattern(SIZE))


def published_here(driver: EmulatedDriver) -> Publication:
    with RegionDraft(driver, SIZE) as draft, driver.pinned(SIZE) as buffer:
        buffer.view[:] = pattern(SIZE)
        driver.copy_in(draft.address, buffer.address, SIZE)
        return draft.publish()


def test_reading_in_parts(driver: EmulatedDriver) -> None:
    data = pattern(SIZE)
    with published_here(driver) as publication, driver.pinned(1000) as buffer:
        assert publication.read_into(5, buffer) == 1000
        assert buffer.view.tobytes() == data[5:1005]
        assert publication.read_into(SIZE - 3, buffer) == 3
        assert buffer.view[:3].tobytes() == data[-3:]
        assert publication.read_into(SIZE, buffer) == 0
        with attach(driver, "vmm", publication.fd, b"", SIZE) as region:
            publication.close()
            publication.close()
            assert ctypes.string_at(region.address, SIZE) == data, "a region outlives its publication"
            region.close()


def test_a_draft_that_is_given_up_leaves_nothing(driver: EmulatedDriver) -> None:
    with pytest.raises(RuntimeError, match="disk"), RegionDraft(driver, SIZE):
        raise RuntimeError("disk")


@pytest.mark.parametrize(
    ("refuses", "steps"),
    [
        ("", ["can_export_fds", "create", "export_fd", "reserve", "map", "allow"]),
        ("fds", ["allocate", "ipc_handle"]),
    ],
)
def test_whatever_fails_while_drafting_is_undone(
    refuses: str, steps: list[str], driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, refuses)
    driver.start()
    before = driver.memory()
    for step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(driver, step, failing)
            with pytest.raises(DriverError, match="out of luck"):
                RegionDraft(driver, SIZE)
        assert driver.memory() == before, step


@pytest.mark.parametrize("step", ["import_fd", "reserve", "map", "allow", "synchronize"])
def test_whatever_fails_while_publishing_is_undone(
    step: str, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RegionDraft(driver, SIZE) as draft:
        taken = driver.memory()
        with monkeypatch.context() as patch:
            patch.setattr(driver, step, failing)
            with pytest.raises(DriverError, match="out of luck"):
                draft.publish()
        assert driver.memory() == taken
        with draft.publish() as publication:
            assert publication.sharing == "vmm"


def failing(*_: object, **__: object) -> Any:
    raise DriverError("test", "out of luck")


def test_what_cannot_be_attached(driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    with published_here(driver) as publication:
        taken = driver.memory()
        fd = publication.fd
        with pytest.raises(DriverError, match="cuMemMap"):
            attach(driver, "vmm", fd, b"", 2 * SIZE)
        with pytest.raises(DriverError, match="without device memory"):
            attach(driver, "vmm", None, b"", SIZE)
        with pytest.raises(DriverError, match="'memfd' without device memory"):
            attach(driver, "memfd", fd, b"", SIZE)
        with pytest.raises(DriverError, match="cuIpcOpenMemHandle"):
            attach(driver, "cuda-ipc", None, b"short", SIZE)
        with open("/dev/null", "rb") as other, pytest.raises(DriverError, match="cuMemImportFromShareableHandle"):
            attach(driver, "vmm", other.fileno(), b"", SIZE)
        monkeypatch.setenv(REFUSES_VARIABLE, "read-only")
        driver.start()
        with pytest.raises(AccessRefused):
            attach(driver, "vmm", fd, b"", SIZE)
        assert driver.memory() == taken


def test_a_device_that_can_share_nothing_says_so_at_once(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, "fds,ipc")
    driver.start()
    with pytest.raises(DriverError, match="cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED"):
        RegionDraft(driver, SIZE)
