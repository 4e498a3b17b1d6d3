"""A backbone on a device, emulated: published, mapped, adopted, watched, and never leaked. Hosts are real processes."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from serverlesslora.backbone import hold
from serverlesslora.backbone.attach import AttachError, assign, attach, build_tree
from serverlesslora.backbone.device_host import HeldDevice
from serverlesslora.backbone.device_map import MappedBackbone, map_backbone
from serverlesslora.backbone.loader import load, load_to_device
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import sealed
from serverlesslora_ipc.cuda.driver import Driver, DriverError, open_driver
from serverlesslora_ipc.cuda.emulated import BYTES_VARIABLE, DEVICE_VARIABLE, REFUSES_VARIABLE
from serverlesslora_ipc.manifest import Manifest
from serverlesslora_ipc.messages import (
    Adopt,
    Attach,
    BackboneFailed,
    Progress,
    Published,
    Sharing,
    Shutdown,
    Verified,
    Verify,
)
from tests.fakes import ManualClock
from tests.test_backbone import TIMEOUT_S, Host, save

CPU = torch.device("cpu")
REFUSES: dict[Sharing, str] = {"vmm": "", "vmm-writable": "read-only", "cuda-ipc": "fds"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "llama:tied_bias")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this test's own; hosts inherit it."""
    monkeypatch.setenv(DEVICE_VARIABLE, f"host-{os.getpid()}-{time.monotonic_ns()}")


@contextlib.contextmanager
def started(sharing: Sharing = "vmm") -> Iterator[Driver]:
    """Whatever happens inside must leave the device as it was."""
    os.environ[REFUSES_VARIABLE] = REFUSES[sharing]
    driver = open_driver("emulated")
    driver.start()
    try:
        yield driver
        assert driver.memory().free_bytes == driver.memory().total_bytes, "device memory leaks"
    finally:
        del os.environ[REFUSES_VARIABLE]
        driver.stop()


def host(model: Path | None = None) -> Host:
    arguments = ["--model", str(model), "--dtype", "float32"] if model else []
    return Host("device_host", "--device", "emulated", *arguments)


class Received(NamedTuple):
    published: Published
    weights_fd: int | None
    manifest_fd: int

    @property
    def manifest(self) -> Manifest:
        return manifests.read(self.manifest_fd)

    @property
    def fds(self) -> list[int]:
        return [self.manifest_fd] if self.weights_fd is None else [self.weights_fd, self.manifest_fd]

    def map(self, driver: Driver) -> MappedBackbone:
        return map_backbone(driver, self.published.sharing, self.weights_fd, self.published.handle, self.manifest, CPU)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def receive(host: Host) -> Received:
    message, fds = host.receive()
    assert isinstance(message, Published), message
    *weights, manifest_fd = fds
    return Received(message, weights[0] if weights else None, manifest_fd)


@contextlib.contextmanager
def held(driver: Driver, model: Path) -> Iterator[tuple[Host, Received]]:
    """A host and what it says. It adopts what this process has loaded: that spares a process that imports torch."""
    publication, manifest_fd, manifest, _ = load_to_device(str(model), driver, dtype="float32")
    with publication, host() as successor:
        assert publication.fd is not None
        successor.channel.send([Adopt()], [publication.fd, manifest_fd])
        os.close(manifest_fd)
        received = receive(successor)
        assert received.published.content_digest == manifest.content_digest
        publication.close()
        yield successor, received
        received.close()


def receive_verified(host: Host) -> Verified:
    message, _ = host.receive()
    assert isinstance(message, Verified), message
    return message


def kill(host: Host) -> None:
    host.process.send_signal(signal.SIGKILL)
    assert host.process.wait(TIMEOUT_S) == -signal.SIGKILL


def ends_in_child(action: Callable[[], object]) -> int:
    """What ends a process that does this."""
    if not (pid := os.fork()):
        faulthandler.disable()
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def flip(mapped: MappedBackbone) -> None:
    """A worker changes one byte, where it can."""
    address = mapped.region.data_ptr() + 1000
    ctypes.memset(address, ctypes.string_at(address, 1)[0] ^ 1, 1)


@pytest.mark.parametrize("sharing", ["vmm", "vmm-writable", "cuda-ipc"])
def test_a_host_loads_and_a_worker_attaches_what_the_cpu_would(llama: Path, sharing: Sharing) -> None:
    cpu = load(str(llama), dtype="float32")
    ids = torch.arange(12)[None]
    with sealed.map_readonly(cpu.weights_fd) as weights:
        expected = attach(weights, cpu.manifest, attention="eager")
        with torch.no_grad():
            logits = expected(ids).logits
        content = weights[:]
        del expected
    with started(sharing) as driver, host(llama) as publisher:
        received = receive(publisher)
        assert received.published.sharing == sharing
        assert (received.weights_fd is None) == (sharing == "cuda-ipc")
        assert received.manifest == cpu.manifest
        assert received.published.content_digest == cpu.manifest.content_digest
        mapped = received.map(driver)
        assert bytes(mapped.region.numpy()) == content
        model = build_tree(received.manifest, attention="eager")
        assign(model, mapped.region, received.manifest)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert storages == {mapped.region.data_ptr()}
        publisher.channel.send([Attach(), Verify()])
        again = receive(publisher)
        assert again.published == received.published
        digest = cpu.manifest.content_digest
        assert receive_verified(publisher) == Verified(content_digest=digest, intact=True)
        if sharing == "vmm":
            assert ends_in_child(lambda: flip(mapped)) == -signal.SIGSEGV
        else:
            assert ends_in_child(lambda: flip(mapped)) == 0
            altered = receive_verified(publisher)  # nobody asked
            assert not altered.intact
        mapped.close()
        publisher.channel.send([Shutdown()])
        assert publisher.process.wait(TIMEOUT_S) == 0
        again.close()
        received.close()
    os.close(cpu.weights_fd)
    os.close(cpu.manifest_fd)


