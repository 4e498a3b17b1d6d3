"""On a device a worker reads adapters beside its running steps: whoever is being answered does not wait for it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from serverlesslora.engine.adapters import AdapterRead
from serverlesslora.engine.cuda.device import CudaDevice
from serverlesslora.engine.engine import Engine
from serverlesslora.worker.lease import DeviceLease
from serverlesslora.worker.main import Worker
from serverlesslora_ipc.channel import Channel
from serverlesslora_ipc.messages import (
    Delta,
    Finished,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Loaded,
    Refused,
    SamplingParams,
    Shutdown,
    TokensPrompt,
    WorkerToGateway,
)
from tests.fakes import tiny_model, write_adapter
from tests.test_engine import Bench


def ask(name: str, adapter: str | None, max_tokens: int) -> Generate:
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    return Generate(name, adapter, TokensPrompt((1, 2, 3)), sampling)


def test_reading_an_adapter_holds_up_nobody(device: CudaDevice, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    adapter = write_adapter(tmp_path / "a", tiny_model(), rank=2)
    engine = Bench(blocks=64, device=device, max_running=2).engine
    read = engine.read_adapter
    may_read = threading.Event()

    def read_slowly(message: LoadAdapter) -> AdapterRead:
        assert may_read.wait(60), "the reader held up the step it waits for"
        return read(message)

    engine.read_adapter = read_slowly  # type: ignore[method-assign]
    ours, theirs = socket.socketpair()
    gateway: Channel[WorkerToGateway] = Channel(ours, WorkerToGateway)
    worker = Worker(Channel[GatewayToWorker](theirs, GatewayToWorker), engine, DeviceLease(None), time.monotonic)
    threading.Thread(target=worker.load, daemon=True).start()
    worker._inbox.put([ask("running", None, 8), LoadAdapter("a", str(adapter)), LoadAdapter("bad", "/nowhere")])

    @torch.inference_mode()
    def main_loop() -> None:
        device.driver.make_current()
        with theirs:  # or the test would wait for a dead worker
            worker.main_loop()

    thread = threading.Thread(target=main_loop)
    thread.start()
    request.addfinalizer(ours.close)
    ours.settimeout(60)
    seen: list[WorkerToGateway] = []
    while not any(isinstance(message, Finished) for message in seen):
        seen += gateway.receive().messages
        if sum(isinstance(message, Delta) for message in seen) == 3:
            may_read.set()  # it has taken steps while the adapter was waited for
    while sum(isinstance(message, (Loaded, Refused)) for message in seen) < 2:
        seen += gateway.receive().messages
    worker._inbox.put([ask("then", "a", 2)])
    while sum(isinstance(message, Finished) for message in seen) < 2:
        seen += gateway.receive().messages
    worker._inbox.put([Shutdown()])
    thread.join(60)
    assert not thread.is_alive()
    assert {type(message) for message in seen if getattr(message, "digest", None) == "a"} == {Loaded}
    assert {type(message) for message in seen if getattr(message, "digest", None) == "bad"} == {Refused}


def test_the_cpu_reads_between_steps() -> None:
    engine: Engine = Bench(blocks=8).engine
    assert not engine.loads_aside, "both would want the same cores"
