"""Requests and deployments on their way through the fleet, with workers, launchers and hosts played by the test."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import pytest

from serverlesslora.adapters.files import CONFIG, WEIGHTS
from serverlesslora.config import BackboneConfig, FunctionConfig, ServerConfig
from serverlesslora.devices import DeviceKind
from serverlesslora.errors import AdapterInvalid, ConfigError, RateLimited, Unavailable, WorkerLost
from serverlesslora.gateway import backbone_service
from serverlesslora.gateway.backbone_service import MAX_FAILED_STARTS, BackboneService
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.deployments import INSPECTIONS_AT_ONCE
from serverlesslora.gateway.fleet import Fleet, worker_limits
from serverlesslora.gateway.worker_state import WorkerState
from serverlesslora_ipc.channel import AsyncChannel, Channel
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import (
    BackboneFailed,
    Delta,
    Finished,
    Forked,
    GatewayToWorker,
    Generate,
    HostToGateway,
    LauncherFailed,
    LauncherToGateway,
    LoadAdapter,
    Loaded,
    Prepared,
    Published,
    Ready,
    Refused,
    SamplingParams,
    Sharing,
    Shutdown,
    Started,
    TextPrompt,
    UnloadAdapter,
)
from tests.test_workers import PlayedService, PlayedWorker, until


def make_adapter(path: Path, weights: str) -> str:
    path.mkdir()
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (path / WEIGHTS).write_text(weights)
    return str(path)


def play(
    tmp_path: Path, scene: Callable[[Fleet, Any], Coroutine[Any, Any, None]], *, cold_timeout_s: float = 5.0
) -> None:
    async def run() -> None:
        config = ServerConfig(
            backbones=(BackboneConfig("base"),), state_dir=str(tmp_path / "state"), cold_timeout_s=cold_timeout_s
        )
        fleet = Fleet(config)
        service: Any = PlayedService()
        service.context_length = 100
        real, fleet._services["base"] = fleet._services["base"], service
        await fleet.control.startup()
        try:
            async with asyncio.timeout(10):
                await scene(fleet, service)
        finally:
            for worker in service.workers:
                worker.channel.close()
            fleet._services["base"] = real
            await fleet.shutdown()

    asyncio.run(run())


async def worker(service: Any, number: int) -> PlayedWorker:
    """The worker of this number, as soon as it exists and has said that it is ready."""
    await until(lambda: len(service.workers) >= number)
    played: PlayedWorker = service.workers[number - 1]
    played.says(Ready(pid=1, attach_s=0.0))
    return played


async def deploy(fleet: Fleet, service: Any, name: str, adapter: str, *, replace: bool = False, **more: Any) -> None:
    deploying = asyncio.ensure_future(fleet.deploy(FunctionConfig(name, adapter, **more), replace=replace))
    played = await worker(service, len(service.workers) + 1)
    played.says(Loaded((await played.hears(LoadAdapter)).digest, 0.1, 1))
    await deploying
    await played.hears(Shutdown)
    played.channel.close()


def ask(fleet: Fleet, model: str = "f") -> asyncio.Task[str | None]:
    """A request run to its end; the digest that answered."""

    async def run() -> str | None:
        request = GenerationRequest("http", model, TextPrompt("x"), SamplingParams())
        async with fleet.generate(request) as generation:
            await generation.started()
            async for _ in generation:
                pass
            return generation.digest

    return asyncio.ensure_future(run())


async def answer(played: PlayedWorker) -> None:
    request_id = (await played.hears(Generate)).request_id
    played.says(Started(request_id, 1), Finished(request_id, 1, 1))


def test_a_client_that_leaves_during_a_load_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        leaving, staying = ask(fleet), ask(fleet)
        played = await worker(service, 2)
        load = await played.hears(LoadAdapter)
        first = await played.hears(Generate)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        played.says(Loaded(load.digest, 0.1, 1), Started(first.request_id, 1))
        await answer(played)
        assert await staying == load.digest
        later = ask(fleet)
        await answer(played)
        assert await later == load.digest
        assert fleet.num_open == 0

    play(tmp_path, scene)


def test_a_deploy_during_a_load_leaves_the_old_request_its_old_weights(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        old = ask(fleet)
        played = await worker(service, 2)
        load = await played.hears(LoadAdapter)
        await deploy(fleet, service, "f", make_adapter(tmp_path / "b", "b"), replace=True)
        new = ask(fleet)
        new_load = await played.hears(LoadAdapter)
        assert new_load.digest != load.digest
        played.says(Loaded(load.digest, 0.1, 1), Loaded(new_load.digest, 0.1, 1))
        await answer(played)
        await answer(played)
        assert await old == load.digest
        assert await new == new_load.digest
        assert (await played.hears(UnloadAdapter)).digest == load.digest

    play(tmp_path, scene)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_request_whose_worker_dies_while_starting_gets_one_other(tmp_path: Path, deaths: int) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        asking = ask(fleet, "base")
        for number in range(1, deaths + 1):
            await until(lambda number=number: len(service.workers) == number)  # type: ignore[misc]
            service.workers[number - 1].channel.close()
        if deaths == 2:
            with pytest.raises(WorkerLost):
                await asking
        else:
            await answer(await worker(service, 2))
            await asking
        assert fleet.num_open == 0
        assert len(service.workers) == 2

    play(tmp_path, scene)


def test_the_end_of_an_echo_is_no_first_token_and_frees_its_place(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "f", "one"))
        asked = ask(fleet)
        played = await worker(service, 2)
        played.says(Loaded((await played.hears(LoadAdapter)).digest, 0.1, 1))
        request_id = (await played.hears(Generate)).request_id
        queue: Any = fleet.control.queue
        learned: list[str] = []
        queue.first_token = lambda request_id, **_: learned.append(request_id)
        played.says(Started(request_id, 1), Delta(request_id, 0, "", finish_reason="length"))
        played.says(Finished(request_id, 1, 0))
        await asked
        assert learned == []
        assert not queue._running and queue.num_waiting == 0
        again = ask(fleet)
        await answer(played)
        await again

    play(tmp_path, scene)


def test_a_retried_request_keeps_the_digest_it_was_admitted_with(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        asking = ask(fleet)
        first = await worker(service, 2)
        load = await first.hears(LoadAdapter)
        await deploy(fleet, service, "f", make_adapter(tmp_path / "b", "b"), replace=True)
        first.channel.close()
        second = await worker(service, 4)
        again = await second.hears(LoadAdapter)
        assert again == load
        assert (Path(again.path) / WEIGHTS).read_text() == "a"
        second.says(Loaded(again.digest, 0.1, 1))
        await answer(second)
        assert await asking == load.digest

    play(tmp_path, scene)


def test_a_refused_adapter_fails_the_request_and_frees_its_place(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        asking = ask(fleet)
        played = await worker(service, 2)
        played.says(Refused((await played.hears(LoadAdapter)).digest, "gone"))
        with pytest.raises(AdapterInvalid, match="gone"):
            await asking
        assert fleet.num_open == 0
        assert [link.num_open for link in fleet._workers] == [0]

    play(tmp_path, scene)


def test_an_inspection_that_never_ends_is_given_up(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        source = make_adapter(tmp_path / "a", "a")
        deploying = asyncio.ensure_future(fleet.deploy(FunctionConfig("f", source), replace=False))
        played = await worker(service, 1)
        await played.hears(LoadAdapter)
        with pytest.raises(Unavailable):
            await deploying
        await played.hears(Shutdown)
        await deploy(fleet, service, "f", source)

    play(tmp_path, scene, cold_timeout_s=0.1)


def test_functions_of_one_adapter_deployed_together_are_looked_at_once(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        source = make_adapter(tmp_path / "a", "a")
        deploying = [
            asyncio.ensure_future(fleet.deploy(FunctionConfig(f"f{i}", source), replace=False)) for i in range(5)
        ]
        played = await worker(service, 1)
        played.says(Loaded((await played.hears(LoadAdapter)).digest, 0.1, 1))
        await asyncio.gather(*deploying)
        assert len(service.workers) == 1 and fleet.registry.num_functions == 5

    play(tmp_path, scene)


def test_many_deployments_are_looked_at_few_at_a_time_and_leave_no_locks(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        count = INSPECTIONS_AT_ONCE + 2
        deploying = [
            asyncio.ensure_future(
                fleet.deploy(FunctionConfig(f"f{i}", make_adapter(tmp_path / str(i), str(i))), replace=False)
            )
            for i in range(count)
        ]
        for number in range(1, count + 1):
            played = await worker(service, number)
            load = await played.hears(LoadAdapter)
            assert len(service.workers) <= number + INSPECTIONS_AT_ONCE - 1
            if number == 1:
                # All sources have been stored by the time the places are taken.
                await until(lambda: len(list(fleet.store.directory.glob("[!.]*"))) == count)
                await until(lambda: len(service.workers) >= INSPECTIONS_AT_ONCE)
                for _ in range(10):
                    await asyncio.sleep(0)
                assert len(service.workers) == INSPECTIONS_AT_ONCE
            played.says(Loaded(load.digest, 0.1, 1))
        await asyncio.gather(*deploying)
        deploying.clear()
        gc.collect()
        assert len(fleet.deployments._by_name) == 0

    play(tmp_path, scene)


def test_a_kept_function_is_proven_again_on_other_weights_and_only_there(tmp_path: Path) -> None:
    adapters = [make_adapter(tmp_path / name, name) for name in "ab"]

    async def first(fleet: Fleet, service: Any) -> None:
        service.identity = "weights one"
        await deploy(fleet, service, "f", adapters[0])
        await deploy(fleet, service, "g", adapters[1])

    async def same(fleet: Fleet, service: Any) -> None:
        service.identity = "weights one"
        await fleet.deployments.startup()
        assert fleet.deployments._proving is not None
        await fleet.deployments._proving
        await fleet.deploy(FunctionConfig("h", adapters[0]), replace=False)  # known already
        assert not service.workers

    async def other(fleet: Fleet, service: Any) -> None:
        service.identity = "weights two"
        await fleet.deployments.startup()
        for number in (1, 2):
            played = await worker(service, number)
            load = await played.hears(LoadAdapter)
            told = Refused(load.digest, "too wide") if number == 2 else Loaded(load.digest, 0.1, 1, rank=7)
            played.says(told)
        assert fleet.deployments._proving is not None
        await fleet.deployments._proving
        with pytest.raises(AdapterInvalid, match=r"`g` v1 does not fit .*too wide"):
            await ask(fleet, "g")
        known = fleet.registry.entry("f").version(1)
        assert (known.identity, known.facts.rank) == ("weights two", 7)
        assert fleet.registry.entry("g").version(1).identity == "weights one"
        assert [f.name for f in fleet.registry.functions()] == ["f", "g", "h"]

    for scene in (first, same, other):
        play(tmp_path, scene)


def test_a_canary_and_the_rest_run_beside_each_other_in_one_worker(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"), max_concurrency=2)
        await deploy(fleet, service, "f", make_adapter(tmp_path / "b", "b"), replace=True, max_concurrency=2)
        await fleet.deployments.route("f", {1: 50}, who="test", is_canary=True)
        old, new = ask(fleet, "f@v1"), ask(fleet, "f@v2")
        played = await worker(service, 3)
        loads = [await played.hears(LoadAdapter), await played.hears(LoadAdapter)]
        with pytest.raises(RateLimited):  # the limit is the function's, by whatever name
            await ask(fleet, "f@latest")
        played.says(*(Loaded(load.digest, 0.1, 1) for load in loads))
        for _ in loads:
            await answer(played)
        assert {await old, await new} == {load.digest for load in loads}
        assert await old == fleet.registry.entry("f").version(1).digest
        shares = {facts.digest: facts.share for facts in fleet.control.controller._facts(None) if facts.name == "f"}
        assert sorted(shares.values()) == [0.5, 0.5]
        await fleet.deployments.route("f", {2: 100}, who="test")
        assert (await played.hears(UnloadAdapter)).digest == await old

    play(tmp_path, scene)


class PlayedChild:
    """Stands where `Child` would start a process; the test speaks from its other end."""

    started: ClassVar[list[PlayedChild]] = []
    refuses = 0  # how many more cannot be started

    def __init__(self, module: str, arguments: Any, receives: Any, *, max_fds: int = 0, **_: Any) -> None:
        if PlayedChild.refuses:
            PlayedChild.refuses -= 1
            raise OSError("no process is left to be had")
        ours, theirs = socket.socketpair()
        self.module = module
        self.arguments = list(arguments)
        self.pid = 1
        self.channel: AsyncChannel[HostToGateway | LauncherToGateway] = AsyncChannel(ours, receives, max_fds=max_fds)
        self.far: AsyncChannel[Any] = AsyncChannel(theirs, Any, max_fds=2)
        PlayedChild.started.append(self)

    async def stop(self) -> int:
        self.channel.close()
        self.far.close()
        return 1


def play_backbone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scene: Callable[[BackboneService, list[PlayedChild]], Coroutine[Any, Any, None]],
    device: DeviceKind = "cpu",
) -> None:
    async def run() -> None:
        config = ServerConfig(backbones=(BackboneConfig("base"),))
        service = BackboneService(
            "base",
            config.backbones[0],
            dtype="bfloat16",
            device=device,
            limits=worker_limits(config, device),
            lease_fd=-1,
            adapter_bytes=1,
            state_dir=str(tmp_path),
            warm_pool=0,
        )
        service.startup()
        try:
            async with asyncio.timeout(10):
                await scene(service, PlayedChild.started)
        finally:
            await service.shutdown()

    monkeypatch.setattr(backbone_service, "Child", PlayedChild)
    monkeypatch.setattr(PlayedChild, "started", [])
    monkeypatch.setattr(PlayedChild, "refuses", 0)
    asyncio.run(run())


def publish(host: PlayedChild, *, sharing: Sharing = "memfd", handle: bytes = b"") -> None:
    fds = [os.memfd_create(name) for name in (("manifest",) if sharing == "cuda-ipc" else ("weights", "manifest"))]
    published = Published(
        size_bytes=1, layout_digest="l", content_digest="c", seconds=0.1, sharing=sharing, handle=handle
    )
    host.far.send([published], fds)
    close_fds(fds)


async def bring_up(
    service: BackboneService, children: list[PlayedChild], *, sharing: Sharing = "memfd", handle: bytes = b""
) -> tuple[PlayedChild, PlayedChild]:
    await until(lambda: len(children) == 2)
    host, launcher = children
    publish(host, sharing=sharing, handle=handle)
    launcher.far.send([Prepared(seconds=0.1, context_length=10, vocab_size=10)])
    await service.wait_ready()
    return host, launcher


@pytest.mark.parametrize("no_process_at_first", [False, True])
def test_what_worked_once_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process_at_first: bool
) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        host, launcher = await bring_up(service, children)
        PlayedChild.refuses = int(no_process_at_first)
        launcher.far.send([LauncherFailed(reason="OSError: too many open files")])
        launcher.far.close()
        await until(lambda: len(children) == 3)
        children[2].far.send([Prepared(seconds=0.1, context_length=10, vocab_size=10)])
        await service.wait_ready()
        host.far.send([BackboneFailed(reason="the memory cannot be held")])
        host.far.close()
        await until(lambda: len(children) == 4)
        assert children[3].module == "serverlesslora.backbone.hold"
        assert service.is_ready

    play_backbone(tmp_path, monkeypatch, scene)


def test_a_first_failure_is_final_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        await until(lambda: len(children) == 2)
        publish(children[0])
        children[1].far.send([LauncherFailed(reason="no tokenizer")])
        with pytest.raises(ConfigError, match="no tokenizer"):
            await service.wait_ready()

    play_backbone(tmp_path, monkeypatch, scene)


def test_a_kv_cache_of_less_than_a_block_is_told_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        await until(lambda: len(children) == 2)
        publish(children[0])
        prepared = Prepared(seconds=0.1, context_length=10, vocab_size=10, kv_bytes_per_token=1 << 40)
        children[1].far.send([prepared])
        with pytest.raises(ConfigError, match="--kv-memory-mb"):
            await service.wait_ready()

    play_backbone(tmp_path, monkeypatch, scene)


def test_a_launcher_that_never_gets_ready_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        await until(lambda: len(children) == 2)
        publish(children[0])
        ended = 0
        while not service.is_failed:
            for child in children[1:]:
                if not child.far.closed:
                    child.far.close()
                    ended += 1
            await asyncio.sleep(0.01)
        assert ended == MAX_FAILED_STARTS
        with pytest.raises(ConfigError, match="before it was ready"):
            await service.wait_ready()

    play_backbone(tmp_path, monkeypatch, scene)


def test_a_stuck_worker_is_killed_by_the_pid_its_launcher_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        _, launcher = await bring_up(service, children)
        killed: list[int] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
        link = service.fork("d")
        launcher.far.send([Forked(worker_id=link.worker_id, pid=1234)])
        await until(lambda: bool(service.pids))
        link.kill()
        assert killed == [1234]

    play_backbone(tmp_path, monkeypatch, scene)


def test_a_launcher_that_cannot_be_asked_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        await bring_up(service, children)

        def no_descriptor(fd: int) -> int:
            raise OSError("too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", no_descriptor)
            with pytest.raises(Unavailable):
                service.fork("d")
        link = service.fork("d")
        assert link.state is WorkerState.STARTING
        link.kill()

    play_backbone(tmp_path, monkeypatch, scene)


def test_a_worker_that_cannot_read_what_it_is_told_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from serverlesslora.worker.main import Worker

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    ours, theirs = socket.socketpair()
    channel: Channel[Any] = Channel(theirs, GatewayToWorker)
    ours.sendall(b"\x01\x00\x00\x00\x00\xc1")
    with pytest.raises(Ended, match="1"):
        Worker(channel, None, None, None).read()  # type: ignore[arg-type]
    channel.close()
    ours.close()