def test_who_writes_read_only_memory_dies_alone(llama: Path) -> None:
    with started() as driver, held(driver, llama) as (successor, received), received.map(driver) as mapped:
        assert ends_in_child(lambda: flip(mapped)) == -signal.SIGSEGV
        assert ends_in_child(lambda: ctypes.string_at(mapped.region.data_ptr(), 1)) == 0
        successor.channel.send([Verify()])
        assert receive_verified(successor).intact


def test_an_alteration_is_reported_once_unasked_and_whenever_asked(llama: Path) -> None:
    with (
        started("vmm-writable") as driver,
        held(driver, llama) as (successor, received),
        received.map(driver) as mapped,
    ):
        assert ends_in_child(lambda: flip(mapped)) == 0
        altered = receive_verified(successor)
        assert not altered.intact
        successor.channel.send([Attach()])
        receive(successor).close()
        successor.channel.send([Verify()])
        assert receive_verified(successor) == altered


@pytest.mark.parametrize("sharing", ["vmm", "vmm-writable"])
def test_a_killed_host_is_replaced_by_one_that_adopts(llama: Path, sharing: Sharing) -> None:
    with started(sharing) as driver, held(driver, llama) as (first, received):
        kill(first)
        with received.map(driver), host() as successor:
            successor.channel.send([Attach()])
            early, _ = successor.receive()
            assert isinstance(early, BackboneFailed)
            assert "no backbone is held yet" in early.reason
            successor.channel.send([Adopt()], received.fds)
            again = receive(successor)
            assert again.published.sharing == sharing
            assert again.published.content_digest == received.published.content_digest
            with again.map(driver) as mapped:
                assert mapped.region.numel() == again.manifest.total_bytes
            again.close()
            successor.channel.send([Verify()])
            assert receive_verified(successor).intact


def test_what_is_no_device_memory_is_not_adopted(llama: Path) -> None:
    cpu = load(str(llama), dtype="float32")
    with started(), host() as successor:
        successor.channel.send([Adopt()], [cpu.weights_fd, cpu.manifest_fd])
        failed, _ = successor.receive()
        assert isinstance(failed, BackboneFailed)
        assert "cuMemImportFromShareableHandle" in failed.reason
        assert successor.process.wait(TIMEOUT_S) == 1
    os.close(cpu.weights_fd)
    os.close(cpu.manifest_fd)


def test_a_host_killed_while_loading_leaks_nothing(llama: Path) -> None:
    with started(), host(llama) as publisher:
        assert publisher.channel.poll(TIMEOUT_S)
        (message, *_), fds = publisher.channel.receive()
        assert isinstance(message, Progress)
        kill(publisher)
        with contextlib.suppress(Exception):  # what it still said before it died
            while True:
                fds += publisher.channel.receive().fds
        for fd in fds:
            os.close(fd)


def test_a_host_that_is_hung_up_on_ends_and_leaks_nothing(llama: Path) -> None:
    with started("vmm-writable") as driver, held(driver, llama):
        pass


def test_a_full_device_is_said_to_be_full(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BYTES_VARIABLE, str(64 << 10))
    with started(), host(llama) as publisher:
        failed, _ = publisher.receive()
        assert isinstance(failed, BackboneFailed)
        assert "CUDA_ERROR_OUT_OF_MEMORY" in failed.reason
        assert publisher.process.wait(TIMEOUT_S) == 1


def test_a_tree_takes_no_memory_of_another_size(llama: Path) -> None:
    with started() as driver:
        publication, manifest_fd, manifest, _ = load_to_device(str(llama), driver, dtype="float32")
        with publication:
            with pytest.raises(AttachError, match="the manifest describes"):
                assign(build_tree(manifest, attention="eager"), torch.zeros(5, dtype=torch.uint8), manifest)
            with pytest.raises(DriverError):
                map_backbone(driver, "cuda-ipc", None, b"nonsense", manifest, CPU)
        os.close(manifest_fd)


def test_a_host_of_guarded_memory_keeps_no_context_but_while_it_verifies(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serverlesslora.backbone.device_host._SLICE_BYTES", 5000)  # many slices, the last one short
    with started() as driver:
        own = open_driver("emulated")
        own.start()
        publication, manifest_fd, manifest, _ = load_to_device(str(llama), own, dtype="float32")
        own_held = HeldDevice(own, publication, manifest_fd, manifest, 0.0)
        for _ in range(2):
            with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
                own.memory()
            verification = own_held.begin_verification()
            assert own.memory().total_bytes
            verified = None
            while verified is None:
                verified = verification.step()
            assert verified == hold.verdict(manifest.content_digest, manifest)
            verification.close()
        assert driver.memory().free_bytes < driver.memory().total_bytes
        for fd in own_held.fds:
            os.close(fd)


def test_watching_takes_less_than_a_hundredth_of_the_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started("vmm-writable") as driver:
        publication, manifest_fd, manifest, _ = load_to_device(str(llama), driver, dtype="float32")
        held = HeldDevice(driver, publication, manifest_fd, manifest, 0.0)
        watch = hold.Watch(held)
        clock = ManualClock(tick=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", clock)
            for _ in range(3):
                assert watch.step() is None
                assert watch.pause_s > 0.5 * 99
        watch.close()
        publication.close()
        for fd in held.fds:
            os.close(fd)
