"""The rungs of a cold start with real processes: what a first token costs, and what an idle worker holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu.children import Child, settled, steady
from bench.gpu.models import RandomBackbone, published, seal_manifest
from bench.gpu.processes import Peer, wait_for
from bench.gpu.record import Recorder
from bench.gpu.serving import prompt, random_adapters
from serverlesslora_ipc.channel import Channel
from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.messages import (
    Delta,
    Failed,
    Finished,
    Fork,
    Generate,
    LauncherToGateway,
    LoadAdapter,
    Loaded,
    Message,
    Prepare,
    Prepared,
    Ready,
    Refused,
    SamplingParams,
    TokensPrompt,
    WorkerLimits,
    WorkerToGateway,
)

LEAK_TOLERANCE = 32 << 20
WORKER_BAR_MS = 150.0  # from the pool, over a warm first token
IDLE_BAR_MB = 700.0
OWN_BAR_MB = 100.0  # of it, beyond what a context costs anybody
QUIET_S = 1.0  # a spare that has done nothing for so long is ready
ROUND_S, ALONE_S = 15.0, 20.0  # what another round and the worker without a pool may take
PROMPT = 32


def run(recorder: Recorder) -> None:
    setting = recorder.setting
    driver = open_driver(setting.kind)
    driver.start()
    torch.zeros(1, device=setting.torch_device)
    shape, dtype = ("tiny", torch.float32) if setting.is_dry else ("8b", torch.bfloat16)
    with published(driver, shape, dtype, setting.torch_device, setting.scratch / "tokenizer") as backbone:
        [adapter] = random_adapters(setting.scratch, backbone, [16] if not setting.is_dry else [2])
        # Another one as far as anybody can tell: other files, another digest.
        adapters = [adapter, Path(shutil.copytree(adapter, setting.scratch / "another"))]
        Rungs(recorder, driver, backbone, adapters).run()


class Worker:
    """The gateway's side of one worker."""

    def __init__(self, launcher: Peer, worker_id: str, limits: WorkerLimits) -> None:
        ours, theirs = socket.socketpair()
        self.channel: Channel[Message] = Channel(ours, WorkerToGateway)
        launcher.send(Fork(worker_id=worker_id, domain=worker_id, limits=limits), [theirs.fileno()])
        theirs.close()
        self._requests = 0

    def ready(self) -> Ready:
        return wait_for(self.channel, Ready)[0]

    def load(self, digest: str, path: Path) -> Loaded:
        self.channel.send([LoadAdapter(digest, str(path))])
        while True:
            for message in self._receive():
                if isinstance(message, Refused):
                    raise RuntimeError(message.reason)
                if isinstance(message, Loaded):
                    return message

    def first_token(self, ids: list[int], adapter: str | None) -> int:
        """Asks for two tokens and returns the first; the rest is waited for."""
        self._requests += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        self.channel.send([Generate(str(self._requests), adapter, TokensPrompt(tuple(ids)), sampling)])
        return self.hear_first()

    def hear_first(self) -> int:
        while True:
            for message in self._receive():
                if isinstance(message, Failed):
                    raise RuntimeError(message.error.message)
                if isinstance(message, Delta) and message.token_ids:
                    return message.token_ids[0]

    def drain(self) -> None:
        while not any(isinstance(message, Finished) for message in self._receive()):
            pass

    def _receive(self) -> list[Message]:
        if not self.channel.poll(60):
            raise TimeoutError("the worker says nothing")
        return list(self.channel.receive().messages)

    def close(self) -> None:
        self.channel.close()


