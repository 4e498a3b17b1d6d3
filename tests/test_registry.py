"""Names, versions, shares, domains, and changes that reach the disk before anybody sees them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora.errors import InvalidRequest, ModelNotFound, NotFound, ServerlessLoraError
from serverlesslora.gateway.backend import ModelCard
from serverlesslora.gateway.storing import needed_by
from serverlesslora.gateway.tenant_view import TenantView
from serverlesslora.registry.entries import (
    Entry,
    Version,
    begun,
    rolled_back,
    routed,
    with_canary,
    with_version,
    without_version,
)
from serverlesslora.registry.file import Change, Contents, RegistryFile
from serverlesslora.registry.functions import Backbone, Function, Settings, Target, domain_of
from serverlesslora.registry.names import choose, parse
from serverlesslora.registry.registry import Registry
from serverlesslora.tenancy.key import Grant

BASE = Backbone(name="base", source="/b", dtype="float32", created=0)
KEYS = [f"user {i}" for i in range(4000)]


def make(name: str, digest: str = "d", tenant: str | None = None) -> Function:
    return Function(name=name, digest=digest, backbone="base", source="/a", created=0, tenant=tenant)


def version(number: int, digest: str = "", backbone: str = "base") -> Version:
    return Version(number=number, digest=digest or f"d{number}", source="/a", backbone=backbone, created=0)


def entry(name: str, *numbers: int, tenant: str | None = None) -> Entry:
    """All requests go to the first."""
    made = begun(name, version(numbers[0]), Settings(tenant=tenant))
    for number in numbers[1:]:
        made = with_version(made, version(number))
    return made


def put(registry: Registry, *entries: Entry) -> None:
    def decide(contents: Contents) -> list[Change]:
        return [Change(each.name, contents.entries.get(each.name), each, "put", "") for each in entries]

    asyncio.run(registry.change(decide, who="test"))


def drop(registry: Registry, name: str) -> None:
    asyncio.run(
        registry.change(lambda contents: [Change(name, contents.entries[name], None, "remove", "")], who="test")
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(path: Path) -> Registry:
    return Registry([BASE], RegistryFile(path))


# --- names


def test_unknown_is_never_the_base(registry: Registry) -> None:
    put(registry, entry("f", 1))
    for name in ("nope", "f@v2", "f@", "f@v0", "f@3", "f@v1@v1", "@v1", "base@v1", "f@ latest"):
        with pytest.raises(ModelNotFound) as error:
            registry.resolve(name)
        assert (error.value.status, error.value.code, error.value.param) == (404, "model_not_found", "model")


def test_a_new_version_changes_the_digest_under_the_same_name(registry: Registry) -> None:
    put(registry, entry("f", 1))
    before = registry.resolve("f")
    put(registry, routed(with_version(registry.entry("f"), version(2)), {2: 100}))
    assert (before.digest, registry.resolve("f").digest, registry.resolve("f@v1").digest) == ("d1", "d2", "d1")


def test_names_of_versions(registry: Registry) -> None:
    put(registry, with_canary(entry("a/f", 1, 2, 3), {2: 40}))
    assert registry.resolve("a/f@latest").digest == "d3"
    assert registry.resolve("a/f@stable").digest == "d1"
    assert registry.resolve("a/f@v2").digest == "d2"
    assert {registry.resolve("a/f", key).digest for key in KEYS[:100]} == {"d1", "d2"}
    assert [(f.version, f.share) for f in registry.routed()] == [(1, 0.6), (2, 0.4)]


@pytest.mark.parametrize("name", ["base", "f@v1", "f@"])
def test_what_a_function_cannot_be_called(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidRequest):
        registry.check_name(name)


@given(st.text(max_size=12), st.integers(1, 999))
def test_a_numbered_name_is_taken_apart(name: str, number: int) -> None:
    assert parse(f"{name}@v{number}") == (name, number)


@pytest.mark.parametrize(("grant", "sees"), [("legal", True), ("leg*", True), ("legal@v2", False), ("sales", False)])
def test_a_version_has_exactly_the_rights_of_its_function(grant: str, sees: bool) -> None:
    class Models:
        def model(self, name: str) -> ModelCard:
            return ModelCard(name, "/a", "base", 0, None, tenant="acme")

    for tenant, is_own in (("acme", True), ("other", False)):
        view = TenantView(Models(), Grant(tenant=tenant, functions=(grant,)))  # type: ignore[arg-type]
        for name in ("legal", "legal@v2", "legal@latest"):
            if sees and is_own:
                assert view.model(name).name == "legal"
            else:
                with pytest.raises(ModelNotFound):
                    view.model(name)


# --- shares


def shares(weights: dict[int, int], keys: list[str] = KEYS) -> dict[str, int]:
    return {key: choose(weights, "f", key) for key in keys}


def test_shares_converge_to_the_weights_and_a_user_stays() -> None:
    weights = {1: 60, 2: 30, 3: 10}
    found = shares(weights)
    assert found == shares(weights)
    counts = Counter(found.values())
    for number, weight in weights.items():  # four standard deviations
        share = weight / 100
        assert abs(counts[number] / len(KEYS) - share) < 4 * (share * (1 - share) / len(KEYS)) ** 0.5


def test_different_functions_try_their_canaries_on_different_users() -> None:
    weights = {1: 50, 2: 50}
    same = sum(choose(weights, "f", key) == choose(weights, "g", key) for key in KEYS)
    assert 0.4 < same / len(KEYS) < 0.6


@given(st.integers(1, 98), st.integers(1, 99))
def test_raising_a_weight_moves_users_only_to_that_version(low: int, more: int) -> None:
    high = min(99, low + more)
    before, after = (shares({3: 100 - weight, 4: weight}, KEYS[:300]) for weight in (low, high))
    assert all(after[key] == 4 for key in before if before[key] != after[key])


# --- changes of one function


def test_a_rollback_goes_back_and_forth() -> None:
    first = entry("f", 1, 2)
    second = with_canary(first, {2: 10})
    assert second.weights == {1: 90, 2: 10}
    assert rolled_back(second).weights == {1: 100}
    assert rolled_back(rolled_back(second)).weights == second.weights
    assert rolled_back(second, 2).weights == {2: 100}
    with pytest.raises(InvalidRequest, match="nothing is known"):
        rolled_back(first)
    with pytest.raises(NotFound, match="v3"):
        rolled_back(first, 3)


@pytest.mark.parametrize("weights", [{1: 50}, {1: 110}, {1: 101, 2: -1}, {}])
def test_weights_that_do_not_add_up(weights: dict[int, int]) -> None:
    with pytest.raises(InvalidRequest, match="add up"):
        routed(entry("f", 1, 2), weights)


def test_canaries() -> None:
    made = with_canary(entry("f", 1, 2, 3), {2: 10, 3: 5})
    assert made.weights == {1: 85, 2: 10, 3: 5}
    assert with_canary(made, {3: 20}).weights == {1: 80, 3: 20}
    assert with_canary(made, {3: 0}).weights == {1: 100}
    assert with_canary(made, {3: 100}).weights == {3: 100}
    assert with_canary(with_canary(made, {3: 100}), {3: 50}).weights == {2: 50, 3: 50}
    for wrong in ({2: 60, 3: 60}, {2: -1}, {2: 101}):
        with pytest.raises(InvalidRequest):
            with_canary(made, wrong)
    with pytest.raises(InvalidRequest, match="no other"):
        with_canary(entry("f", 1), {1: 10})


def test_only_a_version_that_nobody_gets_is_removed() -> None:
    made = rolled_back(with_canary(entry("f", 1, 2), {2: 10}))
    assert made.previous == {1: 90, 2: 10}
    left = without_version(made, 2)
    assert ([each.number for each in left.versions], left.previous, left.last_number) == ([1], None, 2)
    with pytest.raises(InvalidRequest, match="100 %"):
        without_version(left, 1)


# --- what is kept


def test_another_start_finds_everything(registry: Registry, path: Path) -> None:
    put(registry, with_canary(entry("f", 1, 2, tenant="t"), {2: 10}), entry("g", 1))
    put(registry, entry("h", 1))
    drop(registry, "h")
    registry.close()
    again = Registry([BASE], RegistryFile(path))
    assert again.entries == registry.entries
    assert again.contents == registry.contents
    assert again.contents.removed == {"h": 1}
    events = asyncio.run(again.history("h"))
    assert [(event.action, event.who) for event in events] == [("remove", "test"), ("put", "test")]


def test_a_function_comes_back_with_its_backbone(registry: Registry, path: Path) -> None:
    other = routed(with_version(entry("f", 1), version(2, backbone="other")), {1: 90, 2: 10})
    put(registry, other, routed(with_version(entry("g", 1), version(2, backbone="other")), {2: 100}))
    assert [(f.name, f.version, f.share) for f in registry.routed()] == [("f", 1, 1.0)]
    with pytest.raises(ModelNotFound):
        registry.resolve("g@v1")  # nobody may find a part of what is not there
    registry.close()
    both = Registry([BASE, Backbone(name="other", source="", dtype="float32", created=0)], RegistryFile(path))
    assert both.resolve("g").backbone.name == "other"
    assert both.num_functions == 2
    both.close()
    hidden = Registry([Backbone(name="f", source="", dtype="float32", created=0)], RegistryFile(path))
    assert hidden.resolve("f").function is None  # a backbone of that name comes first


def refuse_to_write(registry: Registry, pragma: str) -> None:
    registry._file._db.execute(pragma)


@pytest.mark.parametrize(("pragma", "status"), [("PRAGMA query_only = 1", 503), ("PRAGMA max_page_count = 1", 507)])
def test_what_cannot_be_written_did_not_happen(registry: Registry, path: Path, pragma: str, status: int) -> None:
    put(registry, entry("f", 1))
    known = registry.contents
    refuse_to_write(registry, pragma)
    with pytest.raises(ServerlessLoraError, match=r"nothing was changed.*registry\.sqlite") as error:
        put(registry, *(entry("long name" * 99 + str(i), 1) for i in range(20)))
    assert error.value.status == status
    assert registry.contents is known
    assert RegistryFile(path).load() == known
    assert registry.num_functions == 1


def test_a_change_is_decided_again_when_another_server_was_faster(registry: Registry, path: Path) -> None:
    put(registry, entry("f", 1))
    other = Registry([BASE], RegistryFile(path))
    put(other, with_version(other.entry("f"), version(2)), entry("theirs", 1))

    def decide(contents: Contents) -> list[Change]:
        before = contents.entries["f"]
        after = with_version(before, version(before.last_number + 1))
        return [Change("f", before, after, "deploy", "")]

    asyncio.run(registry.change(decide, who="test"))
    assert [each.number for each in registry.entry("f").versions] == [1, 2, 3]
    assert registry.resolve("theirs").digest == "d1"
    assert RegistryFile(path).load() == registry.contents


def test_what_another_server_deployed_is_needed_as_well(registry: Registry, path: Path) -> None:
    """The two share a store: what came from a directory may be all there is of it."""
    put(Registry([BASE], RegistryFile(path)), entry("theirs", 1))
    assert "theirs" not in registry.entries
    assert "d1" in needed_by(registry, []).in_use


def test_who_leaves_while_it_is_written_does_not_part_memory_from_disk(registry: Registry, path: Path) -> None:
    async def scene() -> None:
        changing = asyncio.ensure_future(
            registry.change(lambda contents: [Change("f", None, entry("f", 1), "put", "")], who="test")
        )
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        changing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await changing
        await registry.change(lambda contents: [], who="test")  # waits for its turn

    asyncio.run(scene())
    assert RegistryFile(path).load() == registry.contents
    assert "f" in registry.entries


def broken(path: Path, how: str) -> None:
    RegistryFile(path).close()
    if how == "garbage":
        path.write_bytes(b"this is no database" * 999)
        return
    with sqlite3.connect(path) as db:
        statements: dict[str, Any] = {
            "newer": "PRAGMA user_version = 99",
            "weights": "INSERT INTO functions VALUES ('f', '{}', '{\"7\":100}', NULL, 1)",
            "json": "INSERT INTO functions VALUES ('f', 'no', '{}', NULL, 1)",
            "foreign": "PRAGMA user_version = 0",
        }
        db.execute(statements[how])
    db.close()


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("garbage", "damaged or not ours"),
        ("newer", "newer version"),
        ("weights", "damaged"),
        ("json", "damaged"),
        ("foreign", "another program"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(path: Path, how: str, match: str) -> None:
    broken(path, how)
    content = path.read_bytes()
    with pytest.raises(ServerlessLoraError, match=match) as error:
        Registry([BASE], RegistryFile(path))
    assert str(path) in error.value.message
    assert path.read_bytes() == content  # it is still there to be saved


# --- domains


def test_domains_never_collide() -> None:
    targets = [
        Target(BASE, None),
        Target(BASE, make("x")),
        Target(BASE, make("y", tenant="x")),
        Target(BASE, make("base")),
        Target(BASE, make("z", tenant="base")),
    ]
    assert len({domain_of(target, isolation="tenant") for target in targets}) == len(targets)
    assert len({domain_of(target, isolation="shared") for target in targets}) == 1


def test_functions_of_one_tenant_share_a_domain() -> None:
    one, two = Target(BASE, make("f", tenant="t")), Target(BASE, make("g", tenant="t"))
    assert domain_of(one, isolation="tenant") == domain_of(two, isolation="tenant")
