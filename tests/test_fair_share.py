"""Virtual token counters: against their definition, and the two promises of the paper, equal service and no credit."""

from __future__ import annotations

import random

import pytest

from serverlesslora.scheduler.fair_share import FairShare


class GoldShare:
    """The definition, recomputed each time."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.active: set[str] = set()
        self.floor = 0.0

    def lift(self) -> float:
        if self.active:
            self.floor = max(self.floor, min(self.counters[tenant] for tenant in self.active))
        return self.floor

    def arrived(self, tenant: str) -> None:
        if tenant not in self.active:
            self.counters[tenant] = max(self.counters.get(tenant, 0), self.lift())
            self.active.add(tenant)

    def left(self, tenant: str) -> None:
        self.lift()
        if self.active == {tenant}:
            self.floor = max(self.floor, self.counters[tenant])
        self.active.discard(tenant)
        self.lift()


@pytest.mark.parametrize("seed", range(20))
def test_against_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    share, gold = FairShare(), GoldShare()
    tenants = [f"t{n}" for n in range(rng.choice([2, 5, 30]))]
    for _ in range(1500):
        tenant = rng.choice(tenants)
        match rng.randrange(4):
            case 0:
                share.arrived(tenant)
                gold.arrived(tenant)
            case 1 if tenant in gold.active:
                share.left(tenant)
                gold.left(tenant)
            case _ if tenant in gold.active:
                prompt, output = rng.randrange(100), rng.randrange(-20, 100)
                share.charge(tenant, prompt, output)
                gold.counters[tenant] += prompt + 2 * output
        share.check()
        assert {t: share.key(t) for t in gold.active} == {t: gold.counters[t] for t in gold.active}
    active = sorted(gold.active)
    assert share.order(active) == sorted(active, key=lambda t: gold.counters[t])


def test_weights() -> None:
    share = FairShare()
    share.charge("a", prompt_tokens=10, output_tokens=5)
    assert share.key("a") == 20
    share = FairShare(prompt_weight=3, output_weight=4)
    share.charge("a", prompt_tokens=10, output_tokens=5)
    assert share.key("a") == 50


def test_those_who_always_ask_get_the_same_service() -> None:
    rng, share = random.Random(0), FairShare()
    served = dict.fromkeys("abc", 0)
    for tenant in served:
        share.arrived(tenant)
    for _ in range(3000):
        tenant = share.order(served)[0]
        tokens = rng.randrange(1, {"a": 10, "b": 100, "c": 1000}[tenant])
        share.charge(tenant, output_tokens=tokens)
        served[tenant] += tokens
    assert max(served.values()) - min(served.values()) <= 1000  # the largest single request


def test_a_pause_earns_no_credit() -> None:
    share = FairShare()
    share.arrived("idle")
    share.arrived("busy")
    share.left("idle")
    share.charge("busy", 10_000)
    share.arrived("idle")
    assert share.key("idle") == share.key("busy")


def test_a_pause_forgives_no_debt() -> None:
    share = FairShare()
    for tenant in ("calm", "greedy"):
        share.arrived(tenant)
    share.charge("greedy", 10_000)
    share.left("greedy")
    share.charge("calm", 10)
    share.arrived("greedy")
    assert share.key("greedy") == 10_000 and share.order(["greedy", "calm"]) == ["calm", "greedy"]


def test_who_comes_when_nobody_is_there_starts_level_with_the_last() -> None:
    share = FairShare()
    share.arrived("a")
    share.charge("a", 500)
    share.left("a")
    share.arrived("b")
    assert share.key("b") == 500
    share.left("a")  # was gone already: nothing happens
    assert share.key("b") == 500


def test_memory_is_that_of_who_is_active() -> None:
    share = FairShare()
    share.arrived("stays")
    for n in range(10_000):
        share.arrived(f"t{n}")
        share.charge(f"t{n}", 100, -10)
        share.left(f"t{n}")
        share.charge("stays", 70)
    assert len(share._counters) < 200 and len(share._smallest) < 200
