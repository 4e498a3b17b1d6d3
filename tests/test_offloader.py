"""The offloader: cheapest first, together with dependants, never what is in use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.scheduler.artifacts import Artifact, Offload, Place
from serverlesslora.scheduler.offloader import LruOffloader, NoOffloader, Offloader
from serverlesslora.scheduler.settings import PolicySettings

GB = 10**9
GPU = Place("gpu0", "device", 100 * GB)
SETTINGS = PolicySettings()

BACKBONE = Artifact("backbone:b", "backbone", "device", 10 * GB, delay_s=20.0, rate=0.5, last_used=90.0)
WORKER = Artifact("worker:w", "worker", "device", GB, delay_s=1.0, rate=0.5, needs=("backbone:b",), last_used=90.0)
HOT = Artifact("adapter:hot", "adapter", "device", GB, delay_s=1.0, rate=0.4, needs=("worker:w",), last_used=50.0)
COLD = Artifact("adapter:cold", "adapter", "device", GB, delay_s=1.0, rate=0.1, needs=("worker:w",), last_used=90.0)
ALL = (BACKBONE, WORKER, HOT, COLD)


def names(offload: Offload) -> list[str]:
    return [eviction.artifact_id for eviction in offload.evictions]


def test_the_least_worth_per_byte_leaves_first() -> None:
    offload = Offloader(SETTINGS).free(GPU, ALL, GB, reason="KV cache grows")
    assert names(offload) == ["adapter:cold"]
    assert offload.evictions[0].reason == "0.1 s saved per second and GB; KV cache grows"
    assert offload.reason == "KV cache grows: 1 GB of 1 GB leave gpu0"
    assert names(Offloader(SETTINGS).free(GPU, ALL, GB + 1)) == ["adapter:cold", "adapter:hot"]


def test_dependants_leave_before_what_they_need() -> None:
    offload = Offloader(SETTINGS).free(GPU, ALL, 5 * GB)
    assert names(offload)[-2:] == ["worker:w", "backbone:b"]
    assert offload.freed_bytes == 13 * GB


def test_what_is_in_use_stays_with_what_it_needs() -> None:
    offload = Offloader(SETTINGS).free(GPU, ALL, 5 * GB, in_use={"adapter:hot"})
    assert names(offload) == ["adapter:cold"]
    assert offload.freed_bytes == GB
    assert offload.reason == "1 GB of 5 GB leave gpu0, the rest is in use, pinned or needed by such"


def test_adapters_of_a_device_go_to_the_host_and_all_else_to_the_disk() -> None:
    def ends(place: Place, artifacts: Sequence[Artifact]) -> set[tuple[str, str]]:
        offload = Offloader(SETTINGS).free(place, artifacts, 13 * GB)
        return {(eviction.artifact_id.split(":")[0], eviction.to) for eviction in offload.evictions}

    assert ends(GPU, ALL) == {("backbone", "disk"), ("worker", "disk"), ("adapter", "host")}
    alone = Artifact("adapter:x", "adapter", "host", GB, delay_s=1.0, rate=1.0)
    assert ends(Place("ram", "host", GB), [alone]) == {("adapter", "disk")}


def test_lru_asks_only_when_something_was_used() -> None:
    offload = LruOffloader(SETTINGS).free(GPU, ALL, GB)
    assert names(offload) == ["adapter:hot"]
    assert offload.evictions[0].reason == "last used 40 s before the newest here"
    assert names(LruOffloader(SETTINGS).free(GPU, ALL, 2 * GB)) == ["adapter:hot", "adapter:cold"]
    never = Artifact("adapter:never", "adapter", "device", GB, delay_s=9.0, rate=9.0, needs=("worker:w",))
    assert names(LruOffloader(SETTINGS).free(GPU, (*ALL, never), GB)) == ["adapter:never"]


def test_an_old_ancestor_of_something_new_is_new() -> None:
    old = Artifact("backbone:o", "backbone", "device", GB, delay_s=1.0, rate=1.0, last_used=1.0)
    new = Artifact("adapter:n", "adapter", "device", GB, delay_s=1.0, rate=1.0, needs=("backbone:o",), last_used=99.0)
    assert names(LruOffloader(SETTINGS).free(GPU, (*ALL, old, new), GB)) == ["adapter:hot"]


def test_orphans_can_leave() -> None:
    assert names(Offloader(SETTINGS).free(GPU, [HOT], GB)) == ["adapter:hot"]


def test_nothing_is_asked_nothing_leaves() -> None:
    assert Offloader(SETTINGS).free(GPU, ALL, 0).evictions == ()
    assert NoOffloader(SETTINGS).free(GPU, ALL, GB) == Offload(
        reason="offloading is off: 1 GB more have to wait until something ends"
    )


@st.composite
def contents(draw: st.DrawFn) -> tuple[list[Artifact], set[str]]:
    artifacts: list[Artifact] = []
    for n in range(draw(st.integers(1, 7))):
        parents = [artifact.artifact_id for artifact in artifacts]
        artifacts.append(
            Artifact(
                f"adapter:{n}",
                "adapter",
                "device",
                draw(st.integers(0, 5)) * GB,
                delay_s=1.0,
                rate=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0])),
                needs=tuple(draw(st.lists(st.sampled_from(parents), max_size=2, unique=True)) if parents else ()),
                pinned=draw(st.integers(0, 5)) == 0,
                last_used=draw(st.sampled_from([1.0, 2.0, 3.0])),
            )
        )
    return artifacts, set(draw(st.lists(st.sampled_from([a.artifact_id for a in artifacts]), max_size=2)))


def must_stay(artifacts: Sequence[Artifact], in_use: set[str]) -> set[str]:
    staying = {a.artifact_id for a in artifacts if a.pinned or a.artifact_id in in_use}
    for artifact in reversed(artifacts):  # children come after their parents
        if artifact.artifact_id in staying:
            staying |= set(artifact.needs)
    return staying


@given(contents(), st.integers(1, 25), st.booleans())
@settings(max_examples=150, deadline=None)
def test_frees_what_can_be_freed(case: tuple[list[Artifact], set[str]], wanted_gb: int, lru: bool) -> None:
    artifacts, in_use = case
    policy = LruOffloader(SETTINGS) if lru else Offloader(SETTINGS)
    offload = policy.free(GPU, artifacts, wanted_gb * GB, in_use=in_use)
    staying = must_stay(artifacts, in_use)
    here = {artifact.artifact_id: artifact for artifact in artifacts}
    for eviction in offload.evictions:
        assert eviction.artifact_id not in staying
        gone = here.pop(eviction.artifact_id)
        assert gone.size_bytes == eviction.size_bytes
        assert not any(eviction.artifact_id in other.needs for other in here.values()), "dependants go first"
    assert offload.freed_bytes == sum(eviction.size_bytes for eviction in offload.evictions)
    most = sum(a.size_bytes for a in artifacts if a.artifact_id not in staying)
    assert offload.freed_bytes >= min(wanted_gb * GB, most)


@given(contents(), st.integers(1, 25))
@settings(max_examples=100, deadline=None)
def test_nothing_leaves_needlessly(case: tuple[list[Artifact], set[str]], wanted_gb: int) -> None:
    """Whatever leaves, with those that needed it, was necessary: without it too few bytes are freed."""
    artifacts, in_use = case
    offload = Offloader(SETTINGS).free(GPU, artifacts, wanted_gb * GB, in_use=in_use)
    leaving = set(names(offload))
    tops = [a for a in artifacts if a.artifact_id in leaving and not leaving & set(a.needs)]
    for top in tops:
        spared = {top.artifact_id}
        for artifact in artifacts:
            if spared & set(artifact.needs):
                spared.add(artifact.artifact_id)
        others = {a.artifact_id for a in tops if a is not top}
        for artifact in artifacts:
            if others & set(artifact.needs):
                others.add(artifact.artifact_id)
        alone = sum(a.size_bytes for a in artifacts if a.artifact_id in (spared - others) & leaving)
        assert offload.freed_bytes - alone < wanted_gb * GB


def test_loses_little_more_than_the_best_choice() -> None:
    """Independent adapters, every subset tried."""
    sizes, rates = [1, 2, 3, 4, 5, 6], [0.5, 0.3, 2.0, 0.9, 1.2, 0.7]
    artifacts = [
        Artifact(f"adapter:{n}", "adapter", "device", size * GB, delay_s=1.0, rate=rate)
        for n, (size, rate) in enumerate(zip(sizes, rates, strict=True))
    ]
    for wanted in range(1, 22):
        sets = itertools.chain.from_iterable(itertools.combinations(artifacts, n) for n in range(1, 7))
        best = min(sum(a.rate for a in s) for s in sets if sum(a.size_bytes for a in s) >= wanted * GB)
        lost = sum(
            float(e.artifact_id == a.artifact_id) * a.rate
            for e in Offloader(SETTINGS).free(GPU, artifacts, wanted * GB).evictions
            for a in artifacts
        )
        assert lost <= 2 * best
