"""A backbone's processes on a device, played by the test: what they are told, and what follows when memory is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import pytest

from serverlesslora.config import BackboneConfig, ServerConfig
from serverlesslora.devices import FALLBACKS, SENTENCES
from serverlesslora.errors import Unavailable, WorkerLost
from serverlesslora.gateway import backbone_service
from serverlesslora.gateway.backbone_service import INSPECTION_KV_BYTES, BackboneService
from serverlesslora.gateway.child import Child
from serverlesslora.gateway.commands import (
    Command,
    WorkerSetting,
    host_command,
    launcher_command,
    num_cores,
    worker_command,
)
from serverlesslora.gateway.fleet import Fleet, worker_limits
from serverlesslora.scheduler.settings import Switch
from serverlesslora_ipc.channel import AsyncChannel
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import (
    BackboneFailed,
    HostToGateway,
    LauncherFailed,
    Prepared,
    Ready,
    Sharing,
    Verified,
)
from tests.test_fleet import PlayedChild, bring_up, play_backbone, publish
from tests.test_workers import until

PREPARED = Prepared(seconds=0.1, context_length=10, vocab_size=10, kv_bytes_per_token=1)


async def told(child: PlayedChild) -> tuple[dict[str, Any], int]:
    """The next message, and how many descriptors came with it."""
    frame = await anext(child.far)
    close_fds(frame.fds)
    (message,) = frame.messages
    return message, len(frame.fds)


def test_each_device_has_its_processes() -> None:
    backbone = BackboneConfig("/m", allow_pickle=True)
    cpu = host_command(backbone, "bfloat16", "cpu", adopts=False, state_dir="/s")
    assert (cpu.module, cpu.arguments) == (
        "serverlesslora.backbone.host",
        ["--model", "/m", "--dtype", "bfloat16", "--allow-pickle"],
    )
    gpu = host_command(backbone, "bfloat16", "cuda", adopts=False, state_dir="/s")
    assert (gpu.module, gpu.arguments) == (
        "serverlesslora.backbone.device_host",
        [*cpu.arguments, "--device", "cuda"],
    )
    launcher = launcher_command("cpu", WorkerSetting(num_cores(), 7, "/s"))
    assert (told_of(launcher), launcher.pass_fds, launcher.env["OMP_PROC_BIND"]) == (["--lease-fd", "7"], [7], "true")
    launcher = launcher_command("cpu", WorkerSetting(num_cores(), 7, "/s", sharing="off"))
    assert told_of(launcher) == ["--lease-fd", "7", "--private"]
    launcher = launcher_command("cuda", WorkerSetting(1, 7, "/s"))
    assert (told_of(launcher), launcher.pass_fds) == (["--device", "cuda"], ())
    assert launcher.env["TRITON_CACHE_DIR"] == "/s/triton"
    assert "OMP_PROC_BIND" not in launcher.env
    worker = worker_command(backbone, "bfloat16", WorkerSetting(num_cores(), 7, "/s"))
    assert (told_of(worker), worker.pass_fds, worker.env["OMP_PROC_BIND"]) == (["--lease-fd", "7"], [7], "true")
    worker = worker_command(backbone, "bfloat16", WorkerSetting(1, 7, "/s", sharing="off"))
    assert told_of(worker) == ["--lease-fd", "7", *cpu.arguments]


def told_of(command: Command) -> list[str]:
    """Without the moment it was made."""
    *arguments, name, moment = command.arguments
    assert name == "--spawned-at"
    assert 0 <= time.monotonic() - float(moment) < 60
    return arguments


def test_kv_is_sized_from_what_is_free_on_a_device_only() -> None:
    config = ServerConfig()
    assert (worker_limits(config, "cpu").kv_bytes, worker_limits(config, "cuda").kv_bytes) == (1 << 30, 0)
    assert (worker_limits(config, "cpu").threads, worker_limits(config, "cuda").threads) == (num_cores(), 1)
    assert (worker_limits(config, "cpu").max_step_tokens, worker_limits(config, "cuda").max_step_tokens) == (256, 2048)
    asked = ServerConfig(kv_memory_mb=5, threads=3)
    assert {worker_limits(asked, kind).kv_bytes for kind in ("cpu", "cuda")} == {5 << 20}
    assert {worker_limits(asked, kind).threads for kind in ("cpu", "cuda")} == {3}


@pytest.mark.parametrize("sharing", ["vmm", "vmm-writable", "cuda-ipc"])
def test_how_it_is_shared_reaches_the_launcher_the_log_and_health(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sharing: Sharing
) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        assert service.status().sharing == "not loaded yet"
        _, launcher = await bring_up(service, children, sharing=sharing, handle=b"h")
        message, num_fds = await told(launcher)
        assert (message["sharing"], bytes(message["handle"])) == (sharing, b"h")
        assert num_fds == (1 if sharing == "cuda-ipc" else 2)
        assert service.status().sharing == SENTENCES[sharing]
        link = service.fork("d")
        link.ready.set_result(Ready(pid=1, attach_s=0.1, device="cuda (a GPU)", graphs="off: a reason"))
        await until(lambda: service.status().graphs == "off: a reason")
        assert service.status().device == "cuda (a GPU)"
        link.kill()

    with caplog.at_level(logging.WARNING):
        play_backbone(tmp_path, monkeypatch, scene, "cuda")
    said = [record.message for record in caplog.records if "shared by a fallback" in record.message]
    assert len(said) == (sharing in FALLBACKS)


def test_who_only_looks_at_an_adapter_takes_no_kv_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        _, launcher = await bring_up(service, children, sharing="vmm")
        await told(launcher)
        for may_be_spare in (True, False):
            link = service.fork("d", may_be_spare=may_be_spare)
            fork, _ = await told(launcher)
            assert fork["limits"]["kv_bytes"] == (0 if may_be_spare else INSPECTION_KV_BYTES)
            link.kill()

    play_backbone(tmp_path, monkeypatch, scene, "cuda")


def test_a_dead_host_of_device_memory_is_replaced_by_one_that_adopts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        host, _ = await bring_up(service, children, sharing="vmm")
        host.far.close()
        await until(lambda: len(children) == 3)
        assert "--model" not in children[2].arguments
        message, num_fds = await told(children[2])
        assert (message["type"], num_fds) == ("Adopt", 2)
        assert service.is_ready

    play_backbone(tmp_path, monkeypatch, scene, "cuda")


def test_memory_shared_by_handle_dies_with_its_host_and_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        host, launcher = await bring_up(service, children, sharing="cuda-ipc", handle=b"1")
        await told(launcher)
        link = service.fork("d")
        frame = await anext(launcher.far)
        pump = asyncio.create_task(link.main_loop(lambda gone: None))
        host.far.close()
        await pump  # its channel is closed: the process follows
        close_fds(frame.fds)
        await until(lambda: len(children) == 4)
        again = {child.module: child for child in children[2:]}
        new_host, new_launcher = again["serverlesslora.backbone.device_host"], again["serverlesslora.launcher.zygote"]
        assert "--model" in new_host.arguments
        assert not service.is_ready
        waiting = asyncio.create_task(service.wait_ready())
        publish(new_host, sharing="cuda-ipc", handle=b"2")
        message, _ = await told(new_launcher)
        assert bytes(message["handle"]) == b"2"
        new_launcher.far.send([PREPARED])
        await waiting
        service.fork("d").kill()

    with caplog.at_level(logging.ERROR):
        play_backbone(tmp_path, monkeypatch, scene, "cuda")
    assert "gone with its host: its workers are ended and it is loaded again" in caplog.text


def test_a_reload_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        host, _ = await bring_up(service, children, sharing="cuda-ipc", handle=b"1")
        host.far.close()
        hosts = "serverlesslora.backbone.device_host"
        await until(lambda: [child.module for child in children].count(hosts) == 2)
        next(child for child in children[2:] if child.module == hosts).far.close()
        await until(lambda: [child.module for child in children].count(hosts) == 3)
        assert not service.is_failed

    play_backbone(tmp_path, monkeypatch, scene, "cuda")


@pytest.mark.parametrize("asked", [False, True])
def test_an_altered_backbone_is_not_served_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    async def scene(service: BackboneService, children: list[PlayedChild]) -> None:
        host, launcher = await bring_up(service, children, sharing="vmm-writable")
        link = service.fork("d")
        pump = asyncio.create_task(link.main_loop(lambda gone: None))
        altered = Verified(content_digest="x", intact=False)
        if asked:
            answer = asyncio.create_task(service.verify())
            await told(host)
        host.far.send([altered])
        await pump
        if asked:
            assert await answer == altered
        assert service.status().state == "altered"
        for _ in range(2):
            with pytest.raises(Unavailable, match="altered in memory"):
                service.fork("d")
            with pytest.raises(Unavailable, match="altered in memory"):
                await service.wait_ready()
            launcher.far.close()  # nor does a new launcher change that

    with caplog.at_level(logging.ERROR):
        play_backbone(tmp_path, monkeypatch, scene, "cuda")
    assert "was ALTERED in memory" in caplog.text


def test_health_says_what_is_served_and_how(tmp_path: Path) -> None:
    async def run() -> None:
        config = ServerConfig(backbones=(BackboneConfig("base"),), state_dir=str(tmp_path), device="emulated")
        fleet = Fleet(config)
        fleet._is_started = True
        service = fleet._services["base"]
        assert fleet.health().detail["backbones"]["base"] == {
            "state": "loading",
            "device": "emulated",
            "sharing": "not loaded yet",
            "graphs": "not known before the first worker",
        }
        assert fleet.health().alive
        service.memory_altered("x")
        assert not fleet.health().alive
        assert not fleet.health().ready
        await fleet.shutdown()

    asyncio.run(run())


# --- with preload=off, on the CPU


class PlayedProcess:
    """Stands where `Child` would start a process; the test speaks from its other end."""

    started: ClassVar[list[PlayedProcess]] = []

    def __init__(self, module: str, arguments: Any, receives: Any, *, max_fds: int = 0, **_: Any) -> None:
        ours, theirs = socket.socketpair()
        self.role = module.rpartition(".")[2]
        self.pid = 1000 + len(PlayedProcess.started)
        self.channel: AsyncChannel[Any] = AsyncChannel(ours, receives, max_fds=max_fds)
        self.far: AsyncChannel[Any] = AsyncChannel(theirs, Any, max_fds=3)
        self.may_end = asyncio.Event()
        self.may_end.set()
        PlayedProcess.started.append(self)

    def kill(self) -> None:
        self.far.close()

    async def stop(self) -> int:
        self.channel.close()
        await self.may_end.wait()
        self.far.close()
        return 0


def play_on_demand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scene: Callable[[BackboneService, list[PlayedProcess]], Coroutine[Any, Any, None]],
    sharing: Switch = "on",
) -> None:
    async def run() -> None:
        service = BackboneService(
            "base",
            BackboneConfig("base"),
            dtype="bfloat16",
            device="cpu",
            limits=worker_limits(ServerConfig(kv_memory_mb=1), "cpu"),
            lease_fd=-1,
            adapter_bytes=1,
            state_dir=str(tmp_path),
            warm_pool=1,
            sharing=sharing,
            preload="off",
        )
        service.startup()
        try:
            async with asyncio.timeout(10):
                await scene(service, PlayedProcess.started)
        finally:
            await service.shutdown()

    monkeypatch.setattr(backbone_service, "Child", PlayedProcess)
    monkeypatch.setattr(PlayedProcess, "started", [])
    asyncio.run(run())


async def turns() -> None:
    """Whatever was going to happen by now has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_worker_wanted_while_the_host_leaves_gets_the_next_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(service: BackboneService, children: list[PlayedProcess]) -> None:
        await turns()
        assert children == []
        waiting = asyncio.create_task(service.wait_ready())
        await until(lambda: len(children) == 1)
        assert not service.rest(), "somebody waits"
        publish(children[0])  # type: ignore[arg-type]
        await waiting
        assert service.is_ready
        children[0].may_end.clear()
        assert service.rest()
        assert service.status().state == "resting"
        assert service.takes_requests
        link = service.fork("d")  # in the moment in which the old host is still ending
        await turns()
        assert [child.role for child in children] == ["host", "alone"], "never two hosts at once"
        assert service.role_pids() == {"host": 1000, link.worker_id: 1001}
        children[0].may_end.set()
        await until(lambda: len(children) == 3)
        assert children[2].role == "host"
        publish(children[2])  # type: ignore[arg-type]
        frame = await anext(children[1].far)
        assert [message["type"] for message in frame.messages] == ["Prepare", "Fork"]
        assert len(frame.fds) == 3, "weights, manifest, and the worker's channel"
        close_fds(frame.fds)
        assert not service.rest(), "it starts"
        link.kill()
        await until(lambda: not service.pids)
        assert not service.rest(unused_for_s=60), "it was used just now"
        assert service.rest()

    play_on_demand(tmp_path, monkeypatch, scene)


