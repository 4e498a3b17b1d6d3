"""Every endpoint that generates has one door: keys, tenants and limits hold whichever API a request comes by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.openapi import OPERATIONS
from serverlesslora.tenancy.key import Grant, Limits
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.backend_fake import FakeBackend
from tests.server import running

# For each path, the body of a request for a function.
BODIES: dict[str, Any] = {
    "/v1/chat/completions": lambda name: {"model": name, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": lambda name: {"model": name, "prompt": "hi"},
    "/v1/responses": lambda name: {"model": name, "input": "hi"},
    "/v1/embeddings": lambda name: {"model": name, "input": "hi"},
    "/tokenize": lambda name: {"model": name, "prompt": "hi"},
    "/detokenize": lambda name: {"model": name, "tokens": [97]},
    "/generate": lambda name: {"inputs": "hi", "parameters": {"adapter_id": name}},
    "/generate_stream": lambda name: {"inputs": "hi", "parameters": {"adapter_id": name}},
}
PATHS = sorted(BODIES)


class House:
    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self._url = url
        self._keys = keys

    def post(self, path: str, name: str, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {self._keys[key]}"}
        return httpx.post(self._url + path, json=BODIES[path](name), headers=headers, timeout=30)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    backend = FakeBackend()
    backend.give("upper", "acme")
    backend.give("reverse", "other")
    store = KeyStore(tmp_path_factory.mktemp("keys") / KEYS_FILE)
    grants = {"acme": Grant(tenant="acme"), "tight": Grant(tenant="acme", limits=Limits(tokens_per_minute=1))}
    keys = {name: store.create(grant).text for name, grant in grants.items()}
    ring = Keyring(store.path)
    ring.startup()
    try:
        with running(create_app(backend, None, ring)) as url:
            yield House(url, keys)
    finally:
        ring.shutdown()


def test_no_endpoint_is_forgotten() -> None:
    generating = {each.path for each in OPERATIONS if each.body is not None and "lora_adapter" not in each.path}
    assert generating == set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_who_may_ask(house: House, path: str) -> None:
    assert house.post(path, "upper", None).status_code == 401
    assert house.post(path, "upper", "acme").status_code == 200
    foreign, unknown = house.post(path, "reverse", "acme"), house.post(path, "nobody", "acme")
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    assert foreign.text.replace("reverse", "nobody") == unknown.text


@pytest.mark.parametrize("path", PATHS)
def test_tokens_are_limited(house: House, path: str) -> None:
    statuses = [house.post(path, "upper", "tight").status_code for _ in range(2)]
    assert statuses[-1] == 429
