"""GET /live: what is shown, to whom, and that nothing that was said is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serverlesslora.errors import ServerlessLoraError
from serverlesslora.gateway.app import create_app
from serverlesslora.gateway.history import History
from serverlesslora.gateway.live import FRESH_S, LivePage
from serverlesslora.gateway.live_state import (
    LiveBackbone,
    LiveFunction,
    LiveMemory,
    LivePart,
    LiveState,
    LiveWorker,
    Spending,
)
from serverlesslora.gateway.page_files import PAGE_PATHS, POLICY
from serverlesslora.tenancy.key import Grant
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.backend_fake import FakeBackend
from tests.server import running, serving, wait_until
from tests.test_sse import body_of

OWNERS = {"upper": "acme", "rot13": "acme", "reverse": "other"}


class Backend(FakeBackend):
    """With something to show: a worker for each tenant and one for nobody's function, and what they hold."""

    def __init__(self) -> None:
        super().__init__()
        for name, tenant in OWNERS.items():
            self.give(name, tenant)
        self.spending: Spending

    def live(self) -> LiveState:
        functions = tuple(
            LiveFunction(
                card.id,
                "demo",
                f"demo/tenant:{card.tenant}" if card.tenant else f"demo/function:{card.id}",
                state="hot",
                tenant=card.tenant,
                version="v2",
            )
            for card in self.models()
            if card.parent
        )
        domains = ("demo/tenant:acme", "demo/tenant:other", "demo/function:mask")
        workers = tuple(LiveWorker(f"w{n}", each, "demo", "cpu", "serving", 4711) for n, each in enumerate(domains))
        memory = LiveMemory(1000, 900, (LivePart("backbone", "demo", 500), LivePart("worker", "demo/other", 100)))
        return LiveState(functions, workers, (LiveBackbone("demo", "ready", "cpu", "memfd", 500, 3),), memory, "EUR")

    def watch(self, spending: Spending) -> None:
        self.spending = spending


class House:
    def __init__(self, url: str, backend: Backend, store: KeyStore, ring: Keyring) -> None:
        self.url = url
        self.backend = backend
        self._store = store
        self._ring = ring

    def key(self, **grant: Any) -> dict[str, str]:
        """The header with a new key, as soon as the server knows it."""
        text = self._store.create(Grant(**grant)).text

        def is_known() -> bool:
            try:
                return self._ring.check(text) is not None
            except ServerlessLoraError:
                return False

        wait_until(is_known)
        return {"authorization": f"Bearer {text}"}

    def live(self, headers: dict[str, str] | None = None) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/live", headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["cache-control"] == "no-store"
        document: dict[str, Any] = answer.json()
        return document

    def ask(self, model: str, headers: dict[str, str] | None = None) -> None:
        body = body_of(model, max_tokens=3)
        assert httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers).status_code == 200


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    backend = Backend()
    store = KeyStore(tmp_path / KEYS_FILE)
    ring = Keyring(store.path, look_every_s=0.005)
    ring.startup()
    try:
        with running(create_app(backend, keys=ring)) as url:
            yield House(url, backend, store, ring)
    finally:
        ring.shutdown()


def names(document: dict[str, Any]) -> set[str]:
    return {each["name"] for each in document["functions"]}


def test_without_keys_everybody_sees_everything(house: House) -> None:
    house.ask("upper")
    house.backend.spending.spent("upper", "acme", 0.5, None)
    document = house.live()
    assert document["tenant"] is None and names(document) == {c.id for c in house.backend.models() if c.parent}
    assert document["bases"] == ["demo"] and len(document["workers"]) == 3
    assert document["server"]["memory"]["parts"][0] == {"kind": "backbone", "name": "demo", "size_bytes": 500}
    upper = next(each for each in document["functions"] if each["name"] == "upper")
    assert (upper["requests"], upper["tokens"], upper["cost"], upper["state"]) == (1, 3, 0.5, "hot")
    assert upper["ttft_p50"] > 0 and upper["version"] == "v2"
    assert document["hour"]["colds"]["hot"][0] == 1
    assert sum(document["history"]["requests"]) == 1 and document["currency"] == "EUR"


