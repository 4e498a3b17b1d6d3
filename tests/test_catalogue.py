"""The catalogue: what functions need, summed over those that share it."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlesslora.errors import ConfigError
from serverlesslora.scheduler.artifacts import Place
from serverlesslora.scheduler.catalogue import FunctionFacts, catalogue
from serverlesslora.scheduler.preloader import Preloader
from serverlesslora.scheduler.profile import BackboneProfile, Profile, StepProfile
from serverlesslora.scheduler.settings import PolicySettings

STEPS = StepProfile(prefill_s=0.02, prefill_token_s=1e-4, decode_s=0.02, decode_row_s=1e-3, chunk_tokens=512)
PROFILE = Profile(
    measured_on="a test",
    backbones={
        "llama": BackboneProfile(size_bytes=16 * 10**9, load_s=20.0, copy_s=4.0, kv_bytes_per_token=1, steps=STEPS),
        "qwen": BackboneProfile(size_bytes=10**9, load_s=2.0, copy_s=0.5, kv_bytes_per_token=1, steps=STEPS),
    },
    libraries_s=3.0,
    worker_s=0.5,
    spare_s=0.05,
    worker_bytes=300 * 10**6,
    process_bytes=2 * 10**9,
    adapter_s=0.05,
    adapter_byte_s=1e-9,
)


def function(
    name: str, tenant: str | None = None, *, backbone: str = "llama", digest: str | None = "d1", pinned: bool = False
) -> FunctionFacts:
    domain = f"{backbone}/tenant:{tenant}" if tenant else f"{backbone}/function:{name}"
    return FunctionFacts(name, tenant, domain, backbone, digest, 100 * 10**6 if digest else 0, pinned)


RATES = MappingProxyType({"a": 1.0, "b": 2.0, "c": 4.0})


def test_rates_are_summed_over_what_is_shared() -> None:
    functions = [function("a", "t"), function("b", "t"), function("c", "u")]
    made = {x.artifact_id: x for x in catalogue(functions, rate=RATES.__getitem__, profile=PROFILE, tier="device")}
    assert {name: x.rate for name, x in made.items()} == {
        "backbone:llama": 7.0,
        "worker:llama/tenant:t": 3.0,
        "worker:llama/tenant:u": 4.0,
        "adapter:llama/tenant:t:d1": 3.0,
        "adapter:llama/tenant:u:d1": 4.0,
    }
    adapter, worker = made["adapter:llama/tenant:t:d1"], made["worker:llama/tenant:t"]
    assert adapter.needs == ("worker:llama/tenant:t",) and worker.needs == ("backbone:llama",)
    assert adapter.delay_s == pytest.approx(0.05 + 0.1)
    assert (worker.delay_s, made["backbone:llama"].delay_s) == (0.5, 20.0)
    assert (adapter.size_bytes, worker.size_bytes, made["backbone:llama"].size_bytes) == (10**8, 3 * 10**8, 16 * 10**9)
    assert {x.tier for x in made.values()} == {"device"}


def test_the_bare_backbone_needs_a_worker_only() -> None:
    made = catalogue([function("a", digest=None)], rate=RATES.__getitem__, profile=PROFILE, tier="host")
    assert [x.artifact_id for x in made] == ["backbone:llama", "worker:llama/function:a"]


def test_a_pinned_function_pins_all_it_needs() -> None:
    functions = [function("a", "t", pinned=True), function("b", "t", digest="d2"), function("c", backbone="qwen")]
    made = catalogue(functions, rate=RATES.__getitem__, profile=PROFILE, tier="device")
    assert {x.artifact_id for x in made if x.pinned} == {
        "backbone:llama",
        "worker:llama/tenant:t",
        "adapter:llama/tenant:t:d1",
    }


def test_last_use_is_the_latest_of_all_users() -> None:
    made = catalogue(
        [function("a", "t"), function("b", "t", digest="d2"), function("c")],
        rate=RATES.__getitem__,
        profile=PROFILE,
        tier="device",
        last_used={"a": 5.0, "b": 9.0},
    )
    used = {x.artifact_id: x.last_used for x in made}
    assert used["backbone:llama"] == used["worker:llama/tenant:t"] == 9.0
    assert used["adapter:llama/tenant:t:d1"] == 5.0
    assert used["worker:llama/function:c"] == float("-inf")


@pytest.mark.parametrize(("rate", "copies"), [(0.0, 1), (1.0, 1), (1.4, 1), (1.41, 2), (4.2, 3), (99.0, 8)])
def test_copies_follow_the_load(rate: float, copies: int) -> None:
    """Half a device second per request; a place gives 0.7 per second."""
    made = catalogue(
        [function("a", "t"), function("b", "t", digest="d2")],
        rate={"a": rate, "b": 0.0}.__getitem__,
        profile=PROFILE,
        tier="device",
        service_s=lambda _: 0.5,
        max_copies=8,
    )
    wanted = {x.artifact_id: x.copies for x in made}
    assert wanted["backbone:llama"] == wanted["worker:llama/tenant:t"] == wanted["adapter:llama/tenant:t:d1"] == copies
    assert wanted["adapter:llama/tenant:t:d2"] == 1


def test_without_sharing_every_worker_carries_its_backbone() -> None:
    made = catalogue([function("a")], rate=RATES.__getitem__, profile=PROFILE, tier="device", sharing="off")
    assert [x.artifact_id for x in made] == ["worker:llama/function:a", "adapter:llama/function:a:d1"]
    assert made[0].size_bytes == 16 * 10**9 + 300 * 10**6 and made[0].delay_s == 4.5 and made[0].needs == ()


def test_an_unmeasured_backbone_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'a': the profile \(a test\) has no backbone 'gpt', only llama, qwen"):
        catalogue([function("a", backbone="gpt")], rate=RATES.__getitem__, profile=PROFILE, tier="device")


FUNCTIONS = st.lists(
    st.builds(
        lambda n, tenant, backbone, digest: function(f"f{n}", tenant, backbone=backbone, digest=digest),
        st.integers(0, 30),
        st.sampled_from([None, "t", "u"]),
        st.sampled_from(["llama", "qwen"]),
        st.sampled_from([None, "d1", "d2"]),
    ),
    max_size=12,
    unique_by=lambda facts: facts.name,
)


@given(FUNCTIONS)
@settings(max_examples=80, deadline=None)
def test_each_kind_carries_every_arrival_once_and_can_be_planned(functions: list[FunctionFacts]) -> None:
    rates = {facts.name: 1.0 + n for n, facts in enumerate(functions)}
    made = catalogue(
        functions, rate=rates.__getitem__, profile=PROFILE, tier="device", service_s=lambda _: 1.0, max_copies=2
    )
    for kind in ("backbone", "worker"):
        assert sum(x.rate for x in made if x.kind == kind) == sum(rates.values())
    assert sum(x.rate for x in made if x.kind == "adapter") == sum(rates[f.name] for f in functions if f.digest)
    seen: set[str] = set()
    by_id = {x.artifact_id: x for x in made}
    for artifact in made:
        assert seen.issuperset(artifact.needs), "parents come first"
        assert all(by_id[parent].copies >= artifact.copies for parent in artifact.needs)
        seen.add(artifact.artifact_id)
    places = [Place(f"gpu{n}", "device", 80 * 10**9) for n in range(2)]
    plan = Preloader(PolicySettings()).plan(places, made, {}, now=0.0)
    assert {move.artifact_id for move in plan.moves} == set(by_id)
