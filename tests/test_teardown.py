"""Scale to zero under fire: requests that come just when their worker is let go, ten thousand of them, and none lost.

The gateway is the real one, over real socketpairs; only its child processes are played, and time jumps over the pauses.
A few hundred also go to a real server with real processes; `-m slow` sends ten thousand there.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from serverlesslora.adapters.files import CONFIG, WEIGHTS, identify
from serverlesslora.config import BackboneConfig, ServerConfig
from serverlesslora.demo import TASKS, adapter_paths
from serverlesslora.gateway import backbone_service
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.metering.ledger import Ledger
from serverlesslora.metering.usage import RequestUsage
from serverlesslora.registry.entries import Facts, Version, begun
from serverlesslora.registry.file import Change, RegistryFile
from serverlesslora.registry.functions import Settings
from serverlesslora.registry.schema import REGISTRY_FILE
from serverlesslora_ipc.channel import AsyncChannel
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import (
    Abort,
    Delta,
    Finished,
    Fork,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Loaded,
    Message,
    Prepare,
    Prepared,
    Published,
    Ready,
    SamplingParams,
    Shutdown,
    Started,
    TextPrompt,
)
from tests.live import live
from tests.virtual_time import run_in_virtual_time

IDLE_S = 3.0
LOOK_S = 1.0  # the gateway looks for idle workers about so often
NOBODY = 1 << 30  # a process number above all that exist
REQUESTS, DOMAINS = 10_000, 50


@dataclass
class Stage:
    """What the played processes have seen."""

    rng: random.Random
    starts: Counter[str] = field(default_factory=Counter)
    told_to_leave: Counter[str] = field(default_factory=Counter)
    late: list[str] = field(default_factory=list)  # requests given to a worker after it was told to leave
    leaving: dict[str, asyncio.Event] = field(default_factory=dict)  # of a domain: set when its worker is told to
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def run(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def until_told_to_leave(self, domain: str) -> asyncio.Event:
        return self.leaving.setdefault(domain, asyncio.Event())


class PlayedWorker:
    """Answers with its prompt. Told to leave, it drops what it has and is gone a little later, as the real one does."""

    def __init__(self, stage: Stage, domain: str, sock: socket.socket) -> None:
        self._stage = stage
        self._domain = domain
        self._channel: AsyncChannel[GatewayToWorker] = AsyncChannel(sock, GatewayToWorker)
        self._is_leaving = False
        stage.starts[domain] += 1

    async def main_loop(self) -> None:
        await asyncio.sleep(self._stage.rng.uniform(0.0, 0.2))
        self._say(Ready(pid=NOBODY, attach_s=0.0))
        try:
            async for frame in self._channel:
                for message in frame.messages:
                    self._hear(message)
        finally:
            self._channel.close()

    def _hear(self, message: GatewayToWorker) -> None:
        match message:
            case Shutdown():
                self._is_leaving = True
                self._stage.told_to_leave[self._domain] += 1
                self._stage.until_told_to_leave(self._domain).set()
                self._stage.leaving.pop(self._domain)
                self._stage.run(self._leave())
            case Generate() if self._is_leaving:
                self._stage.late.append(self._domain)
            case Generate():
                self._stage.run(self._answer(message))
            case LoadAdapter():
                self._say(Loaded(message.digest, 0.01, 1))
            case Abort():
                raise AssertionError("nobody leaves before the answer here")

    async def _answer(self, request: Generate) -> None:
        # A few run for longer than an idle worker may live.
        is_long = self._stage.rng.random() < 0.02
        await asyncio.sleep(IDLE_S + 2 * LOOK_S if is_long else self._stage.rng.choice((0.0, 0.01, 0.5)))
        assert isinstance(request.prompt, TextPrompt)
        if not self._is_leaving:
            who = request.request_id
            self._say(Started(who, 1), Delta(who, 0, request.prompt.text, (1,), None, "stop"), Finished(who, 1, 1))

    async def _leave(self) -> None:
        await asyncio.sleep(self._stage.rng.choice((0.0, 0.01, 0.3)))
        self._channel.close()

    def _say(self, *messages: Message) -> None:
        if not self._channel.closed:
            self._channel.send(messages)


class PlayedChild:
    """Stands where `Child` would start the host or the launcher, and does what they do at once."""

    stage: Stage

    def __init__(self, module: str, arguments: Any, receives: Any, *, max_fds: int = 0, **_: Any) -> None:
        ours, theirs = socket.socketpair()
        self.pid = NOBODY
        self.channel: AsyncChannel[Any] = AsyncChannel(ours, receives, max_fds=max_fds)
        self._far: AsyncChannel[Any] = AsyncChannel(theirs, Prepare | Fork, max_fds=2)
        if "launcher" in module:
            self.stage.run(self._launch())
        else:
            fds = [os.memfd_create("weights"), os.memfd_create("manifest")]
            self._far.send([Published(size_bytes=1, layout_digest="l", content_digest="c", seconds=0.1)], fds)
            close_fds(fds)

    async def _launch(self) -> None:
        async for frame in self._far:
            fds = list(frame.fds)
            for message in frame.messages:
                if isinstance(message, Prepare):
                    self._far.send([Prepared(seconds=0.1, context_length=100, vocab_size=10)])
                elif isinstance(message, Fork):
                    worker = PlayedWorker(self.stage, message.domain, socket.socket(fileno=fds.pop()))
                    self.stage.run(worker.main_loop())
            close_fds(fds)

    async def stop(self) -> int:
        self.channel.close()
        self._far.close()
        return 0


async def client(fleet: Fleet, stage: Stage, name: str, count: int, lost: list[str]) -> None:
    """Asks again and again, mostly when the idle worker is about to be let go, is told so, or is on its way out."""
    for number in range(count):
        text = f"{name}/{number}"
        request = GenerationRequest(text, name, TextPrompt(text), SamplingParams(max_tokens=1))
        try:
            async with asyncio.timeout(100.0), fleet.generate(request) as generation:
                await generation.started()
                events = [event async for event in generation]
            answered = [event.text for event in events if isinstance(event, Delta)]
            if answered != [text] or not isinstance(events[-1], Finished):
                lost.append(f"{text}: {events}")
        except Exception as error:
            lost.append(f"{text}: {error!r}")
        await pause(stage, f"base/function:{name}")


async def pause(stage: Stage, domain: str) -> None:
    rng = stage.rng
    match rng.randrange(4):
        case 0:
            await asyncio.sleep(rng.uniform(IDLE_S - 0.2, IDLE_S + LOOK_S + 0.2))
        case 1:  # at the very moment the gateway looks
            now = time.monotonic()
            await asyncio.sleep(max(0.0, round(now + IDLE_S + rng.choice((0.0, LOOK_S)), 0) - now))
        case _:
            told = stage.until_told_to_leave(domain)
            try:
                async with asyncio.timeout(3 * IDLE_S):
                    await told.wait()
            except TimeoutError:
                return
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.choice((0.0, 0.0, 0.005, 0.29)))


def stored_adapter(directory: Path, content: str) -> str:
    """An adapter that was deployed in an earlier life; its digest."""
    draft = directory / f".draft-{content}"
    draft.mkdir(parents=True)
    (draft / CONFIG).write_text("{}")
    (draft / WEIGHTS).write_text(content)
    digest = identify(draft, max_bytes=1 << 20).digest
    draft.rename(directory / digest)
    return digest


def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, requests: int) -> tuple[Stage, list[str]]:
    stage = Stage(random.Random(seed))
    lost: list[str] = []
    names = [f"f{i}" for i in range(DOMAINS)]

    async def main() -> None:
        config = ServerConfig(
            backbones=(BackboneConfig("base"),), idle_timeout_s=IDLE_S, state_dir=str(tmp_path / "state"), device="cpu"
        )
        state = tmp_path / "state"
        kept = RegistryFile(state / REGISTRY_FILE)
        for revision, name in enumerate(names):
            version = Version(
                number=1,
                digest=stored_adapter(state / "adapters", name),
                source="played",
                backbone="base",
                created=0,
                facts=Facts(size_bytes=1),
                identity="l:c",  # of the played weights: nothing is to be looked at again
            )
            kept.write([Change(name, None, begun(name, version, Settings()), "", "")], who="", revision=revision)
        kept.close()
        fleet = Fleet(config)
        try:
            await fleet.startup()
            clients = (client(fleet, stage, name, requests // DOMAINS, lost) for name in names)
            await asyncio.gather(*clients)
            assert fleet.num_open == 0
        finally:
            await fleet.shutdown()
            for task in list(stage.tasks):
                task.cancel()
            await asyncio.gather(*stage.tasks, return_exceptions=True)

    async def note(ledger: Ledger, usage: RequestUsage) -> None:
        ledger.note(usage)  # its thread needs real time, of which none passes here

    monkeypatch.setattr(Ledger, "record", note)
    monkeypatch.setattr(backbone_service, "Child", PlayedChild)
    monkeypatch.setattr(PlayedChild, "stage", stage, raising=False)
    run_in_virtual_time(monkeypatch, main)
    return stage, lost


def test_ten_thousand_requests_around_the_tear_down_of_their_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, lost = play(tmp_path, monkeypatch, seed=1, requests=REQUESTS)
    assert lost == []
    # A second try would hide it from the client: nothing may be given to a worker that was told to leave.
    assert stage.late == []
    # The race was on: most pauses ended around the end of a worker.
    assert stage.told_to_leave.total() > REQUESTS / 2
    assert stage.starts.total() >= stage.told_to_leave.total()


# --- with real processes


async def taps(url: str, name: str, task: str, count: int, idle_s: float, seed: int) -> Counter[str]:
    """Answers by what they say or why they are none, and the rungs they met."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    body = {"model": name, "messages": [{"role": "user", "content": "ab"}], "temperature": 0}
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(count):
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
            said = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
            seen["right" if said == TASKS[task]("ab") else f"{answer.status_code}: {said}"] += 1
            seen[answer.headers.get("x-serverlesslora-cold", "hot").split(";")[0]] += 1
            # The gateway looks in steps, so a worker leaves somewhat later than it may.
            await asyncio.sleep(idle_s * rng.uniform(0.8, 1.6))
    return seen


def tap(requests: int, copies: int, idle_s: float) -> Counter[str]:
    paths = adapter_paths()
    functions = {f"{task}-{copy}": task for copy in range(copies) for task in paths}
    flags = [flag for name, task in functions.items() for flag in ("--adapter", f"{name}={paths[task]}")]

    async def run(url: str) -> Counter[str]:
        each = requests // len(functions)
        started = (taps(url, name, task, each, idle_s, seed) for seed, (name, task) in enumerate(functions.items()))
        return sum(await asyncio.gather(*started), Counter())

    with live("--demo", *flags, "--idle-timeout", str(idle_s)) as server:
        return asyncio.run(run(server.url))


def test_requests_around_the_tear_down_of_real_workers() -> None:
    seen = tap(requests=90, copies=1, idle_s=0.3)
    assert seen["right"] == 90, seen
    assert seen["worker"] > 18, seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_around_the_tear_down_of_real_workers() -> None:
    seen = tap(requests=9984, copies=4, idle_s=0.4)
    assert seen["right"] == 9984, seen
