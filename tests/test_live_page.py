"""The live page in a real browser: it shows, asks, survives hostile names and a lost server, and asks nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serverlesslora.gateway.app import create_app
from serverlesslora.tenancy.key import Grant
from serverlesslora.tenancy.keyring import Keyring
from serverlesslora.tenancy.store import KEYS_FILE, KeyStore
from tests.backend_fake import FakeBackend
from tests.server import running, serving

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")

HOSTILE = '<img src=x onerror="document.title=1">'
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
TILE = "#overview div:has(dt:text-is('{}')) dd:first-of-type"


class Opened(NamedTuple):
    page: Page
    said: list[str]  # on the console, and errors
    asked: list[str]  # URLs

    def is_clean(self, url: str) -> bool:
        assert self.said == []
        assert {urlsplit(each).netloc for each in self.asked} == {urlsplit(url).netloc}
        return True


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    contexts = []

    def open_it(url: str, width: int = 1440) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900})
        context.set_default_timeout(20_000)
        contexts.append(context)
        opened = Opened(context.new_page(), [], [])
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(url)
        return opened

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture
def fake() -> Iterator[tuple[str, FakeBackend]]:
    backend = FakeBackend()
    with running(create_app(backend)) as url:
        yield url, backend


def is_live(page: Page) -> None:
    page.wait_for_selector("#connection[data-state=live]")


def answer_of(page: Page) -> str:
    page.wait_for_selector("#answer[data-state=done]")
    return page.inner_text("#answer")


def test_the_real_server_is_shown_and_answers(open_page: Open) -> None:
    with serving("--demo") as url:
        opened = open_page(url)
        page = opened.page
        is_live(page)
        first_paint_ms = page.evaluate(PAINT)
        print(f"first contentful paint {first_paint_ms:.0f} ms")
        assert 0 < first_paint_ms < 5000
        page.select_option("#model", "upper")
        page.fill("#prompt", "hello world")
        page.click("#send")
        assert answer_of(page) == "HELLO WORLD"
        facts = page.inner_text("#facts")
        assert "worker (" in facts and "stop" in facts and "/s" in facts
        expect(page.locator(TILE.format("Requests"))).to_have_text("1")
        expect(page.locator("#functions tr:has-text('upper') td.state")).to_have_text("hot")
        expect(page.locator("#workers tbody tr")).to_have_count(1)
        expect(page.locator("#memory .group.backbone .piece")).to_have_count(1)
        expect(page.locator("#ladder tr:not(.none) th[scope=row]")).to_have_text(["worker"])
        expect(page.locator("#ttft-chart svg[role=img]")).to_have_count(1)
        assert opened.is_clean(url)


def test_it_can_be_used_with_the_keyboard_alone(open_page: Open, fake: tuple[str, FakeBackend]) -> None:
    opened = open_page(fake[0])
    page = opened.page
    is_live(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "model"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.type("rev")
    for wanted in ("max-tokens", "prompt"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == wanted
    page.keyboard.type("abc")
    page.keyboard.press("Control+Enter")
    assert answer_of(page) == "cba"
    assert opened.is_clean(fake[0])


def test_a_focused_function_stays_focused_while_the_table_is_polled(
    open_page: Open, fake: tuple[str, FakeBackend]
) -> None:
    url, _ = fake
    page = open_page(url).page
    is_live(page)
    page.focus("#functions button:text-is('reverse')")
    page.evaluate(
        """url => fetch(url + "v1/chat/completions", {method: "POST", headers: {"content-type": "application/json"},
        body: JSON.stringify({model: "reverse", messages: [{role: "user", content: "x"}], max_tokens: 2})})""",
        f"{url}/",
    )
    expect(page.locator("#functions tbody tr").first).to_contain_text("reverse")  # asked most: it moved up
    assert page.evaluate("document.activeElement.textContent") == "reverse"
    page.keyboard.press("Enter")
    assert page.input_value("#model") == "reverse"
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_stream_can_be_aborted_and_errors_are_told(open_page: Open, fake: tuple[str, FakeBackend]) -> None:
    page = open_page(fake[0]).page
    is_live(page)
    page.select_option("#model", "slow")
    page.click("#send")
    expect(page.locator("#answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    page.wait_for_selector("#answer[data-state=aborted]")
    assert "aborted" in page.inner_text("#facts")
    assert page.is_enabled("#send") and page.is_disabled("#abort")
    assert page.evaluate("document.activeElement.id") == "send"  # where it was
    page.select_option("#model", "broken")
    page.click("#send")
    page.wait_for_selector("#answer[data-state=error]")
    assert "worker ended" in page.inner_text("#answer")
    page.select_option("#model", "busy")
    page.click("#send")
    expect(page.locator("#answer")).to_have_text("Too many requests are waiting.")


def test_names_are_text(open_page: Open, fake: tuple[str, FakeBackend]) -> None:
    url, backend = fake
    backend._add(HOSTILE, "upper", HOSTILE, tenant=HOSTILE)
    opened = open_page(url)
    page = opened.page
    is_live(page)
    expect(page.locator("#functions button", has_text="onerror")).to_have_text(HOSTILE)
    page.select_option("#model", HOSTILE)
    page.fill("#prompt", HOSTILE)
    page.fill("#max-tokens", "60")
    page.click("#send")
    assert answer_of(page) == HOSTILE.upper()
    assert page.title() == "serverlesslora"
    assert page.evaluate("document.querySelectorAll('img').length") == 1  # the icon
    assert opened.is_clean(url)


def test_a_key_is_asked_for_and_kept_in_the_tab_only(open_page: Open, tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.give("upper", "acme")
    store = KeyStore(tmp_path / KEYS_FILE)
    key = store.create(Grant(tenant="acme")).text
    ring = Keyring(store.path, look_every_s=0.005)
    ring.startup()
    try:
        with running(create_app(backend, keys=ring)) as url:
            page = open_page(url).page
            page.wait_for_selector("#key-panel:not([hidden])")
            assert page.is_hidden("#content")
            page.fill("#key", "sk-slora-wrong")
            page.press("#key", "Enter")
            expect(page.locator("#key-error")).to_have_text("This key is not valid (any more).")
            page.fill("#key", key)
            page.press("#key", "Enter")
            is_live(page)
            assert page.inner_text("#scope") == "tenant acme"
            expect(page.locator("#functions tbody tr")).to_have_count(1)
            assert page.is_hidden("#memory-panel")
            page.fill("#prompt", "hi")
            page.click("#send")
            assert answer_of(page) == "HI"
            assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
            assert key not in page.content() and key not in page.url
            page.click("#forget")
            page.wait_for_selector("#key-panel:not([hidden])")
            assert page.evaluate("sessionStorage.length") == 0
    finally:
        ring.shutdown()


def test_it_says_when_nobody_answers(open_page: Open) -> None:
    with running(create_app(FakeBackend())) as url:
        page = open_page(url).page
        is_live(page)
    page.wait_for_selector("#connection[data-state=lost]")
    assert page.inner_text("#connection").startswith("Connection lost, last heard")
    page.click("#send")
    expect(page.locator("#answer")).to_have_text("The connection to the server was lost.")


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_sticks_out(open_page: Open, fake: tuple[str, FakeBackend], width: int) -> None:
    url, backend = fake
    backend._add("a-name-" * 20, "upper", "x", tenant="tenant-" * 15)
    page = open_page(url, width).page
    is_live(page)
    expect(page.locator("#functions tbody tr")).not_to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert "No request in the last hour" in page.inner_text("#ttft-chart")  # and what to do
    assert page.evaluate("[...document.querySelectorAll('input, select, textarea')].every(each => each.labels.length)")
