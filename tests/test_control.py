"""The control plane with workers played by the test: memory, accounts, keep-alive, plans."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from serverlesslora.config import BackboneConfig, FunctionConfig, ServerConfig, TenantConfig
from serverlesslora.errors import BudgetSpent, Overloaded, Unavailable, WorkerLost
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.metering.usage import RequestUsage
from serverlesslora_ipc.messages import (
    Abort,
    Aborted,
    Delta,
    Finished,
    Generate,
    LoadAdapter,
    Loaded,
    SamplingParams,
    Shutdown,
    Spent,
    Started,
    TextPrompt,
    UnloadAdapter,
)
from tests.test_fleet import deploy, make_adapter, worker
from tests.test_workers import BACKBONE_BYTES, PlayedService, PlayedWorker, until

MB = 1 << 20
ROOM = BACKBONE_BYTES // MB + 80  # for the backbone and one worker of the guessed size


async def never(on_look: Callable[[], None]) -> None:
    await asyncio.Event().wait()


def play(tmp_path: Path, scene: Callable[[Fleet, Any], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def run() -> None:
        config = ServerConfig(
            **{
                "backbones": (BackboneConfig("base"),),
                "state_dir": str(tmp_path / "state"),
                "preload": "on",
                **settings,
            }
        )
        fleet = Fleet(config)
        # What this process holds is nobody's business here.
        fleet.control.holdings.main_loop = never  # type: ignore[method-assign]
        service: Any = PlayedService()
        fleet.control.holdings.measured.backbones["base"].size_bytes = BACKBONE_BYTES
        real, fleet._services["base"] = fleet._services["base"], service
        await fleet.control.startup()
        try:
            async with asyncio.timeout(20):
                await scene(fleet, service)
        finally:
            for worker in service.workers:
                worker.channel.close()
            fleet._services["base"] = real
            await fleet.shutdown()

    asyncio.run(run())


def ask(fleet: Fleet, model: str = "base", **more: Any) -> asyncio.Task[list[Any]]:
    """The events of one request."""

    async def run() -> list[Any]:
        request = GenerationRequest("http", model, TextPrompt("x"), SamplingParams(max_tokens=3), **more)
        async with fleet.generate(request) as generation:
            return [await generation.started(), *[event async for event in generation]]

    return asyncio.ensure_future(run())


async def begin(played: PlayedWorker, *, load: bool = False) -> str:
    if load:
        played.says(Loaded((await played.hears(LoadAdapter)).digest, 0.01, 7 * MB))
    request_id: str = (await played.hears(Generate)).request_id
    played.says(Started(request_id, 5), Delta(request_id, 0, "a", (1,)))
    return request_id


def end(played: PlayedWorker, request_id: str, *, device_s: float = 0.25) -> None:
    played.says(Finished(request_id, 5, 3, device_s=device_s, queue_s=0.125))


async def rows(fleet: Fleet) -> list[RequestUsage]:
    await fleet.control.accounts.ledger.flush()
    return list((await fleet.control.accounts.ledger.requests()).requests)


def test_every_end_of_a_request_is_one_row(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        finished, aborted, lost = ask(fleet), ask(fleet), ask(fleet)
        played = await worker(service, 1)
        ids = [await begin(played) for _ in range(3)]
        end(played, ids[0])
        await finished
        aborted.cancel()
        await until(aborted.done)
        assert (await played.hears(Abort)).request_id == ids[1]
        played.says(Aborted(ids[1], Spent(5, 2, 0, 0.0, 0.5)))
        played.channel.close()
        with pytest.raises(WorkerLost):
            await lost
        found = {row.status: row for row in await rows(fleet)}
        assert sorted(found) == ["aborted", "failed", "finished"]
        assert (found["finished"].device_s, found["finished"].completion_tokens) == (0.25, 3)
        assert (found["aborted"].device_s, found["aborted"].completion_tokens) == (0.5, 2)
        assert found["finished"].rung == "worker" and found["finished"].ttft_s is not None

    play(tmp_path, scene)


def test_an_answer_is_not_complete_before_its_row_is_written(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        answering = ask(fleet)
        played = await worker(service, 1)
        written = asyncio.Event()
        record = fleet.control.accounts.ledger.record

        async def slowly(usage: RequestUsage) -> Any:
            await written.wait()
            return await record(usage)

        fleet.control.accounts.ledger.record = slowly  # type: ignore[method-assign]
        end(played, await begin(played))
        await asyncio.sleep(0.05)
        assert not answering.done()
        written.set()
        assert isinstance((await answering)[-1], Finished)

    play(tmp_path, scene)


def test_a_spent_budget_refuses_and_others_go_on(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        for name, tenant in (("poor", "acme"), ("rich", "other")):
            await deploy(fleet, service, name, make_adapter(tmp_path / name, name), tenant=tenant)
        answering = ask(fleet, "poor")
        played = await worker(service, 3)
        end(played, await begin(played, load=True), device_s=1000.0)
        await answering
        with pytest.raises(BudgetSpent, match="acme"):
            await ask(fleet, "poor")
        answering = ask(fleet, "rich")
        played = await worker(service, 4)
        end(played, await begin(played, load=True), device_s=1000.0)
        await answering

    play(tmp_path, scene, tenants=(TenantConfig("acme", 0.001),))


def test_a_full_memory_makes_room_by_moving_out_an_idle_worker(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        first = ask(fleet, "f")
        played = await worker(service, 2)
        request_id = await begin(played, load=True)
        second = ask(fleet, "base")  # there is room for one worker, and it is busy
        await asyncio.sleep(0.05)
        assert len(service.workers) == 2
        end(played, request_id)
        await first
        await played.hears(Shutdown)
        played.channel.close()
        other = await worker(service, 3)
        end(other, await begin(other))
        await second
        assert fleet.plan().last_offload is not None

    play(tmp_path, scene, memory_mb=ROOM)


def test_where_all_memory_is_busy_a_start_fails_in_time(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        first = ask(fleet, "f")
        played = await worker(service, 2)
        request_id = await begin(played, load=True)
        with pytest.raises(Unavailable):
            await ask(fleet, "base")
        end(played, request_id)
        await first
        assert sorted(row.status for row in await rows(fleet)) == ["finished", "refused"]

    play(tmp_path, scene, memory_mb=ROOM, cold_timeout_s=0.3)


def test_without_offloading_an_idle_worker_stays_in_the_way(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        first = ask(fleet, "f")
        played = await worker(service, 2)
        end(played, await begin(played, load=True))
        await first
        with pytest.raises(Unavailable):
            await ask(fleet, "base")
        assert len(service.workers) == 2

    play(tmp_path, scene, memory_mb=ROOM, cold_timeout_s=0.3, offload="off")


def test_a_pinned_function_is_loaded_before_anybody_asks(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        function = FunctionConfig("f", make_adapter(tmp_path / "a", "a"), pinned=True)
        deploying = asyncio.ensure_future(fleet.deploy(function, replace=False))
        played = await worker(service, 1)
        played.says(Loaded((await played.hears(LoadAdapter)).digest, 0.1, 1))
        await deploying
        ahead = await worker(service, 2)
        load = await ahead.hears(LoadAdapter)
        ahead.says(Loaded(load.digest, 0.1, 1))
        await until(lambda: "adapter:base/function:f:" + load.digest in fleet.control.holdings.present)
        answering = ask(fleet, "f")
        end(ahead, await begin(ahead))
        await answering
        assert next(row for row in await rows(fleet)).rung == "hot"

    play(tmp_path, scene)


def test_a_domain_that_was_let_go_is_not_started_again_at_once(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        answering = ask(fleet)
        played = await worker(service, 1)
        end(played, await begin(played))
        await answering
        await played.hears(Shutdown)
        played.channel.close()
        assert not [move for move in fleet.control.controller.plan().moves if move.action == "load"]

    play(tmp_path, scene, idle_timeout_s=0.1)


def test_a_client_that_will_not_wait_is_refused_while_the_worker_starts(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        hurried, patient = ask(fleet, slo_ttft_s=0.5), ask(fleet)
        with pytest.raises(Overloaded):
            await hurried
        played = await worker(service, 1)
        end(played, await begin(played))
        await patient

    play(tmp_path, scene, slo_ttft_s=0.1)


def test_only_what_fits_is_sent_to_a_worker(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        answering = [ask(fleet) for _ in range(5)]
        played = await worker(service, 1)
        running = [await begin(played) for _ in range(2)]
        for left in (3, 2, 1):
            assert fleet.control.queue.num_waiting == left
            end(played, running.pop(0))
            running.append(await begin(played))
        for request_id in running:
            end(played, request_id)
        await asyncio.gather(*answering)

    play(tmp_path, scene, max_running=2)


def test_arrivals_survive_a_restart(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        answering = ask(fleet)
        played = await worker(service, 1)
        end(played, await begin(played))
        await answering

    async def again(fleet: Fleet, service: Any) -> None:
        assert fleet.control.controller.policies.arrivals.last_seen("base") is not None

    play(tmp_path, scene)
    play(tmp_path, again)


def test_the_plan_can_be_shown_at_any_time(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        assert not fleet.plan().domains
        answering = ask(fleet)
        played = await worker(service, 1)
        request_id = await begin(played)
        view = fleet.plan()
        assert {v.artifact_id for v in view.verdicts if v.state == "kept"} >= {"backbone:base", "worker:base/base"}
        assert view.counted_bytes >= BACKBONE_BYTES
        end(played, request_id)
        await answering

    play(tmp_path, scene)


def test_a_request_that_waited_for_a_worker_that_died_is_sent_to_the_next(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        first, second = ask(fleet), ask(fleet)
        played = await worker(service, 1)
        await begin(played)
        await until(lambda: fleet.control.queue.num_waiting == 1)
        played.channel.close()
        with pytest.raises(WorkerLost):
            await first
        other = await worker(service, 2)
        end(other, await begin(other))
        await second

    play(tmp_path, scene, max_running=1)


def test_a_worker_that_is_ready_and_dead_at_once_does_not_keep_its_request(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        answering = ask(fleet)
        played = await worker(service, 1)
        played.channel.close()
        other = await worker(service, 2)
        end(other, await begin(other))
        await answering

    play(tmp_path, scene)


def test_a_worker_that_is_ready_after_everybody_gave_up_serves_the_next(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        service.is_ready = False
        late = ask(fleet)
        await asyncio.sleep(0.35)  # the backbone takes more than half of the time a start may take
        service.is_ready = True
        with pytest.raises(Unavailable):
            await late
        played = await worker(service, 1)
        following = ask(fleet)
        end(played, await begin(played))
        await following

    play(tmp_path, scene, cold_timeout_s=0.5)


def test_starts_at_the_same_moment_do_not_share_the_same_room(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        for name in "fg":
            await deploy(fleet, service, name, make_adapter(tmp_path / name, name))
        before = len(service.workers)
        asks = [ask(fleet, name) for name in ("f", "g", "base")]
        await until(lambda: len(service.workers) > before)
        await asyncio.sleep(0.05)
        assert len(service.workers) == before + 1
        for each in asks:
            each.cancel()
        await asyncio.gather(*asks, return_exceptions=True)

    play(tmp_path, scene, memory_mb=ROOM)


def test_a_request_that_was_queued_when_its_function_was_redeployed_gets_what_it_asked_for(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        first, second = ask(fleet, "f"), ask(fleet, "f")
        played = await worker(service, 2)
        request_id = await begin(played, load=True)
        deploying = asyncio.ensure_future(deploy(fleet, service, "f", make_adapter(tmp_path / "b", "b"), replace=True))
        await deploying
        old = (await played.hears(UnloadAdapter)).digest
        end(played, request_id)
        await first
        assert (await played.hears(LoadAdapter)).digest == old
        played.says(Loaded(old, 0.01, 7 * MB))
        end(played, await begin(played))
        await second

    play(tmp_path, scene, max_running=1)


def test_a_pinned_worker_is_not_stopped_for_idleness(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        function = FunctionConfig("f", make_adapter(tmp_path / "a", "a"), pinned=True)
        deploying = asyncio.ensure_future(fleet.deploy(function, replace=False))
        played = await worker(service, 1)
        played.says(Loaded((await played.hears(LoadAdapter)).digest, 0.1, 1))
        await deploying
        assert fleet.control.controller.idle_timeout("base/function:f") == float("inf")
        assert fleet.control.controller.idle_timeout("base/base") == 0.1

    play(tmp_path, scene, idle_timeout_s=0.1)


def test_a_tenant_that_floods_a_shared_domain_does_not_shut_the_door(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        for name, tenant in (("f", "noisy"), ("g", "quiet")):
            await deploy(fleet, service, name, make_adapter(tmp_path / name, name), tenant=tenant)
        flood = [ask(fleet, "f") for _ in range(6)]
        await asyncio.sleep(0.02)
        quiet = ask(fleet, "g")
        await asyncio.sleep(0.02)
        assert not quiet.done()
        for each in (*flood, quiet):
            each.cancel()
        await asyncio.gather(*flood, quiet, return_exceptions=True)

    play(tmp_path, scene, isolation="shared", max_queue=4, max_running=1)


def test_a_client_that_leaves_has_used_its_share(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        told = []
        ended = fleet.control.queue._dispatcher.ended
        fleet.control.queue._dispatcher.ended = (  # type: ignore[method-assign]
            lambda *a, **tokens: (told.append(tokens), ended(*a, **tokens))[1]  # type: ignore[func-returns-value]
        )
        leaving = ask(fleet)
        played = await worker(service, 1)
        request_id = await begin(played)
        played.says(Delta(request_id, 0, "bc", (2, 3)))
        await asyncio.sleep(0.02)
        leaving.cancel()
        await until(leaving.done)
        assert told == [{"prompt_tokens": 5, "output_tokens": 3}]

    play(tmp_path, scene)


def test_memory_held_until_now_is_in_the_ledger_when_it_is_asked(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        answering = ask(fleet)
        played = await worker(service, 1)
        end(played, await begin(played))
        await answering
        await asyncio.sleep(0.02)
        await fleet.control.write_down()
        held = sum(sum(row.byte_s.values()) for row in await fleet.control.accounts.ledger.usage())
        assert held >= 0.02 * BACKBONE_BYTES

    play(tmp_path, scene)


def test_what_waited_for_an_adapter_teaches_nothing_about_prefills(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        told: list[bool] = []
        first_token = fleet.control.queue._dispatcher.first_token

        def listening(request_id: str, now: float, *, is_typical: bool = True) -> None:
            told.append(is_typical)
            first_token(request_id, now, is_typical=is_typical)

        fleet.control.queue._dispatcher.first_token = listening  # type: ignore[method-assign]
        await deploy(fleet, service, "f", make_adapter(tmp_path / "a", "a"))
        cold = ask(fleet, "f")
        played = await worker(service, 2)
        end(played, await begin(played, load=True))
        await cold
        hot = ask(fleet, "f")
        end(played, await begin(played))
        await hot
        assert told == [False, True]

    play(tmp_path, scene)


def test_the_time_outside_of_the_worker_is_measured_where_nobody_waited(tmp_path: Path) -> None:
    async def scene(fleet: Fleet, service: Any) -> None:
        samples = fleet.control.holdings.measured.gateway_s
        cold = ask(fleet)
        played = await worker(service, 1)
        played.says(Finished(await begin(played), 5, 3, first_token_s=1e-9))
        await cold
        assert len(samples) == 0
        assert len(fleet.control.holdings.measured.first_step_s) == 1
        hot = ask(fleet)
        played.says(Finished(await begin(played), 5, 3, first_token_s=1e-9))
        await hot
        assert len(samples) == 1 and 0 < samples.value < 1

    play(tmp_path, scene)
