"""The launcher on a device, emulated: real processes, real sharing, and the tokens the CPU would give."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch

from tests import triton_interpreter  # noqa: F401  (before anything that holds Triton programs)

# isort: split
from serverlesslora.backbone.loader import Backbone, load
from serverlesslora.engine.engine import Engine
from serverlesslora.launcher import device as on_device
from serverlesslora.launcher import prepared as on_cpu
from serverlesslora.launcher.prepared import PreparedBackbone
from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.cuda.emulated import DEVICE_VARIABLE, REFUSES_VARIABLE
from serverlesslora_ipc.cuda.region import Publication, RegionDraft
from serverlesslora_ipc.messages import (
    Delta,
    Finished,
    Generate,
    LoadAdapter,
    Loaded,
    Prepare,
    Prepared,
    Ready,
    SamplingParams,
    TokensPrompt,
    WorkerLimits,
)
from tests.fakes import byte_tokenizer, tiny_model, write_adapter
from tests.server import wait_until
from tests.test_zygote import TIMEOUT_S, Launcher, Worker, proc, spares_of

LIMITS = WorkerLimits(threads=1, kv_bytes=1 << 20, max_running=1, max_model_len=64)
PROMPT, NUM_TOKENS = tuple(b"one"), 4


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """What runs here is meant for processes of its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    directory = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    loaded = load(str(directory), dtype="float32")
    yield loaded
    os.close(loaded.weights_fd)
    os.close(loaded.manifest_fd)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "a", tiny_model(), rank=4, seed=1, scale=0.4)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A device of this test's own."""
    monkeypatch.setenv(DEVICE_VARIABLE, f"launcher-{os.getpid()}-{time.monotonic_ns()}")
    driver = open_driver("emulated")
    driver.start()
    yield driver
    driver.stop()


def publish(driver: Driver, backbone: Backbone) -> Publication:
    """What a backbone host does, without the host."""
    size = backbone.manifest.total_bytes
    with RegionDraft(driver, size) as draft, driver.pinned(size) as staging:
        staging.view[:] = os.pread(backbone.weights_fd, size, 0)
        driver.copy_in(draft.address, staging.address, size)
        return draft.publish()


def generate(adapter: str | None = None) -> Generate:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    return Generate(request_id="r", adapter=adapter, prompt=TokensPrompt(token_ids=PROMPT), sampling=sampling)


class Said(NamedTuple):
    tokens: tuple[int, ...]
    cached: int


def answer(engine: Engine, adapter: Path | None = None) -> Said:
    """Run one request to its end; the adapter is loaded first."""
    if adapter is not None:
        assert isinstance(engine.load_adapter(LoadAdapter(digest="a", path=str(adapter))), Loaded)
    engine.submit(generate("a" if adapter else None))
    tokens: list[int] = []
    cached = 0
    while engine.has_work:
        for message in engine.step():
            if isinstance(message, Delta):
                tokens += message.token_ids
            elif isinstance(message, Finished):
                cached = message.cached_tokens
    return Said(tuple(tokens), cached)


@pytest.fixture(scope="module")
def golden(backbone: Backbone, adapter: Path) -> dict[str, tuple[int, ...]]:
    """The CPU's answers."""
    prepared = on_cpu.prepare("base", os.dup(backbone.weights_fd), os.dup(backbone.manifest_fd))
    engine = prepared.engine_for(LIMITS)
    with torch.inference_mode():
        return {"base": answer(engine).tokens, "adapter": answer(engine, adapter).tokens}


@pytest.fixture
def rehearsed(driver: Driver, backbone: Backbone) -> Iterator[PreparedBackbone]:
    with publish(driver, backbone) as publication:
        assert publication.fd is not None
        fds = os.dup(publication.fd), os.dup(backbone.manifest_fd)
        prepared = on_device.prepare("base", *fds, publication.sharing, kind="emulated")
        assert next(prepared.model.parameters()).is_meta
        assert (prepared.context_length, prepared.vocab_size) == (256, 260)
        made = on_device.rehearse(prepared, LIMITS)
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        yield made
        assert made.mapped is not None
        made.mapped.close()


def test_a_rehearsal_leaves_an_engine_that_answers_as_the_cpu_does(
    rehearsed: PreparedBackbone, golden: dict[str, tuple[int, ...]], adapter: Path
) -> None:
    engine = rehearsed.engine_for(LIMITS)
    assert engine is rehearsed.engine
    assert engine.graphs_state.startswith("on")
    assert engine._pool is not None
    assert engine._pool.num_resident_chunks == 0, "a spare waits without memory that others could use"
    with torch.inference_mode():
        assert answer(engine) == Said(golden["base"], 0)
        assert answer(engine, adapter).tokens == golden["adapter"]


