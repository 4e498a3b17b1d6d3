"""What deciding costs: a pre-load plan, an offload, a dispatch, and keeping count of arrivals. No server, no model.

    python bench/decisions.py [--functions 10000] [--devices 64] [--rounds 20]

The fleet is made up: four backbones, as many tenants as a tenth of the functions, rates that differ by orders of
magnitude, more to load than there is memory. Plans are timed without verdicts, as the server makes them, and once with.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable

from harness import report, spread

from serverlesslora.scheduler.arrivals import ArrivalModel
from serverlesslora.scheduler.artifacts import Artifact, Place, Plan
from serverlesslora.scheduler.asks import Ask, Send
from serverlesslora.scheduler.catalogue import FunctionFacts, catalogue
from serverlesslora.scheduler.dispatcher import Dispatcher
from serverlesslora.scheduler.offloader import Offloader
from serverlesslora.scheduler.preloader import Preloader
from serverlesslora.scheduler.profile import BackboneProfile, Profile, StepProfile
from serverlesslora.scheduler.settings import PolicySettings

STEPS = StepProfile(prefill_s=0.02, prefill_token_s=1e-4, decode_s=0.02, decode_row_s=1e-3, chunk_tokens=512)
PROFILE = Profile(
    measured_on="nowhere: round numbers of the right size",
    backbones={
        f"b{n}": BackboneProfile(size_gb * 10**9, load_s=20.0, copy_s=4.0, kv_bytes_per_token=131072, steps=STEPS)
        for n, size_gb in enumerate((3, 8, 14, 16))
    },
    libraries_s=3.0,
    worker_s=0.5,
    spare_s=0.05,
    worker_bytes=600 * 10**6,
    process_bytes=2 * 10**9,
    adapter_s=0.05,
    adapter_byte_s=1e-9,
)


def fleet(num_functions: int, seed: int = 0) -> tuple[list[FunctionFacts], dict[str, float]]:
    rng = random.Random(seed)
    functions = []
    for n in range(num_functions):
        backbone, tenant = rng.choice(list(PROFILE.backbones)), f"t{rng.randrange(max(1, num_functions // 10))}"
        size_bytes = rng.choice([20, 40, 80, 160]) * 10**6
        functions.append(FunctionFacts(f"f{n}", tenant, f"{backbone}/tenant:{tenant}", backbone, f"d{n}", size_bytes))
    return functions, {function.name: 0.01 * rng.paretovariate(1.1) for function in functions}


def artifacts_of(functions: list[FunctionFacts], rates: dict[str, float], num_devices: int) -> list[Artifact]:
    return catalogue(
        functions,
        rate=rates.__getitem__,
        profile=PROFILE,
        tier="device",
        service_s=lambda _: 0.5,
        max_copies=num_devices,
    )


def carried_out(plan: Plan, places: Iterable[Place]) -> dict[str, set[str]]:
    here: dict[str, set[str]] = {place.place_id: set() for place in places}
    for move in plan.moves:
        assert move.action == "load", "nothing was there before"
        here[move.place_id].add(move.artifact_id)
    return here


def milliseconds(rounds: int, once: Callable[[int], object]) -> dict[str, float]:
    """Of each call, after one that is not counted; garbage of earlier ones is collected outside."""
    once(0)
    times = []
    for n in range(rounds):
        gc.collect()
        began = time.perf_counter()
        once(n)
        times.append(1000 * (time.perf_counter() - began))
    return spread(times)


def bench_preload(num_functions: int, num_devices: int, rounds: int) -> None:
    functions, rates = fleet(num_functions)
    places = [Place(f"gpu{n}", "device", 80 * 10**9) for n in range(num_devices)]
    artifacts = artifacts_of(functions, rates, num_devices)
    preloader = Preloader(PolicySettings())
    first = preloader.plan(places, artifacts, {}, now=0.0, explain=False)
    here = carried_out(first, places)
    rng = random.Random(1)
    drifted = []  # one in a hundred functions becomes five times busier or quieter
    for _ in range(rounds):
        factors = {name: rng.choice((0.2, 5.0)) if rng.random() < 0.01 else 1.0 for name in rates}
        drifted.append(
            artifacts_of(functions, {name: rate * factors[name] for name, rate in rates.items()}, num_devices)
        )
    moves = [len(preloader.plan(places, now, here, now=0.0, explain=False).moves) for now in drifted]
    report(
        "preload-plan",
        functions=num_functions,
        devices=num_devices,
        artifacts=len(artifacts),
        lying_there=sum(map(len, here.values())),
        milliseconds={
            "catalogue": milliseconds(rounds, lambda _: artifacts_of(functions, rates, num_devices)),
            "nothing_changed": milliseconds(
                rounds, lambda _: preloader.plan(places, artifacts, here, now=0.0, explain=False)
            ),
            "one_in_100_changed": milliseconds(
                rounds, lambda n: preloader.plan(places, drifted[n], here, now=0.0, explain=False)
            ),
            "empty_devices": milliseconds(
                rounds, lambda _: preloader.plan(places, artifacts, {}, now=0.0, explain=False)
            ),
            "explained": milliseconds(rounds, lambda n: preloader.plan(places, drifted[n], here, now=0.0)),
        },
        moves={"one_in_100_changed": spread(moves), "empty_devices": len(first.moves)},
        bar="a plan <= 200 ms",
    )


def bench_offload(rounds: int) -> None:
    """One full device of 80 GB; 2 GB are needed now."""
    functions, rates = fleet(1000)
    place = Place("gpu0", "device", 80 * 10**9)
    artifacts = artifacts_of(functions, rates, 1)
    plan = Preloader(PolicySettings()).plan([place], artifacts, {}, now=0.0, explain=False)
    here = carried_out(plan, [place])["gpu0"]
    there = [artifact for artifact in artifacts if artifact.artifact_id in here]
    busy = set(random.Random(2).sample(sorted(here), len(here) // 4))
    offloader = Offloader(PolicySettings())
    report(
        "offload",
        artifacts=len(there),
        milliseconds=milliseconds(
            max(100, rounds), lambda _: offloader.free(place, there, 2 * 10**9, in_use=busy, reason="KV cache grows")
        ),
    )


def bench_dispatch(rounds: int, *, num_domains: int = 100, num_queued: int = 1000, sends: int = 500) -> None:
    """Every worker is busy and has a queue. One request ends, another comes, the next one is sent."""
    dispatcher = Dispatcher(PolicySettings(slo_ttft_s=1000.0), max_queue=num_queued, slots=4)
    rng = random.Random(3)
    names = (f"r{n}" for n in itertools.count())
    domain_of: dict[str, str] = {}

    def offer(domain: str, now: float) -> None:
        name = next(names)
        domain_of[name] = domain
        ask = Ask(
            name,
            function=f"{domain}/{rng.randrange(10)}",
            tenant=None,
            domain=domain,
            device=f"gpu{int(domain) % 16}",
            prompt_tokens=rng.randrange(10, 2000),
            max_tokens=100,
            arrived_at=now,
            deadline=now + 10_000.0,
        )
        assert dispatcher.offer(ask, now) is None, "the queue is long enough"

    for n in range(num_queued + 4 * num_domains):
        offer(str(n % num_domains), 0.001 * n)
    now = 2.0
    running = []
    for domain in range(num_domains):
        dispatcher.open(str(domain), now)
    for _ in range(100):  # fill windows pass
        now += 0.1
        running += [send.request_id for send in dispatcher.next(now) if isinstance(send, Send)]
    for name in running:
        dispatcher.first_token(name, now)
    deciding, offering, sent_in_all = [], [], 0
    for _ in range(rounds):
        deciding_s = offering_s = 0.0
        sent = 0
        while sent < sends:
            now += 0.001
            ended = running.pop(rng.randrange(len(running)))
            dispatcher.ended(ended, now, prompt_tokens=100, output_tokens=100)
            began = time.perf_counter()
            todo = dispatcher.next(now)
            deciding_s += time.perf_counter() - began
            began = time.perf_counter()
            offer(domain_of.pop(ended), now)
            offering_s += time.perf_counter() - began
            for send in todo:
                assert isinstance(send, Send)
                dispatcher.first_token(send.request_id, now)
                running.append(send.request_id)
                sent += 1
        sent_in_all += sent
        deciding.append(1e6 * deciding_s / sent)
        offering.append(1e6 * offering_s / sent)
    report(
        "dispatch",
        domains=num_domains,
        queued=dispatcher.num_waiting,
        sent=sent_in_all,
        microseconds={"next_per_send": spread(deciding), "offer": spread(offering)},
        bar="a dispatch <= 50 us",
    )


def bench_arrivals(rounds: int, num_functions: int) -> None:
    rng = random.Random(4)
    names = [f"f{n}" for n in range(num_functions)]
    model = ArrivalModel()
    now = 0.0
    observing, rating = [], []
    for _ in range(rounds):
        arrivals = [(rng.choice(names), now := now + rng.expovariate(100.0)) for _ in range(10_000)]
        began = time.perf_counter()
        for name, at in arrivals:
            model.observe(name, at)
        observing.append(1e6 * (time.perf_counter() - began) / len(arrivals))
        began = time.perf_counter()
        for name in names:
            model.rate(name, now)
        rating.append(1e6 * (time.perf_counter() - began) / len(names))
    report("arrivals", functions=num_functions, microseconds={"observe": spread(observing), "rate": spread(rating)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", type=int, default=10_000)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    bench_preload(arguments.functions, arguments.devices, arguments.rounds)
    bench_offload(arguments.rounds)
    bench_dispatch(arguments.rounds)
    bench_arrivals(arguments.rounds, arguments.functions)


if __name__ == "__main__":
    main()