def test_once_there_is_a_key_nobody_sees_anything_without_one(house: House) -> None:
    operator = house.key(admin=True)
    for headers in ({}, {"authorization": "Bearer sk-slora-nonsense"}):
        answer = httpx.get(f"{house.url}/live", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert len(house.live(operator)["workers"]) == 3 and house.live(operator)["server"] is not None


def test_a_tenant_sees_its_own_and_nothing_of_the_machine(house: House) -> None:
    acme, other = house.key(tenant="acme"), house.key(tenant="other", allow_base=True)
    house.ask("upper", acme)
    house.ask("reverse", other)
    house.ask("reverse", other)
    house.backend.spending.spent("reverse", "other", 7.0, None)
    house.backend.spending.held("", None, "backbone", 1.0, 9.0)
    document = house.live(acme)
    assert names(document) == {"upper", "rot13"}
    assert (document["tenant"], document["server"], document["bases"]) == ("acme", None, [])
    assert [(each["worker_id"], each["pid"]) for each in document["workers"]] == [("w0", None)]
    assert (document["hour"]["requests"], document["hour"]["cost"]) == (1, 0)
    assert sum(document["history"]["requests"]) == 1
    text = httpx.get(f"{house.url}/live", headers=acme).text
    assert "reverse" not in text and "other" not in text and "mask" not in text
    theirs = house.live(other)
    assert names(theirs) == {"reverse"} and theirs["bases"] == ["demo"] and theirs["hour"]["cost"] == 7


def test_a_worker_that_also_serves_what_the_key_may_not_see_is_not_shown(house: House) -> None:
    document = house.live(house.key(tenant="acme", functions=("up*",)))
    assert names(document) == {"upper"} and document["workers"] == []


def test_a_name_that_became_anothers_says_nothing_of_its_former_owner(house: House) -> None:
    acme, other = house.key(tenant="acme"), house.key(tenant="other")
    house.ask("upper", acme)
    house.backend.spending.spent("upper", "acme", 0.5, None)
    house.backend.give("upper", "other")
    house.backend.spending.held("upper", "acme", "adapter", 1.0, 9.0)  # told late
    house.ask("upper", other)
    document = house.live(other)
    upper = next(each for each in document["functions"] if each["name"] == "upper")
    assert upper["requests"] == document["hour"]["requests"] == sum(document["history"]["requests"]) == 1
    assert upper.get("cost", 0) == document["hour"]["cost"] == 0
    assert house.live(acme)["hour"]["requests"] == 0


def test_many_viewers_are_served_one_reading() -> None:
    now = 0.0
    backend = Backend()
    page = LivePage(backend, History(), clock=lambda: now)
    acme = Grant(tenant="acme")
    first = page.encoded(None), page.encoded(acme)
    backend.give("mask", "acme")
    assert (page.encoded(Grant(admin=True)), page.encoded(acme)) == first
    assert b"mask" not in page.encoded(acme)
    now = FRESH_S
    assert b"mask" in page.encoded(acme)


def test_an_admin_key_of_a_tenant_is_a_tenants_key_here(house: House) -> None:
    document = house.live(house.key(tenant="acme", admin=True))
    assert names(document) == {"upper", "rot13"} and document["server"] is None


def test_the_page_itself_needs_no_key_and_allows_nothing_from_elsewhere(house: House) -> None:
    house.key(admin=True)
    for path in sorted(PAGE_PATHS):
        answer = httpx.get(house.url + path)
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(house.url + path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert "script-src 'self'" in POLICY and "unsafe" not in POLICY
    assert httpx.get(f"{house.url}/").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/page/", "/page/nothing.js", "/page/../live.py", "/page/%2e%2e/live.py", "/index.html"):
        assert httpx.get(house.url + path, headers=house.key(admin=True)).status_code == 404, path


def test_a_real_server_tells_its_state_and_nothing_that_was_said() -> None:
    with serving("--demo", "--adapter", f"acme/mine={_adapter()}") as url:
        secret = "zqxsecret"
        for name in ("upper", "mine"):
            body = body_of(name, max_tokens=12) | {"messages": [{"role": "user", "content": secret}]}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        wait_until(lambda: len(httpx.get(f"{url}/live").json()["server"]["memory"]["parts"]) > 3, 30)
        answer = httpx.get(f"{url}/live")
        document = answer.json()
    assert secret not in answer.text and secret.upper() not in answer.text and str(Path.cwd()) not in answer.text
    states = {each["name"]: each["state"] for each in document["functions"]}
    assert states["upper"] == states["mine"] == "hot" and states["reverse"] == "cold"
    workers = {each["domain"]: each for each in document["workers"]}
    assert workers["demo/tenant:acme"]["functions"] == ["mine"] and workers["demo/tenant:acme"]["state"] == "serving"
    assert document["server"]["backbones"][0]["workers"] >= 2
    assert [p["kind"] for p in document["server"]["memory"]["parts"]].count("backbone") == 1
    assert document["hour"]["requests"] == 2 and document["hour"]["cost"] > 0
    assert document["hour"]["colds"]["worker"][0] == 2 and document["hour"]["colds"]["worker"][1] > 0


def _adapter() -> Path:
    import serverlesslora.demo

    return next(iter(sorted((Path(serverlesslora.demo.__file__).parent / "assets" / "adapters").iterdir())))
