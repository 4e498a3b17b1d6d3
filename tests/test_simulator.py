"""The simulator: closed forms on one device, conservation under every system, and which way the switches push."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.errors import ConfigError
from serverlesslora.scheduler.profile import BackboneProfile, Profile, StepProfile, write_profile
from serverlesslora.scheduler.settings import PolicySettings
from serverlesslora.simulator.cluster import (
    SHIPPED,
    Cluster,
    ClusterConfig,
    DeviceConfig,
    FunctionsConfig,
    HostConfig,
    PolicyNumbers,
    make_cluster,
    read_cluster,
)
from serverlesslora.simulator.device import PREFILL, Device, Host, Worker
from serverlesslora.simulator.fleet import Fleet
from serverlesslora.simulator.live import Server, simulate_server
from serverlesslora.simulator.report import Report, make_report
from serverlesslora.simulator.simulation import FINISHED, REFUSED, Outcome, Simulation
from serverlesslora.simulator.systems import SYSTEMS, System, choose_systems
from serverlesslora.simulator.trace import Trace

STEPS = StepProfile(prefill_s=0.02, prefill_token_s=0.0002, decode_s=0.02, decode_row_s=0.001, chunk_tokens=1000)
PROFILE = Profile(
    measured_on="made up",
    backbones={"b": BackboneProfile(10_000_000_000, load_s=4.0, copy_s=1.0, kv_bytes_per_token=100_000, steps=STEPS)},
    libraries_s=6.0,
    worker_s=2.0,
    spare_s=0.25,
    worker_bytes=1_000_000_000,
    process_bytes=1_500_000_000,
    adapter_s=0.05,
    adapter_byte_s=1e-9,
    adapter_ram_s=0.01,
    adapter_ram_byte_s=0.0,
    gateway_s=0.003,
)
NOT_SHARED = PolicySettings(sharing="off", preload="lru")
ADAPTER_S, ADAPTER_BYTES = 0.15, 100_000_000


def make_trace(rows: list[tuple[float, int, int, int]], *, duration_s: float | None = None) -> Trace:
    """Rows of (second, function, prompt tokens, output tokens)."""
    rows = sorted(rows, key=lambda row: row[0])
    count = 1 + max(row[1] for row in rows)
    functions, prompts, outputs = (np.array([row[k] for row in rows], dtype=np.int64) for k in (1, 2, 3))
    times = np.array([row[0] for row in rows], dtype=np.float64)
    end = duration_s if duration_s is not None else rows[-1][0]
    return Trace(times, functions, prompts, outputs, tuple(f"f{i}" for i in range(count)), end)


def cluster_of(
    devices: int = 1,
    *,
    memory_gb: float = 40.0,
    tenants: int = 0,
    slo_s: float = 3.0,
    started: bool = True,
    slots: int = 64,
    warm_pool: int = 1,
) -> Cluster:
    config = ClusterConfig(
        profile="",
        devices=DeviceConfig(count=devices, memory_gb=memory_gb, price_per_hour=1.0),
        hosts=HostConfig(devices_each=2, memory_gb=200.0, price_per_gb_hour=0.01),
        functions=FunctionsConfig(tenants=tenants, adapter_bytes=ADAPTER_BYTES, slo_ttft_s=slo_s),
        started=started,
        slots=slots,
        warm_pool=warm_pool,
    )
    return make_cluster(config, PROFILE)


def play(trace: Trace, cluster: Cluster, system: System = SYSTEMS[0], *, check: bool = True) -> tuple[Outcome, Report]:
    outcome = Simulation(trace, cluster, system, check=check).run()
    return outcome, make_report(trace, cluster, system, outcome)


def prefill_s(tokens: int) -> float:
    return STEPS.prefill_s + tokens * STEPS.prefill_token_s


# --- closed forms


def test_one_request_on_an_idle_device() -> None:
    outcome, report = play(make_trace([(5.0, 0, 500, 11)]), cluster_of())
    ttft = PROFILE.gateway_s + PROFILE.spare_s + ADAPTER_S + prefill_s(500)
    assert outcome.ttft == pytest.approx([ttft])
    assert outcome.e2e == pytest.approx([ttft + 10 * (STEPS.decode_s + STEPS.decode_row_s)])
    assert report.rungs == {"hot": 0, "adapter-ram": 0, "adapter-disk": 0, "worker": 1, "backbone": 0}
    assert report.tpot_mean_s == pytest.approx(STEPS.decode_s + STEPS.decode_row_s)
    busy = prefill_s(500) + 10 * (STEPS.decode_s + STEPS.decode_row_s)
    assert report.device_busy_hours * 3600 == pytest.approx(busy, rel=1e-4)


def test_the_ladder_of_cold_starts() -> None:
    """From nothing, while the same worker is there, another adapter of its tenant, and without a spare."""
    cluster = cluster_of(tenants=1, started=False)
    outcome, report = play(make_trace([(0.0, 0, 100, 1), (20.0, 0, 100, 1), (40.0, 1, 100, 1)]), cluster)
    base = PROFILE.gateway_s + prefill_s(100)
    # Its launcher begins with the backbone, imports its libraries and forks: that takes longer than loading.
    opening = max(PROFILE.backbones["b"].load_s, PROFILE.libraries_s + PROFILE.worker_s)
    assert outcome.ttft == pytest.approx([base + opening + ADAPTER_S, base, base + ADAPTER_S])
    assert report.rungs["backbone"] == report.rungs["hot"] == report.rungs["adapter-disk"] == 1


def test_a_spare_is_there_once_and_again_after_its_refill() -> None:
    rows = [(0.0, 0, 100, 1), (0.1, 1, 100, 1), (3.1, 2, 100, 1)]
    outcome, _ = play(make_trace(rows), cluster_of())
    base = PROFILE.gateway_s + prefill_s(100) + ADAPTER_S
    assert outcome.ttft == pytest.approx([base + PROFILE.spare_s, base + PROFILE.worker_s, base + PROFILE.spare_s])


def test_a_long_prompt_is_computed_in_turns_that_others_decode_between() -> None:
    # Function 0 decodes for long; the prompt of function 1 takes three chunks, so three rounds of both.
    warm = [(0.0, 0, 100, 1), (10.0, 1, 100, 1)]
    outcome, _ = play(make_trace([*warm, (20.0, 0, 100, 1000), (30.0, 1, 3000, 1)]), cluster_of())
    turn = STEPS.decode_s + STEPS.decode_row_s
    assert outcome.ttft[3] == pytest.approx(PROFILE.gateway_s + prefill_s(3000) + 3 * turn, rel=1e-6)
    # Each of its own tokens meanwhile took as long as a third of the prompt more.
    alone = 999 * turn + prefill_s(100) + PROFILE.gateway_s
    assert outcome.e2e[2] == pytest.approx(alone + prefill_s(3000), rel=1e-6)


def test_prompts_that_wait_together_share_a_step() -> None:
    rows = [(0.0, 0, 100, 1), (10.0, 0, 900, 1), (10.05, 0, 300, 1), (10.06, 0, 400, 1), (10.07, 0, 900, 1)]
    outcome, _ = play(make_trace(rows), cluster_of())
    first = 10.0 + prefill_s(900)
    both = first + prefill_s(700)
    ends = [outcome.ttft[i] + rows[i][0] - PROFILE.gateway_s for i in range(1, 5)]
    assert ends == pytest.approx([first, both, both, both + prefill_s(900)])


def test_isolated_workers_take_turns_and_a_shared_domain_does_not() -> None:
    k, tokens = 4, 2001
    warm = [(10.0 * f, f, 100, 1) for f in range(k)]
    trace = make_trace([*warm, *((100.0, f, 1, tokens) for f in range(k))])
    (apart, _), (together, _) = (play(trace, cluster_of(tenants=tenants)) for tenants in (0, 1))
    rows = k * STEPS.decode_row_s
    assert apart.e2e[-1] == pytest.approx(tokens * (k * STEPS.decode_s + rows), rel=0.01)
    assert together.e2e[-1] == pytest.approx(tokens * (STEPS.decode_s + rows), rel=0.01)


def test_a_saturated_queue_waits_as_theory_says() -> None:
    """M/D/1: one slot, answers of one token, so that the device is a server of constant time (Pollaczek-Khinchine)."""
    service, load, dice = prefill_s(900), 0.7, random.Random(5)
    at, rows = 0.0, [(0.0, 0, 900, 1)]
    at = 30.0
    for _ in range(3000):
        at += dice.expovariate(load / service)
        rows.append((at, 0, 900, 1))
    system = System("fifo", "", PolicySettings(batching="off"))
    outcome, _ = play(make_trace(rows), cluster_of(slo_s=1000.0), system, check=False)
    waits = np.array(outcome.ttft[1:]) - PROFILE.gateway_s - service
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.15)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_token_clock_agrees_with_counting_rounds(data: st.DataObject) -> None:
    """Against a slow simulation that steps round by round; everything joins at time zero."""
    lengths = data.draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=5))
    device = Device(0, 1 << 40, Host(0, 1 << 40), STEPS)
    workers = [Worker(i, device, 0, 0.0, 0.0) for i in range(len(lengths))]
    order = 0
    for worker, counts in zip(workers, lengths, strict=True):
        for n in counts:
            device.begin_decoding(worker, order, n, order)
            order += 1
    ends: dict[int, float] = {}
    while (at := device.next_at()) is not None:
        worker, request = device.pop(at)
        assert request != PREFILL
        device.end_decoding(worker)
        ends[request] = at
    left = [list(counts) for counts in lengths]
    now, slow = 0.0, {}
    while any(n > 0 for counts in left for n in counts):
        busy = [sum(n > 0 for n in counts) for counts in left]
        now += sum(STEPS.decode_s + STEPS.decode_row_s * b for b in busy if b)
        number = 0
        for counts in left:
            for i, n in enumerate(counts):
                counts[i] = n - 1
                if n == 1:
                    slow[number] = now
                number += 1
    assert ends == pytest.approx(slow)
    assert device.busy_s == pytest.approx(max(slow.values())) and device.num_active == 0 and device.base_s == 0.0


# --- conservation


def random_rows(seed: int, *, count: int, functions: int, seconds: float) -> list[tuple[float, int, int, int]]:
    dice = random.Random(seed)
    rows: list[tuple[float, int, int, int]] = []
    while len(rows) < count:
        at, function = dice.uniform(0, seconds), dice.randrange(functions)
        burst = range(dice.choice([1, 1, 2, 12]))
        rows += [(at + dice.random(), function, dice.randint(1, 3000), dice.randint(1, 300)) for _ in burst]
    return rows[:count]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_request_ends_once_and_no_device_overflows(system: System) -> None:
    trace = make_trace(random_rows(1, count=220, functions=14, seconds=500.0))
    # Little memory, so that room must be made, waited for and refused. `check` runs after every event.
    outcome, report = play(trace, cluster_of(2, memory_gb=26.0, tenants=5, slots=8, started=False), system)
    assert set(outcome.status) <= {FINISHED, REFUSED}
    assert report.finished + report.refused == report.requests == 220
    assert report.refused == sum(report.refusals.values()) and report.finished == sum(report.rungs.values())
    for one, ttft in enumerate(outcome.ttft):
        if outcome.status[one] == FINISHED:
            assert PROFILE.gateway_s + prefill_s(1) <= ttft <= outcome.e2e[one] + 1e-9
        else:
            assert math.isnan(outcome.e2e[one])
    for device in outcome.fleet.devices:
        assert device.peak <= device.capacity
        assert device.num_active == device.num_rows == 0 and not device.events and not device.blocked
        assert device.busy_s <= outcome.end_s
        assert all(not worker.open and not worker.users for worker in device.workers.values())
        left = sum(worker.inner for worker in device.workers.values())
        assert left == sum(len(worker.adapters) for worker in device.workers.values()) * ADAPTER_BYTES
    # What was computed is what was asked for: every prompt's tokens, and every row of every answer.
    done = [i for i, status in enumerate(outcome.status) if status == FINISHED]
    at_least = sum(
        float(trace.prompt_tokens[i]) * STEPS.prefill_token_s + float(trace.output_tokens[i] - 1) * STEPS.decode_row_s
        for i in done
    )
    at_most = sum(
        prefill_s(int(trace.prompt_tokens[i]))
        + float(trace.output_tokens[i] - 1) * (STEPS.decode_row_s + STEPS.decode_s)
        for i in done
    )
    assert at_least <= report.device_busy_hours * 3600 * (1 + 1e-5) and report.device_busy_hours * 3600 <= at_most * (
        1 + 1e-5
    )


def test_money_is_memory_times_price_times_time() -> None:
    # An always-on process that holds half of its device for an hour, and nothing else.
    system = System("half", "", NOT_SHARED, life="always", start="process", share_of_device=0.5)
    trace = make_trace([(0.0, 0, 10, 1)], duration_s=3600.0)
    _, report = play(trace, cluster_of(), system)
    assert report.cost == pytest.approx(0.5) and report.device_gb_hours == pytest.approx(20.0)
    assert report.cost_effectiveness == pytest.approx(1 / (report.e2e.mean * report.cost), rel=1e-4)
    assert report.device_open_hours == pytest.approx(1.0)
    # Whoever cannot rent out the other half pays for it too.
    assert report.cost_whole == pytest.approx(1.0)
    assert report.cost_effectiveness_whole == pytest.approx(report.cost_effectiveness / 2, rel=1e-4)
    assert report.cost_whole_per_1000_in_slo == pytest.approx(1000.0)


# --- what a start takes, under every system alike


def elastic_fleet(system: System, *, devices: int = 4) -> Fleet:
    trace = make_trace([(float(f), f, 10, 2) for f in range(6)])
    return Simulation(trace, cluster_of(devices, started=False), system).fleet


@pytest.mark.parametrize("name", ["ours", "sharing=off", "preload=off", "serverlessllm-like", "instainfer-like"])
def test_an_estimate_is_what_the_start_then_takes(name: str) -> None:
    fleet = elastic_fleet(choose_systems(name)[0])
    fleet.hosts[0].containers.add(1)
    now = 0.0
    for domain, index in [(0, 0), (1, 0), (2, 1), (1, 2), (3, 2)]:
        for at in (now, now + 0.5, now + 100.0):  # while the device is opened, while its spare is not there, and later
            before = fleet.starts.ready_at(domain, fleet.devices[index], at)
            assert before == fleet.starts.ready_at(domain, fleet.devices[index], at) > at
        worker = fleet.start(domain, fleet.devices[index], now)
        assert worker is not None
        now += 0.5
    expected = fleet.starts.ready_at(4, fleet.devices[3], now)
    worker = fleet.start(4, fleet.devices[3], now)
    assert worker is not None and worker.ready_at == expected


def test_opening_a_device_pays_for_its_launcher_and_closing_it_keeps_none() -> None:
    fleet = elastic_fleet(choose_systems("ours")[0])
    device = fleet.devices[0]
    opening = max(PROFILE.backbones["b"].load_s, PROFILE.libraries_s + PROFILE.worker_s)
    for now in (0.0, 1000.0):
        worker = fleet.start(0, device, now)
        assert worker is not None
        # The second time the checkpoint is in the host's memory; the launcher is not.
        assert worker.ready_at - now == pytest.approx(opening)
        # Its spare is made when both are there.
        spare_at = max(device.backbone_at, device.launcher_at) + PROFILE.worker_s
        assert device.spares == [pytest.approx(spare_at)] and device.launcher_at == now + PROFILE.libraries_s
        device.closing = True
        fleet.retire(worker, now + 500.0)
        assert not device.is_open and not device.spares and device.used == 0


def test_without_preloading_every_worker_is_a_fresh_process() -> None:
    rows = [(0.0, 0, 100, 1), (0.0, 1, 100, 1), (50.0, 2, 100, 1)]
    (system,) = choose_systems("preload=off")
    outcome, _ = play(make_trace(rows), cluster_of(started=False, warm_pool=3, slo_s=100.0), system)
    device = outcome.fleet.devices[0]
    assert not device.spares and outcome.fleet.open_bytes == PROFILE.backbones["b"].size_bytes
    start = PROFILE.libraries_s + PROFILE.worker_s  # it imports what a fork has, then does what a fork does
    alone = PROFILE.gateway_s + start + ADAPTER_S + prefill_s(100)
    assert outcome.ttft[2] == pytest.approx(alone) and min(outcome.ttft) == pytest.approx(alone, rel=0.01)


def test_private_workers_have_spares_on_open_devices_only() -> None:
    fleet = elastic_fleet(choose_systems("sharing=off")[0])
    first, other = fleet.devices[:2]
    backbone = PROFILE.backbones["b"]
    assert all(device.used == 0 and not device.spares for device in fleet.devices)
    one = fleet.start(0, first, 0.0)
    assert one is not None and one.waits == "backbone"
    assert one.ready_at == pytest.approx(PROFILE.libraries_s + PROFILE.worker_s + backbone.copy_s)
    assert first.used == fleet.process_bytes + backbone.size_bytes + PROFILE.worker_bytes
    two = fleet.start(1, first, 100.0)  # from a spare, that has its copy
    assert two is not None and two.ready_at == pytest.approx(100.0 + PROFILE.spare_s) and two.waits == "worker"
    assert first.spares == [pytest.approx(100.0 + 1.0 + PROFILE.worker_s + backbone.copy_s)]
    fleet.retire(one, 200.0)
    assert first.is_open and not other.is_open
    fleet.retire(two, 200.0)
    assert not first.is_open and first.used == 0


def test_a_device_stays_open_for_whoever_needed_the_room() -> None:
    rows = [(0.0, 0, 100, 1), (30.0, 1, 100, 1)]
    (system,) = choose_systems("sharing=off")
    trace, cluster = make_trace(rows), cluster_of(memory_gb=14.0, slo_s=100.0)  # room for one and the spare
    simulation = Simulation(trace, cluster, msgspec.structs.replace(system, keep_alive_s=600.0), check=True)
    outcome = simulation.run()
    assert outcome.ttft[1] == pytest.approx(PROFILE.gateway_s + PROFILE.spare_s + ADAPTER_S + prefill_s(100))


def test_a_worker_starts_where_its_container_waits() -> None:
    (system,) = choose_systems("instainfer-like")
    simulation = Simulation(make_trace([(0.0, f, 10, 2) for f in range(3)]), cluster_of(4), system)
    fleet, router = simulation.fleet, simulation.router
    copy_s = PROFILE.backbones["b"].copy_s
    fleet.hosts[1].containers.add(1)  # of the devices 2 and 3
    assert fleet.start(0, fleet.devices[2], 0.0) and fleet.start(0, fleet.devices[3], 0.0)
    spot = router.place(1, 0)
    assert spot is not None and spot.device.index == 2  # not the empty devices of the other host
    assert fleet.starts.ready_at(1, fleet.devices[2], 50.0) == pytest.approx(50.0 + copy_s)
    assert fleet.starts.ready_at(1, fleet.devices[0], 50.0) > 50.0 + PROFILE.libraries_s
    assert fleet.starts.again_s(1, 50.0) == pytest.approx(copy_s)
    assert fleet.starts.again_s(2, 50.0) == pytest.approx(PROFILE.libraries_s + copy_s)
    elsewhere = router.place(2, 0)
    assert elsewhere is not None and elsewhere.device.index == 0


def test_nobody_waits_for_a_device_that_opens_later_than_it_would_be_served() -> None:
    rows = [*((float(i), 0, 1000, 1) for i in range(10)), *((10.0 + 0.01 * i, 0, 1000, 1) for i in range(16))]
    cluster = cluster_of(2, tenants=1, slo_s=2.0)
    cluster = make_cluster(msgspec.structs.replace(cluster.config, deadline="patience"), PROFILE)
    outcome, _ = play(make_trace(rows), cluster)
    opened = outcome.fleet.devices[1]
    assert outcome.fleet.num_starts == 2 and opened.launcher_at == pytest.approx(10.0 + PROFILE.libraries_s, abs=0.2)
    # A device of its own could not have answered before it was open.
    assert max(outcome.ttft[10:]) < PROFILE.libraries_s


# --- patience and objectives


def test_always_on_systems_lose_patience_too() -> None:
    # Its KV fills the one process's memory for minutes; whoever waits for memory meanwhile goes after a minute.
    (system,) = choose_systems("dlora-like/4")
    config = msgspec.structs.replace(cluster_of(memory_gb=20.0).config, patience_s=60.0)
    rows = [(0.0, 0, 1000, 80_000), (1.0, 1, 1000, 40_000)]
    outcome, report = play(make_trace(rows), make_cluster(config, PROFILE), system)
    assert report.refusals == {"no memory within its patience": 1} and outcome.status[1] == REFUSED


def test_who_knows_objectives_refuses_by_them() -> None:
    rows = [*((float(i), 0, 1000, 1) for i in range(20)), *((20.0 + 0.01 * i, 0, 3000, 1) for i in range(12))]
    reports = {}
    for deadline in (None, "objective", "patience"):
        for name in ("ours", "dlora-like/4"):
            config = msgspec.structs.replace(cluster_of(slo_s=3.0).config, deadline=deadline)
            _, reports[name, deadline] = play(make_trace(rows), make_cluster(config, PROFILE), choose_systems(name)[0])
    assert reports["ours", None] == reports["ours", "objective"] != reports["ours", "patience"]
    assert reports["dlora-like/4", None] == reports["dlora-like/4", "patience"]
    for name in ("ours", "dlora-like/4"):
        strict, patient = reports[name, "objective"], reports[name, "patience"]
        assert strict.refused > 0 == patient.refused and strict.ttft.p99 < patient.ttft.p99
        assert (strict.refuses_by, patient.refuses_by) == ("objective", "patience")


def test_a_start_longer_than_the_objective_is_waited_for() -> None:
    _, report = play(make_trace([(0.0, 0, 10, 1), (0.5, 0, 10, 1)]), cluster_of(started=False, slo_s=1.0))
    assert report.finished == 2 and report.slo_attainment == 0.0 and report.refuses_by == "objective"


def test_an_adapter_that_gives_way_inside_a_process_is_dated() -> None:
    (system,) = choose_systems("dlora-like/4")
    fleet = Simulation(make_trace([(0.0, 0, 1, 1), (0.0, 1, 1, 1)]), cluster_of(), system).fleet
    worker = fleet.install(0, fleet.devices[0], 1.0)
    assert worker is not None and worker.budget is not None
    assert fleet.take(worker, ADAPTER_BYTES, 50.0)
    worker.adapters[0] = 50.0
    assert fleet.take(worker, worker.budget, 100.0)
    host = fleet.hosts[0]
    assert list(host.adapters) == [0] and host.since == 100.0 and host.held == 0.0


def test_replicas_are_on_as_many_devices_as_they_are_named_for() -> None:
    for system in SYSTEMS:
        if system.name.startswith("dlora-like/"):
            outcome, report = play(make_trace([(0.0, 0, 10, 1)], duration_s=3600.0), cluster_of(20), system)
            count = int(system.name.partition("/")[2])
            assert len(outcome.fleet.workers[0]) == count == round(report.device_open_hours)
    assert sum(system.name.startswith("dlora-like/") for system in SYSTEMS) == 3


# --- which way the switches push


def toy() -> Trace:
    return make_trace(random_rows(2, count=300, functions=24, seconds=1500.0), duration_s=1500.0)


def test_sharing_holds_less_and_misses_less() -> None:
    cluster = cluster_of(2, tenants=12)
    reports = {name: play(toy(), cluster, choose_systems(name)[0], check=False)[1] for name in ("ours", "sharing=off")}
    ours, without = reports["ours"], reports["sharing=off"]
    assert ours.slo_attainment > without.slo_attainment
    assert ours.device_gb_hours < without.device_gb_hours and ours.cost < without.cost


def test_dedicated_models_serve_only_those_that_fit() -> None:
    # Two of 11.5 GB fit into each device of 26 GB; the four most called functions get them.
    rows = [(float(t), f, 10, 2) for f in range(6) for t in range(0, 10 * (f + 1), 2)]
    outcome, report = play(make_trace(rows), cluster_of(2, memory_gb=26.0), choose_systems("dedicated")[0])
    served = {f for i, f in enumerate(outcome.fleet.functions.domain[int(f)] for f in make_trace(rows).functions)}
    assert served == set(range(6))
    refused = {int(make_trace(rows).functions[i]) for i, s in enumerate(outcome.status) if s == REFUSED}
    assert refused == {0, 1} and report.refusals == {"no room for its model": 15}
    assert report.rungs["worker"] == report.rungs["backbone"] == 0


def test_an_idle_function_goes_and_its_tenant_comes_back_cold() -> None:
    system = System("fixed", "", PolicySettings(preload="off", keep_alive_max_s=60.0, keep_alive_min_s=1.0))
    rows = [(0.0, 0, 10, 2), (50.0, 0, 10, 2), (120.0, 0, 10, 2)]
    _, report = play(make_trace(rows), cluster_of(), system)
    assert report.rungs["worker"] == 2 and report.rungs["hot"] == 1 and report.worker_starts == 2
    # Its adapter stayed in the host's memory.
    outcome, _ = play(make_trace(rows), cluster_of(), system)
    again = PROFILE.gateway_s + PROFILE.spare_s + PROFILE.adapter_ram_s + prefill_s(10)
    assert outcome.ttft[2] == pytest.approx(again)


def test_what_was_let_go_is_not_planned_back() -> None:
    # A busy function would be worth loading; one time for all says that silence lets it go, and the live server obeys.
    settings = PolicySettings(preload="on", keep_alive_min_s=1.0, min_gain_per_gb=0.0)
    system = System("fixed", "", settings, keep_alive_s=20.0)
    rows = [(0.1 * i, 0, 10, 2) for i in range(100)] + [(90.0, 0, 10, 2)]  # plans are made at 0 and 60 s
    _, report = play(make_trace(rows), cluster_of(), system)
    assert report.worker_starts == 2 and report.rungs["worker"] >= 2


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_nothing_that_can_never_fit_waits(system: System) -> None:
    trace = make_trace([(0.0, 0, 300_000, 10), (1.0, 0, 10, 2)])
    outcome, report = play(trace, cluster_of(memory_gb=30.0), system)
    assert list(outcome.status) == [REFUSED, FINISHED] and report.refusals == {"its KV fits nowhere": 1}


# --- the server's twin, files and the command line


def test_numbers_of_the_file_hold_for_every_system() -> None:
    numbers = PolicyNumbers(keep_alive_min_s=1.0, keep_alive_max_s=60.0)
    config = msgspec.structs.replace(cluster_of().config, policies=numbers)
    rows = [(0.0, 0, 10, 2), (50.0, 0, 10, 2), (120.0, 0, 10, 2)]
    _, report = play(make_trace(rows), make_cluster(config, PROFILE), choose_systems("preload=off")[0])
    assert report.worker_starts == 2


def test_one_device_of_a_running_server() -> None:
    trace = make_trace([(0.0, 0, 100, 5), (10.0, 1, 100, 5), (20.0, 0, 100, 5)])
    profile = msgspec.structs.replace(PROFILE, adapter_ram_s=0.0)
    report = simulate_server(trace, profile, Server(tenant_of={"f0": "t", "f1": "t"}, adapter_bytes=ADAPTER_BYTES))
    assert report.rungs == {"hot": 1, "adapter-ram": 0, "adapter-disk": 1, "worker": 1, "backbone": 0}
    mean = PROFILE.gateway_s + prefill_s(100) + (PROFILE.spare_s + 2 * ADAPTER_S) / 3
    assert report.ttft.mean == pytest.approx(mean, rel=1e-5)


def write_inputs(folder: Path) -> list[str]:
    write_profile(folder / "p.json", PROFILE)
    (folder / "c.toml").write_text(
        'profile = "p.json"\n[devices]\ncount = 2\nmemory_gb = 40.0\nprice_per_hour = 1.0\n[functions]\ntenants = 3\n'
    )
    rows = random_rows(3, count=60, functions=6, seconds=100.0)
    with (folder / "t.jsonl").open("w") as file:
        for at, function, prompt, output in rows:
            row = {"timestamp": 1000 * at, "model": f"f{function}", "input_length": prompt, "output_length": output}
            file.write(json.dumps(row) + "\n")
    return ["simulate", str(folder / "t.jsonl"), "--cluster", str(folder / "c.toml")]


def command(arguments: list[str], *, hash_seed: str) -> str:
    code = (
        "import sys; from serverlesslora.cli import main, simulate; main.COMMANDS = (simulate,); sys.exit(main.main())"
    )
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def test_the_same_input_gives_the_same_output(tmp_path: Path) -> None:
    arguments = [*write_inputs(tmp_path), "--json", "--systems", "ours,instainfer-like"]
    first, second = (command(arguments, hash_seed=seed) for seed in ("1", "2"))
    assert first == second
    reports = [msgspec.json.decode(line, type=Report) for line in first.splitlines()]
    assert [report.system for report in reports] == ["ours", "instainfer-like"]
    assert all(report.finished + report.refused == 60 for report in reports)


def test_the_table_names_every_system(tmp_path: Path) -> None:
    table = command([*write_inputs(tmp_path), "--systems", "ours,vllm-like"], hash_seed="0")
    assert "ours" in table and "vllm-like" in table and "illustrative" in table
    assert "(by share)" in table and "(whole devices)" in table and "OPEN H" in table
    assert "refused by objective" in table and "refused by patience" in table


def test_unknown_systems_and_bad_clusters_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no system 'x'.*ours"):
        choose_systems("ours,x")
    write_inputs(tmp_path)
    (tmp_path / "bad.toml").write_text(
        'profile = "p.json"\n[devices]\ncount = 0\nmemory_gb = 1.0\nprice_per_hour = 1.0'
    )
    with pytest.raises(ConfigError, match=r"bad.toml.*count"):
        read_cluster(tmp_path / "bad.toml")
    (tmp_path / "small.toml").write_text(
        'profile = "p.json"\n[devices]\ncount = 1\nmemory_gb = 9.0\nprice_per_hour = 1.0'
    )
    with pytest.raises(ConfigError, match="cannot hold the backbone"):
        read_cluster(tmp_path / "small.toml")


def test_what_is_shipped_can_be_read() -> None:
    for path in sorted((SHIPPED / "clusters").glob("*.toml")):
        cluster = read_cluster(path)
        assert cluster.profile.backbones and "ESTIMATED" in cluster.profile.measured_on


def test_the_command_waits_with_numpy() -> None:
    code = "import sys, serverlesslora.cli.simulate; print('numpy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