class Rungs:
    def __init__(self, recorder: Recorder, driver: Driver, backbone: RandomBackbone, adapters: list[Path]) -> None:
        self._recorder = recorder
        self._driver = driver
        self._backbone = backbone
        self._adapters = adapters
        self._dry = recorder.setting.is_dry
        kv_bytes, rows, tokens = (1 << 30, 32, 2048) if not self._dry else (1 << 20, 2, 32)
        self._limits = WorkerLimits(
            threads=1, kv_bytes=kv_bytes, max_running=rows, max_step_tokens=tokens, prefix_cache=False
        )
        self._vocab = 128256 if not self._dry else 300
        self._count = 0

    def run(self) -> None:
        before = steady(self._free) if not self._dry else self._free()
        self._recorder.part("idle workers and rungs", lambda: self._rungs(before), needs_s=15)
        tolerance = 0 if self._dry else LEAK_TOLERANCE
        lost = before - settled(self._free, before, tolerance)
        self._recorder.check(
            "launcher and workers gone: nothing leaked", abs(lost) <= tolerance, f"{lost / 1e6:.1f} MB"
        )

    def _rungs(self, before: int) -> None:
        bare = 0 if self._dry else self._bare_context()
        began = time.perf_counter()
        with self._launcher(spares=1) as launcher:
            self._wait_for_spare(launcher)
            self._recorder.number("a first spare is ready after", time.perf_counter() - began - QUIET_S, "s")
            held = before - self._free()
            self._recorder.number("device memory of an idle worker", held / 1e6, "MB", bar=IDLE_BAR_MB)
            self._recorder.number("context of a bare process with torch", bare / 1e6, "MB")
            self._recorder.number("of an idle worker beyond such a context", (held - bare) / 1e6, "MB", bar=OWN_BAR_MB)
            answers, pool_ms, hot_ms, disk_ms = set(), [], [], []
            for round_ in range(2 if not self._dry else 1):
                if round_:
                    if self._recorder.setting.seconds_left < ROUND_S + ALONE_S:
                        break
                    self._wait_for_spare(launcher)
                ids = self._prompt()
                began = time.perf_counter()
                worker = self._fork(launcher)
                try:
                    worker.channel.send([LoadAdapter("d0", str(self._adapters[0]))])
                    answers.add(worker.first_token(self._fixed(), "d0"))
                    pool_ms.append((time.perf_counter() - began) * 1e3)
                    worker.drain()
                    hot_ms += [self._timed(worker, ids, "d0") for ids in (self._prompt() for _ in range(5))]
                    began = time.perf_counter()
                    worker.channel.send([LoadAdapter("d1", str(self._adapters[1]))])
                    worker.first_token(ids, "d1")
                    disk_ms.append((time.perf_counter() - began) * 1e3)
                    worker.drain()
                finally:
                    worker.close()
            self._report(pool_ms, hot_ms, disk_ms)
        self._recorder.part("a worker without a pool", lambda: self._without_spare(answers), needs_s=ALONE_S)

    def _report(self, pool_ms: list[float], hot_ms: list[float], disk_ms: list[float]) -> None:
        number, hot = self._recorder.number, statistics.median(hot_ms)
        number("first token: hot", hot, "ms")
        number("first token: adapter from cached files, over hot", statistics.median(disk_ms) - hot, "ms")
        over = statistics.median(pool_ms) - hot
        # The bar is for what a client waits: a worker of its own has no adapter yet.
        number("first token: worker from the pool and its adapter from files, over hot", over, "ms", bar=WORKER_BAR_MS)
        number("first token: of it the worker's part", over - (statistics.median(disk_ms) - hot), "ms")

    def _without_spare(self, answers: set[int]) -> None:
        """The same question to a worker that had to do everything itself."""
        with self._launcher(spares=0) as launcher:
            began = time.perf_counter()
            worker = self._fork(launcher)
            try:
                ready = worker.ready()
                self._recorder.number("a worker without a pool is ready after", time.perf_counter() - began, "s")
                self._recorder.check(
                    "workers say what they run on", ready.device.startswith(self._recorder.setting.kind)
                )
                self._recorder.check("workers replay graphs", ready.graphs.startswith("on"), ready.graphs)
                worker.load("d0", self._adapters[0])
                answers.add(worker.first_token(self._fixed(), "d0"))
                worker.drain()
            finally:
                worker.close()
        self._recorder.check("workers from the pool and without it answer alike", len(answers) == 1, str(answers))

    def _timed(self, worker: Worker, ids: list[int], adapter: str) -> float:
        began = time.perf_counter()
        worker.first_token(ids, adapter)
        elapsed = (time.perf_counter() - began) * 1e3
        worker.drain()
        return elapsed

    def _fork(self, launcher: Peer) -> Worker:
        self._count += 1
        return Worker(launcher, f"w{self._count}", self._limits)

    @contextlib.contextmanager
    def _launcher(self, *, spares: int) -> Iterator[Peer]:
        publication = self._backbone.published
        with Peer(
            "serverlesslora.launcher.zygote", ["--device", self._recorder.setting.kind], LauncherToGateway
        ) as peer:
            manifest_fd = seal_manifest(self._backbone.manifest)
            prepare = Prepare(
                backbone="random",
                num_spares=spares,
                limits=self._limits,
                sharing=publication.sharing,
                handle=publication.handle,
            )
            peer.send(prepare, [fd for fd in (publication.fd, manifest_fd) if fd is not None])
            os.close(manifest_fd)
            peer.wait_for(Prepared)
            yield peer

    def _wait_for_spare(self, launcher: Peer) -> None:
        """Nobody is told when a spare is ready; but then it waits, and uses no processor and no more memory."""
        seen: tuple[object, ...] = ()
        since, deadline = time.monotonic(), time.monotonic() + 60
        while time.monotonic() < deadline:
            spares = _spares(launcher.process.pid)
            now = (*spares, self._free())
            if now != seen or not spares or any(spare.num_children for spare in spares):
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > QUIET_S:
                return
            time.sleep(0.05)
        raise TimeoutError("no spare became ready")

    def _bare_context(self) -> int:
        before = self._free()
        with Child(self._recorder.setting.kind) as child:
            child.ask("start")
            child.ask("torch")
            held = before - self._free()
        settled(self._free, before, LEAK_TOLERANCE)
        return held

    def _prompt(self) -> list[int]:
        self._count += 1
        return prompt(PROMPT if not self._dry else 5, self._vocab, seed=self._count)

    def _fixed(self) -> list[int]:
        return prompt(PROMPT if not self._dry else 5, self._vocab, seed=0)

    def _free(self) -> int:
        return self._driver.memory().free_bytes


class _Spare(NamedTuple):
    pid: int
    ticks: int  # of processor time, that of ended children too
    num_children: int  # a compiler, say


def _spares(launcher: int) -> list[_Spare]:
    """By every process's own word: not every kernel lists the children of a process."""
    parents: list[int] = []
    found: dict[int, int] = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended just now
            # The name is in parentheses and may hold anything.
            name, _, rest = (place / "stat").read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            parents.append(int(fields[1]))
            if parents[-1] == launcher and name == "slora-spare":
                found[int(place.name)] = sum(map(int, fields[11:15]))
    return [_Spare(pid, ticks, parents.count(pid)) for pid, ticks in found.items()]
