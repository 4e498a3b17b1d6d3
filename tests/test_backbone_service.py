"""A backbone's processes on a device, played by the test: what they are told, and what follows when memory is lost."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from serverlesslora.config import BackboneConfig, ServerConfig
from serverlesslora.devices import FALLBACKS, SENTENCES
from serverlesslora.errors import Unavailable
from serverlesslora.gateway.backbone_service import INSPECTION_KV_BYTES, BackboneService
from serverlesslora.gateway.commands import host_command, launcher_command, num_cores
from serverlesslora.gateway.fleet import Fleet, worker_limits
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.messages import Prepared, Ready, Sharing, Verified
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
    launcher = launcher_command("cpu", threads=num_cores(), lease_fd=7, state_dir="/s")
    assert (launcher.arguments, launcher.pass_fds, launcher.env["OMP_PROC_BIND"]) == (["--lease-fd", "7"], [7], "true")
    launcher = launcher_command("cuda", threads=1, lease_fd=7, state_dir="/s")
    assert (launcher.arguments, launcher.pass_fds) == (["--device", "cuda"], ())
    assert launcher.env["TRITON_CACHE_DIR"] == "/s/triton"
    assert "OMP_PROC_BIND" not in launcher.env


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
        service._hear_verified(Verified(content_digest="x", intact=False))
        assert not fleet.health().alive
        assert not fleet.health().ready
        await fleet.shutdown()

    asyncio.run(run())
