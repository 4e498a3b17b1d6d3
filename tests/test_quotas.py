"""Limits of tenants and functions: one bucket for all keys, named in the refusal, given back however a request ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

from serverlesslora.config import build_config
from serverlesslora.errors import ConfigError, RateLimited
from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.backend import ModelCard
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.gateway.quotas import Quotas, tenant_limits
from serverlesslora.tenancy.key import Limits
from serverlesslora.tenancy.rate_limits import Limiter
from tests.backend_fake import FakeBackend
from tests.server import running, wait_until
from tests.test_sse import Served, body_of, connect, leave, read_until


def card(name: str, tenant: str | None = None, **limits: Any) -> ModelCard:
    return ModelCard(name, "root", "demo", 0, None, tenant=tenant, limits=Limits(**limits))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_tenant_has_one_bucket_for_all_its_functions_and_keys() -> None:
    quotas = Quotas({"acme": Limits(rps=1, burst=2)}, Limiter(Clock()))
    quotas.enter(card("f", "acme"))
    quotas.enter(card("demo"), key_tenant="acme")  # the backbone, asked with a key of the tenant
    with pytest.raises(RateLimited) as caught:
        quotas.enter(card("g", "acme"))
    assert caught.value.message == "The tenant 'acme', with all its keys together, may make 1 requests per second."
    assert caught.value.retry_after_s == 1
    quotas.enter(card("f", "other"))


def test_a_function_and_its_tenant_are_limited_together() -> None:
    quotas = Quotas({"acme": Limits(concurrent=1)}, Limiter(Clock()))
    busy = card("busy", "acme", rps=1)
    quotas.enter(busy).leave()
    with pytest.raises(RateLimited, match="The function 'busy' may make 1 requests per second"):
        quotas.enter(busy)
    quotas.enter(card("g", "acme"))  # what was refused holds nothing of the tenant's


def test_a_function_at_its_limit_does_not_use_up_its_tenants_rate() -> None:
    quotas = Quotas({"acme": Limits(rps=1, burst=3)}, Limiter(Clock()))
    busy = card("busy", "acme", rps=1)
    quotas.enter(busy)
    for _ in range(20):
        with pytest.raises(RateLimited, match="The function 'busy'"):
            quotas.enter(busy)
    quotas.enter(card("g", "acme"))
    quotas.enter(card("g", "acme"))
    with pytest.raises(RateLimited, match="The tenant 'acme'"):
        quotas.enter(card("g", "acme"))


def test_tokens_are_expected_and_corrected() -> None:
    clock = Clock()
    quotas = Quotas({}, Limiter(clock))
    limited = card("f", tokens_per_minute=100)
    stay = quotas.enter(limited)
    stay.expect(10)
    stay.used(100)
    stay.leave()
    stay.leave()  # once is enough
    other = quotas.enter(limited)
    with pytest.raises(RateLimited, match="The function 'f' may use 100 tokens per minute"):
        other.expect(1)
    clock.now = 60
    other.expect(100)


def test_new_limits_of_a_function_hold_at_once_and_keep_who_is_open() -> None:
    quotas = Quotas({}, Limiter(Clock()))
    stay = quotas.enter(card("f", concurrent=2))
    with pytest.raises(RateLimited):
        quotas.enter(card("f", concurrent=1))
    stay.leave()
    quotas.enter(card("f", concurrent=1))


def test_settings() -> None:
    config = build_config(
        {
            "tenants": [{"name": "acme", "rps": 2.5, "max_concurrency": 3}, {"name": "poor", "budget": 1.0}],
            "functions": [{"name": "f", "adapter": "x", "rps": 1, "burst": 5, "tokens_per_minute": 1000}],
            "backbones": [{"model": "m"}],
        }
    )
    assert tenant_limits(config.tenants) == {"acme": Limits(rps=2.5, concurrent=3), "poor": Limits()}
    for table in ("tenants", "functions"):
        with pytest.raises(ConfigError, match="no rps that it could be a burst of"):
            build_config(
                {
                    table: [
                        {"name": "f", "adapter": "x", "burst": 5} if table == "functions" else {"name": "f", "burst": 5}
                    ]
                }
            )


class Owned(FakeBackend):
    """The demo's functions belong to a tenant, and `upper` has limits of its own."""

    def model(self, name: str) -> ModelCard:
        limits = Limits(rps=0.001, burst=2) if name == "upper" else Limits()
        return msgspec.structs.replace(super().model(name), tenant="acme", limits=limits)


@pytest.fixture
def app() -> Starlette:
    app = create_app(Owned(), HttpSettings(write_timeout_s=0.3))
    app.state.gateway.quotas = Quotas({"acme": Limits(concurrent=1)})
    return app


@pytest.fixture
def served(app: Starlette) -> Iterator[Served]:
    with running(app) as url:
        yield Served(app.state.gateway.backend, url)


def ask(served: Served, model: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/chat/completions", json=body_of(model, **fields), timeout=10)


def test_a_refusal_names_the_limit(served: Served) -> None:
    assert [ask(served, "upper").status_code for _ in range(3)] == [200, 200, 429]
    error = ask(served, "upper").json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "The function 'upper' may make 0.001 requests per second" in error["message"]
    assert 1 <= int(ask(served, "upper").headers["retry-after"]) <= 60
    assert ask(served, "reverse").status_code == 200


@pytest.mark.parametrize("how", ["fin", "rst", "done"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_place_is_given_back_when_the_request_ends(served: Served, *, stream: bool, how: str) -> None:
    connection = connect(served, "slow", stream=stream)
    wait_until(lambda: served.backend.running == 1)
    refused = ask(served, "reverse")
    assert refused.status_code == 429
    assert "The tenant 'acme', with all its keys together, may have 1 requests open at once" in refused.text
    if how == "done":
        served.backend.thaw_from_outside()
        read_until(connection, b"[DONE]" if stream else b'"usage"')
        connection.close()
    else:
        leave(connection, reset=how == "rst")
    wait_until(lambda: ask(served, "reverse").status_code == 200)


@pytest.mark.parametrize(
    ("model", "fields", "status"),
    [("busy", {}, 503), ("upper", {"max_tokens": 100_000}, 400), ("upper", {"temperature": 7}, 400), ("none", {}, 404)],
)
def test_a_failure_gives_its_place_back(served: Served, model: str, fields: dict[str, Any], status: int) -> None:
    assert ask(served, model, **fields).status_code == status
    assert ask(served, "reverse").status_code == 200


def test_a_completion_of_many_prompts_is_one_request(served: Served) -> None:
    body = {"model": "reverse", "prompt": ["ab", "cd", "ef"], "temperature": 0}
    assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 200
    assert ask(served, "reverse").status_code == 200
