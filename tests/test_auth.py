"""Keys at the door, over HTTP: who is let in, what each sees and may ask, how much, and that no key is ever told."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serverlesslora.config import BackboneConfig, ServerConfig
from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.admin import create_admin_app
from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.limits import HttpSettings
from serverlesslora.tenancy.key import Grant, Limits
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.backend_fake import FakeBackend
from tests.server import running, wait_until

FUNCTIONS = {"acme": ("upper", "rot13", "slow", "cold", "org/name"), "other": ("reverse", "mask")}
OPEN = ("/health", "/ready", "/version", "/metrics")
ACME = Grant(tenant="acme")
OPERATOR = Grant(admin=True)


class House:
    """A server whose backend has functions of two tenants, of nobody, and a base."""

    def __init__(self, url: str, backend: FakeBackend, store: KeyStore, ring: Keyring) -> None:
        self.url = url
        self.backend = backend
        self.store = store
        self.ring = ring
        self.client = httpx.Client(base_url=url, timeout=20)

    def key(self, grant: Grant, **more: Any) -> str:
        """A new key, as soon as the server knows it."""
        text = self.store.create(grant, **more).text
        wait_until(lambda: self.knows(text))
        return text

    def knows(self, text: str) -> bool:
        try:
            return self.ring.check(text) is not None
        except ServerlessLoraError:
            return False

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return self.client.get(path, headers=bearing(key))

    def post(self, path: str, key: str | None, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body, headers=bearing(key))

    def chat(self, model: str, key: str | None = None, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", key, **chat_body(model, **fields))

    def complete(self, model: str, key: str | None = None, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", key, model=model, **{"prompt": "hello", "temperature": 0, **fields})

    def stream(self, model: str, key: str, **fields: Any) -> AbstractContextManager[httpx.Response]:
        body = chat_body(model, stream=True, **fields)
        return self.client.stream("POST", "/v1/chat/completions", json=body, headers=bearing(key))

    def names(self, key: str | None) -> set[str]:
        return {card["id"] for card in self.get("/v1/models", key).json()["data"]}


def chat_body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, **fields}


def bearing(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    backend = FakeBackend()
    for tenant, names in FUNCTIONS.items():
        for name in names:
            backend.give(name, tenant)
    store = KeyStore(tmp_path / KEYS_FILE)
    ring = Keyring(store.path, look_every_s=0.005)
    ring.startup()
    try:
        with running(create_app(backend, HttpSettings(ping_s=0.05), ring)) as url:
            house = House(url, backend, store, ring)
            with house.client:
                yield house
    finally:
        ring.shutdown()


def check_unauthorized(response: httpx.Response) -> None:
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")


# --- who is let in


def test_without_keys_everything_is_as_it_was(house: House) -> None:
    assert house.chat("upper").status_code == 200
    assert house.chat("upper", "sk-whatever").status_code == 200
    assert {"demo", "upper", "reverse", "leet"} <= house.names(None)


def test_from_the_first_key_on_nobody_is_let_in_without_one(house: House) -> None:
    key = house.key(ACME)
    assert house.chat("upper", key).json()["choices"][0]["message"]["content"] == "HELLO"
    for path in (
        "/v1/models",
        "/v1/models/upper",
        "/v1/nope",
        "/live",
        "/health/",
        "/metrics/x",
        f"{house.url}//health",
    ):
        check_unauthorized(house.get(path))
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        check_unauthorized(house.post(path, None))
        check_unauthorized(house.post(path, None, model="upper", stream=True))
    for path in OPEN:
        assert house.get(path).status_code == 200
    assert house.get("/v1/nope", key).json()["error"]["code"] == "unknown_url"
    house.store.revoke(house.store.list_keys()[0].id)
    wait_until(lambda: not house.knows(key))
    check_unauthorized(house.chat("upper", key))
    check_unauthorized(house.chat("upper"))


@pytest.mark.parametrize(
    "present",
    [
        lambda key: [("authorization", key)],
        lambda key: [("authorization", f"Basic {key}")],
        lambda key: [("authorization", "Bearer ")],
        lambda key: [("authorization", f"Bearer {key[:-1]}")],
        lambda key: [("authorization", f"Bearer {key}x")],
        lambda key: [("authorization", f"Bearer {key.upper()}")],
        lambda key: [("authorization", f"Bearer {key[:25]}-{'A' * 43}")],
        lambda key: [("authorization", f"Bearer sk-slora-{'0' * 16}{key[25:]}")],
        lambda key: [("authorization", b"Bearer \xff\x00")],
        lambda key: [("authorization", f"Bearer {'a' * 20_000}")],
        lambda key: [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")],
        lambda key: [("x-api-key", key)],
    ],
)
def test_what_is_no_valid_key(house: House, present: Any) -> None:
    headers = present(house.key(ACME))
    try:
        response = house.client.get("/v1/models", headers=headers)
    except (httpx.LocalProtocolError, httpx.RemoteProtocolError):
        return  # not even HTTP
    if response.status_code != 400:
        check_unauthorized(response)


def test_the_scheme_is_read_as_http_says(house: House) -> None:
    key = house.key(ACME)
    for text in (f"bearer {key}", f"BEARER  {key}"):
        assert house.client.get("/v1/models", headers={"authorization": text}).status_code == 200


def test_a_refused_client_keeps_its_connection_although_its_body_was_not_read(house: House) -> None:
    key = house.key(ACME)
    for _ in range(3):
        check_unauthorized(house.client.post("/v1/chat/completions", content=b" " * 500_000))
        assert house.chat("upper", key).status_code == 200


def test_an_openai_client(house: House) -> None:
    key = house.key(ACME)
    messages: Any = [{"role": "user", "content": "hello"}]
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key=key, max_retries=0) as client:
        assert client.chat.completions.create(model="upper", messages=messages).choices
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="reverse", messages=messages)
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key="sk-wrong", max_retries=5) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="upper", messages=messages)
        assert caught.value.code == "invalid_api_key"


def test_a_revoked_key_is_refused_within_two_seconds(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / KEYS_FILE)
    made = store.create(ACME)
    ring = Keyring(store.path)  # as the server has it
    ring.startup()
    try:
        with running(create_app(FakeBackend(), None, ring)) as url, httpx.Client(headers=bearing(made.text)) as client:
            assert client.get(f"{url}/v1/models").status_code == 200
            store.revoke(made.key.id)
            wait_until(lambda: client.get(f"{url}/v1/models").status_code == 401, deadline_s=2.0)
    finally:
        ring.shutdown()


def test_health_tells_when_the_keys_cannot_be_read(house: House) -> None:
    key = house.key(ACME)
    house.store.path.unlink()
    wait_until(lambda: house.ring.problem is not None)
    health = house.get("/health")
    assert health.status_code == 200 and "keys" in health.json()
    assert str(house.store.path.parent) not in health.text
    check_unauthorized(house.get("/v1/models"))
    assert house.get("/v1/models", key).status_code == 200


# --- what each sees


def test_a_tenant_sees_its_own_functions(house: House) -> None:
    acme, other = house.key(ACME), house.key(Grant(tenant="other"))
    assert house.names(acme) == set(FUNCTIONS["acme"])
    assert house.names(other) == set(FUNCTIONS["other"])
    assert house.names(house.key(Grant(tenant="nobody"))) == set()
    assert house.names(house.key(Grant(tenant="acme", functions=("rot13", "org/*")))) == {"rot13", "org/name"}
    assert house.names(house.key(Grant(tenant="other", allow_base=True))) == {*FUNCTIONS["other"], "demo"}
    assert house.names(house.key(OPERATOR)) == {card.id for card in house.backend.models()}


@pytest.mark.parametrize("hidden", ["reverse", "leet", "demo", "rot13"], ids=["theirs", "nobody's", "base", "pattern"])
def test_what_a_key_may_not_ask_does_not_exist(house: House, hidden: str) -> None:
    key = house.key(Grant(tenant="acme", functions=("upper",)))
    absent = "nothing-of-the-kind"
    asks: list[Any] = [
        lambda name: house.get(f"/v1/models/{name}", key),
        lambda name: house.chat(name, key),
        lambda name: house.chat(name, key, stream=True),
        lambda name: house.complete(name, key),
        lambda name: house.complete(name, key, prompt=["a", "b"], stream=True),
    ]
    for ask in asks:
        told, expected = ask(hidden), ask(absent)
        assert told.status_code == expected.status_code == 404
        assert told.text == expected.text.replace(absent, hidden)
        assert told.json()["error"]["code"] == "model_not_found"
        same = [
            {**dict(each.headers), "x-request-id": "", "date": "", "content-length": ""} for each in (told, expected)
        ]
        assert same[0] == same[1]
    assert not house.backend.requests
    assert house.get("/v1/models/upper", key).status_code == house.chat("upper", key).status_code == 200


def test_a_name_that_changes_hands_while_the_request_is_read(house: House) -> None:
    """What was checked is checked again where the request is handed over."""
    key = house.key(ACME)
    own_model, calls = house.backend.model, []

    def model(name: str) -> Any:
        card = own_model(name)
        calls.append(name)
        if len(calls) == 1:
            house.backend.give("upper", "other")
        return card

    house.backend.model = model  # type: ignore[method-assign]
    assert house.chat("upper", key).status_code == 404
    assert not house.backend.requests


def test_streams(house: House) -> None:
    key = house.key(ACME)
    answer = house.chat("upper", key, stream=True, stream_options={"include_usage": True})
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert "HELLO" in "".join(
        choice["delta"].get("content") or ""
        for line in answer.text.split("\n\n")
        if line.startswith("data: {")
        for choice in json.loads(line[6:])["choices"]
    )


# --- operating


def test_adapters_are_loaded_by_admins(house: House, tmp_path: Path) -> None:
    adapter = tmp_path / "mask"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    load = {"lora_name": "fresh", "lora_path": str(adapter)}
    for key in (house.key(ACME), house.key(Grant(tenant="acme", allow_base=True))):
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            refused = house.post(path, key, **load)
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "insufficient_permissions"
    operator, acme = house.key(OPERATOR), house.key(Grant(tenant="acme", admin=True))
    assert house.post("/v1/load_lora_adapter", acme, **load).status_code == 200
    assert house.backend.model("fresh").tenant == "acme"
    assert house.post("/v1/load_lora_adapter", operator, **load, load_inplace=True).status_code == 200
    assert house.backend.model("fresh").tenant == "acme"  # new weights, the same owner
    assert house.post("/v1/unload_lora_adapter", operator, lora_name="fresh").status_code == 200
    assert house.post("/v1/load_lora_adapter", operator, **load).status_code == 200
    assert house.backend.model("fresh").tenant is None


def test_the_admin_api(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / KEYS_FILE)

    async def scene() -> None:
        config = ServerConfig(backbones=(BackboneConfig("base"),), state_dir=str(tmp_path / "state"), device="cpu")
        fleet = Fleet(config)
        ring = Keyring(store.path, look_every_s=0.005)
        ring.startup()
        transport = httpx.ASGITransport(create_admin_app(fleet, ring))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:

            async def status(key: str | None, path: str = "/admin/functions") -> int:
                return (await client.get(path, headers=bearing(key))).status_code

            async def until(key: str | None, wanted: int) -> None:
                async with asyncio.timeout(5):
                    while await status(key) != wanted:
                        await asyncio.sleep(0.005)

            assert await status(None) == 200
            tenant = store.create(ACME).text
            admin = store.create(OPERATOR)
            await until(None, 401)
            await until(admin.text, 200)
            for key in (None, tenant, admin.text[:-1]):
                assert await status(key) == await status(key, "/admin/nope") == await status(key, "/admin/usage") == 401
            refused = await client.delete("/admin/functions/f")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.json()["error"]["status"] == 401  # the command line reads it
            store.revoke(admin.key.id)
            await until(admin.text, 401)
            assert await status(None) == 401
        ring.shutdown()
        await fleet.shutdown()

    asyncio.run(scene())


def test_the_admin_api_stays_open_until_there_is_an_admin_key(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / KEYS_FILE)
    store.create(ACME)

    async def scene() -> None:
        config = ServerConfig(backbones=(BackboneConfig("base"),), state_dir=str(tmp_path / "state"), device="cpu")
        fleet = Fleet(config)
        ring = Keyring(store.path)
        ring.startup()
        transport = httpx.ASGITransport(create_admin_app(fleet, ring))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            assert (await client.get("/admin/functions")).status_code == 200
        ring.shutdown()
        await fleet.shutdown()

    asyncio.run(scene())


# --- how much


def check_limited(response: httpx.Response) -> None:
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


def test_requests_per_second(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(rps=0.01, burst=3)))
    assert house.chat("upper", key).status_code == 200
    assert house.get("/v1/models", key).status_code == 200
    assert house.chat("reverse", key).status_code == 404
    check_limited(house.chat("upper", key))
    check_limited(house.get("/v1/models", key))
    assert house.chat("upper", house.key(ACME)).status_code == 200  # others are not touched
    assert house.get("/health", key).status_code == 200


def test_an_open_page_does_not_use_up_its_keys_requests(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(rps=0.001, burst=2, concurrent=1)))
    assert [house.get("/live", key).status_code for _ in range(5)] == [200] * 5
    assert [house.chat("upper", key).status_code for _ in range(3)] == [200, 200, 429]
    assert house.get("/live", key).status_code == 200
    assert house.get("/live", key + "x").status_code == house.get("/live").status_code == 401


def test_requests_at_once(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(concurrent=2)))
    with house.stream("slow", key) as slow:
        assert slow.status_code == 200
        with house.stream("cold", key) as cold:
            assert cold.status_code == 200
            check_limited(house.chat("upper", key))
            check_limited(house.get("/v1/models", key))
        wait_until(lambda: house.chat("upper", key).status_code == 200)  # who left made room
        house.backend.thaw_from_outside()
        assert slow.read().endswith(b"[DONE]\n\n")
    # Neither refusals nor mistakes keep their place.
    for _ in range(5):
        assert house.chat("reverse", key).status_code == 404
        assert house.chat("upper", key, n=0).status_code == 400
        assert house.post("/v1/chat/completions", key).status_code == 400
    assert house.chat("upper", key).status_code == 200


def test_tokens_per_minute(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(tokens_per_minute=40)))
    assert house.chat("upper", key).json()["usage"]["total_tokens"] == 18  # and the estimate is 2
    statuses = [house.chat("upper", key).status_code for _ in range(3)]
    assert statuses[-1] == 429  # the output counts as well, although only the prompt was known before
    check_limited(house.chat("upper", key))
    check_limited(house.complete("upper", key, stream=True))
    assert house.get("/v1/models", key).status_code == 200


def test_what_fails_costs_no_tokens(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(tokens_per_minute=600)))
    long = "x" * 2000  # 501 tokens by estimate, more than the context by count
    for _ in range(4):
        refused = house.complete("upper", key, prompt=long)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert house.complete("upper", key).status_code == 200


def test_many_prompts_are_estimated_together(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(tokens_per_minute=100)))
    assert house.complete("upper", key, prompt=["x" * 40] * 3, max_tokens=1).status_code == 200
    check_limited(house.complete("upper", key, prompt=["x" * 40] * 9, max_tokens=1))


def test_a_client_that_leaves_has_paid_for_what_it_got(house: House) -> None:
    key = house.key(Grant(tenant="acme", limits=Limits(tokens_per_minute=40, concurrent=1)))
    with house.stream("slow", key, messages=[{"role": "user", "content": "y" * 60}]) as answer:
        assert next(answer.iter_lines())
    wait_until(lambda: house.backend.aborted == 1)
    wait_until(lambda: house.get("/v1/models", key).status_code == 200)  # it has left
    check_limited(house.chat("upper", key))  # 60 characters were 60 tokens, and the estimate was 16


# --- nothing is told


def test_no_key_is_ever_told(house: House, caplog: pytest.LogCaptureFixture) -> None:
    key, limited = house.key(ACME), house.key(Grant(tenant="acme", limits=Limits(rps=0.01, burst=1)))
    revoked = house.store.create(ACME)
    house.store.revoke(revoked.key.id)
    told = []
    with caplog.at_level(logging.DEBUG):
        for presented in (key, key[:-1], limited, limited, revoked.text, f"{key}x"):
            for response in (
                house.chat("upper", presented),
                house.chat("reverse", presented),
                house.chat("broken", presented, stream=True),
                house.get("/v1/models", presented),
                house.post("/v1/load_lora_adapter", presented),
            ):
                told += [response.text, str(response.headers)]
        told += [house.get(path).text for path in OPEN]
    told += [record.getMessage() + str(record.exc_text) for record in caplog.records if record.name != "httpcore"]
    for secret in (key, limited, revoked.text):
        part = secret.split("-", 3)[3]
        assert not [text for text in told if part[:20] in text]