def test_other_limits_mean_another_engine(rehearsed: PreparedBackbone, golden: dict[str, tuple[int, ...]]) -> None:
    other = rehearsed.engine_for(msgspec.structs.replace(LIMITS, kv_bytes=2 << 20))
    assert other is not rehearsed.engine
    with torch.inference_mode():
        assert answer(other).tokens == golden["base"]
    other.close()


class DeviceLauncher(Launcher):
    def __init__(self, publication: Publication, backbone: Backbone, *, num_spares: int = 0) -> None:
        super().__init__("--device", "emulated", worker=None)
        prepare = Prepare(
            backbone="base",
            num_spares=num_spares,
            limits=LIMITS,
            sharing=publication.sharing,
            handle=publication.handle,
        )
        fds = [fd for fd in (publication.fd, backbone.manifest_fd) if fd is not None]
        self.channel.send([prepare], fds)
        assert isinstance(self.receive(), Prepared)


def tokens_of(worker: Worker, request: Generate) -> tuple[int, ...]:
    worker.channel.send([request])
    tokens: list[int] = []
    while True:
        assert worker.channel.poll(TIMEOUT_S)
        for message in worker.channel.receive().messages:
            match message:
                case Delta():
                    tokens += message.token_ids
                case Finished():
                    return tuple(tokens)


def hear(worker: Worker, kind: type[Any]) -> Any:
    while True:
        assert worker.channel.poll(TIMEOUT_S)
        for message in worker.channel.receive().messages:
            if isinstance(message, kind):
                return message


def test_a_spare_becomes_a_worker_that_answers_as_the_cpu_does(
    driver: Driver, backbone: Backbone, adapter: Path, golden: dict[str, tuple[int, ...]]
) -> None:
    before = driver.memory().free_bytes
    with publish(driver, backbone) as publication, DeviceLauncher(publication, backbone, num_spares=1) as launcher:
        (spare,) = spares_of(launcher)
        looking = Worker(launcher, "looking", "d", limits=LIMITS, may_be_spare=False)
        worker = Worker(launcher, "w", "d", limits=LIMITS)
        assert worker.pid == spare
        ready = hear(worker, Ready)
        assert ready.device.startswith("emulated (")
        assert ready.graphs.startswith("on")
        assert tokens_of(worker, generate()) == golden["base"]
        worker.channel.send([LoadAdapter(digest="a", path=str(adapter))])
        hear(worker, Loaded)
        assert tokens_of(worker, generate("a")) == golden["adapter"]
        links = [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{worker.pid}/fd")]
        assert len([link for link in links if link.startswith("socket:")]) == 1, "no channel but its own"
        assert len(os.listdir(f"/proc/{launcher.process.pid}/task")) == 1
        os.kill(worker.pid, signal.SIGKILL)
        assert launcher.ended() == ("w", -signal.SIGKILL)
        # Who only looks at an adapter takes no spare and records no graphs.
        assert hear(looking, Ready).graphs == "not captured yet"
        looking.channel.send([LoadAdapter(digest="a", path=str(adapter))])
        assert hear(looking, Loaded).rank == 4
        looking.channel.close()
        assert launcher.ended() == ("looking", 0)
    assert driver.memory().free_bytes == before


def test_without_a_spare_and_without_descriptors_a_worker_does_it_all_itself(
    driver: Driver, backbone: Backbone, golden: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSES_VARIABLE, "fds")
    driver.start()
    before = driver.memory().free_bytes
    with publish(driver, backbone) as publication:
        assert publication.sharing == "cuda-ipc"
        with DeviceLauncher(publication, backbone) as launcher:
            worker = Worker(launcher, "w", "d", limits=LIMITS)
            assert hear(worker, Ready).graphs.startswith("on")
            assert tokens_of(worker, generate()) == golden["base"]
            worker.channel.close()
            assert launcher.ended() == ("w", 0)
    assert driver.memory().free_bytes == before


def test_killing_launcher_and_spare_while_they_start_leaks_nothing(driver: Driver, backbone: Backbone) -> None:
    before = driver.memory().free_bytes
    with publish(driver, backbone) as publication, DeviceLauncher(publication, backbone, num_spares=1) as launcher:
        (spare,) = spares_of(launcher)  # it has its name, and is only about to map anything
        launcher.process.kill()
        wait_until(lambda: not _runs(spare), TIMEOUT_S)
    assert driver.memory().free_bytes == before


def _runs(pid: int) -> bool:
    try:
        return proc(pid, "stat").rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
