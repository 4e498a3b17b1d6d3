"""Names, digests and domains."""

import pytest

from serverlesslora.errors import InvalidRequest, ModelNotFound
from serverlesslora.gateway.registry import Backbone, Function, Registry, Target, domain_of

BASE = Backbone(name="base", source="/b", dtype="float32", created=0)


def make(name: str, digest: str = "d", tenant: str | None = None) -> Function:
    return Function(name=name, digest=digest, backbone="base", source="/a", created=0, tenant=tenant)


def test_unknown_is_never_the_base() -> None:
    with pytest.raises(ModelNotFound) as error:
        Registry([BASE]).resolve("nope")
    assert (error.value.status, error.value.code, error.value.param) == (404, "model_not_found", "model")


def test_redeploy_changes_the_digest_under_the_same_name() -> None:
    registry = Registry([BASE])
    assert registry.deploy(make("f", "one")) is None
    before = registry.resolve("f")
    replaced = registry.deploy(make("f", "two"))
    assert replaced is not None
    assert (replaced.digest, before.digest, registry.resolve("f").digest) == ("one", "one", "two")


def test_a_function_cannot_take_a_backbones_name() -> None:
    with pytest.raises(InvalidRequest, match="conflicts"):
        Registry([BASE]).deploy(make("base"))


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