def test_what_cannot_be_loaded_now_is_tried_again_on_the_next_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(service: BackboneService, children: list[PlayedProcess]) -> None:
        for number in range(4):  # more often than a server would try that cannot start at all
            link = service.fork("d")
            waiting = asyncio.create_task(service.wait_ready())
            await until(lambda: len(children) == 2 * number + 2)  # noqa: B023
            host = next(child for child in children[2 * number :] if child.role == "host")
            if number % 2:
                host.far.send([BackboneFailed(reason="needs 7 MiB of memory")])
            else:
                host.far.close()  # it was killed
            with pytest.raises(Unavailable, match="needs 7 MiB" if number % 2 else "ended with status 0"):
                await waiting
            with pytest.raises(Unavailable, match="base"):
                await link.ready
            link.kill()
            assert service.takes_requests
            assert not service.is_ready
            await until(lambda: not service.role_pids())
            assert len(children) == 2 * number + 2, "nobody asked for another"
        waiting = asyncio.create_task(service.wait_ready())
        await until(lambda: len(children) == 9)
        publish(children[8])  # type: ignore[arg-type]
        await waiting

    play_on_demand(tmp_path, monkeypatch, scene)


def test_a_host_that_dies_while_it_is_used_is_replaced_and_rests_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(service: BackboneService, children: list[PlayedProcess]) -> None:
        waiting = asyncio.create_task(service.wait_ready())
        await until(lambda: len(children) == 1)
        publish(children[0])  # type: ignore[arg-type]
        await waiting
        children[0].far.close()
        await until(lambda: len(children) == 2)
        assert children[1].role == "hold", "it adopts what the gateway holds"
        assert service.is_ready
        assert service.rest()
        await until(lambda: not service.role_pids())
        assert service.size_bytes == 0

    play_on_demand(tmp_path, monkeypatch, scene)


def test_why_a_process_failed_is_heard_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedProcess]) -> None:
        for messages, reason in (
            ([LauncherFailed(reason="no tokenizer")], "no tokenizer"),
            ([Prepared(0.1, 10, 10, kv_bytes_per_token=1 << 40)], "--kv-memory-mb"),
        ):
            link = service.fork("d")
            pump = asyncio.create_task(link.main_loop(lambda gone: None))
            child = children[-1]
            close_fds((await anext(child.far)).fds)  # the worker's own end of its channel is gone
            await turns()
            assert not link.ready.done()
            child.far.send(messages)
            with pytest.raises(Unavailable, match=reason):
                await asyncio.shield(link.ready)
            child.far.close()
            await pump
            assert service.pids == {}

    play_on_demand(tmp_path, monkeypatch, scene, sharing="off")


def test_a_process_that_says_nothing_is_a_lost_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedProcess]) -> None:
        link = service.fork("d")
        pump = asyncio.create_task(link.main_loop(lambda gone: None))
        children[0].far.close()
        await pump
        with pytest.raises(WorkerLost):
            await link.ready

    play_on_demand(tmp_path, monkeypatch, scene, sharing="off")


def test_a_child_is_reaped_also_by_who_is_cancelled() -> None:
    async def scene() -> None:
        child: Child[Any] = Child("timeit", ["import signal; signal.pause()"], HostToGateway)
        child.kill()
        stopping = asyncio.create_task(child.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert is_reaped(child.pid)

    asyncio.run(scene())


def is_reaped(pid: int) -> bool:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return True
    return False


def test_a_start_that_is_ended_before_it_began_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(service: BackboneService, children: list[PlayedProcess]) -> None:
        link = service.fork("d")
        await service.shutdown()
        assert service.pids == {}
        assert children[0].far.closed
        await link.main_loop(lambda gone: None)  # its channel has ended

    play_on_demand(tmp_path, monkeypatch, scene, sharing="off")
