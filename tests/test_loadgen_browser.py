"""Reports in a real browser: every figure is drawn, nothing is asked for elsewhere, no name does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

pytest.importorskip("plotly")
pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, sync_playwright

from serverlesslora_loadgen.report import words
from serverlesslora_loadgen.report.figures import FIGURES
from serverlesslora_loadgen.report.html import CONTENTS, write_report
from serverlesslora_loadgen.report.palette import LIGHT, TO_DARK
from tests import loadgen_samples as samples

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")

Scheme = Literal["light", "dark"]
DRAWN = "[data-drawn={}]"
# Something of the data has been drawn: lines, bars, points or cells that have a size.
SHAPES = """place => [...place.querySelectorAll(".cartesianlayer :is(.trace, .hm) :is(path, image, text)")]
    .filter(shape => { const box = shape.getBoundingClientRect(); return box.width + box.height > 1 }).length"""


class Opened(NamedTuple):
    page: Page
    said: list[str]  # on the console, and errors
    asked: list[str]  # URLs


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("reports")

    def file(name: str) -> Path:
        path = folder / f"{name}.html"
        if not path.exists():
            write_report(samples.VARIANTS[name](), path)
        return path

    return file


@pytest.fixture
def open_report(browser: Browser, files: Callable[[str], Path]) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_it(name: str, scheme: Scheme = "light", width: int = 1280) -> Opened:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        opened = Opened(context.new_page(), [], [])
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(files(name).as_uri())
        opened.page.wait_for_selector(DRAWN.format(scheme))
        return opened

    yield open_it
    for context in contexts:
        context.close()


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def brightness(colour: str) -> float:
    """Of `rgb(…)`, 0 to 255."""
    red, green, blue = (float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.3 * red + 0.6 * green + 0.1 * blue


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_nothing_is_fetched(open_report: Callable[..., Opened], scheme: Scheme) -> None:
    page, said, asked = open_report("swept", scheme)
    for name in FIGURES:
        place = page.locator(f"#figure-{name}")
        assert place.evaluate(SHAPES) > 0, name
        box = place.bounding_box()
        assert box is not None and box["width"] > 600 and box["height"] > 150
    assert said == []
    assert asked == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert (brightness(background(page)) > 128) == (scheme == "light")
    line = page.locator("#figure-timeline .xy path.js-line").last.evaluate("line => getComputedStyle(line).stroke")
    assert line == rgb(LIGHT["ink"] if scheme == "light" else TO_DARK[LIGHT["ink"]])


def test_the_first_line_is_the_sentence(open_report: Callable[..., Opened]) -> None:
    page = open_report("invalid").page
    sentence = "".join(fragment.text for fragment in words.sentence(samples.invalid()))
    assert page.locator("h1").inner_text() == sentence.strip()
    assert page.locator("body").inner_text().strip().startswith(("INVALID.", "Skip to the figures\nINVALID."))
    assert page.get_by_role("alert").inner_text().startswith("INVALID")
    for name in FIGURES:
        if name != "knee":
            assert page.locator(f"#figure-{name} .annotation").get_by_text("INVALID", exact=True).count() == 1


@pytest.mark.parametrize("name", ["nothing", "one_request"])
def test_there_is_a_page_of_nearly_nothing(open_report: Callable[..., Opened], name: str) -> None:
    page, said, _ = open_report(name, width=390)
    assert said == []
    assert page.locator("section").count() == len(CONTENTS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_names_do_nothing_and_are_shown_letter_by_letter(open_report: Callable[..., Opened]) -> None:
    page, said, asked = open_report("hostile", "dark")
    assert page.locator("img, section a, .plot a").count() == 0
    labels = page.locator("#figure-heat .ytick text").all_text_contents()
    assert [label.strip() for label in labels] == [
        words.short(words.visible(name)).strip() for name in samples.hostile().heat.adapters
    ]
    legend = " ".join(page.locator("#figure-ttft .legendtext").all_text_contents())
    assert samples.HOSTILE[0] in legend and samples.HOSTILE[7] in legend
    page.locator("#heat summary").click()
    assert samples.HOSTILE[1] in page.locator("#heat table").inner_text()
    page.evaluate("""() => {
        const place = document.getElementById("figure-ttft");
        const curve = place.data.findIndex(trace => trace.name.includes("7 * 7"));
        Plotly.Fx.hover(place, [{curveNumber: curve, pointNumber: 50}]);
    }""")
    hover = page.locator("#figure-ttft .hoverlayer").text_content()
    assert hover is not None and f"{samples.HOSTILE[7]}: 50% within" in hover
    assert page.evaluate("window.pwned") is None
    assert said == [] and asked == [page.url]


def test_it_works_by_keyboard(open_report: Callable[..., Opened]) -> None:
    page, said, _ = open_report("full")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector(DRAWN.format("dark"))
    assert brightness(background(page)) < 128
    page.keyboard.press("Space")
    page.wait_for_selector(DRAWN.format("light"))
    reached = []
    for _ in CONTENTS:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('href')"))
    assert reached == [f"#{name}" for name in CONTENTS]
    page.keyboard.press("Enter")
    page.wait_for_url("**#setup")

    page.locator("#heat summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#heat details[open]")
    shares = page.locator("#heat").get_by_role("button", name="sent", exact=True)
    column = page.locator("#heat tbody tr td:nth-child(2)")
    shares.press("Enter")
    shares.press("Enter")
    counts = [int(text.replace(",", "")) for text in column.all_inner_texts()]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert page.locator("#heat th[aria-sort=ascending]").count() == 1
    assert said == []


def test_a_printed_report_is_white_and_whole(open_report: Callable[..., Opened]) -> None:
    page, said, _ = open_report("full", "dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_selector(DRAWN.format("print"))
    widths = page.locator(".plot .main-svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().width)")
    assert widths and max(widths) <= 700
    assert brightness(background(page)) == 255
    assert page.locator("details:not([open])").count() == 0
    assert page.locator("nav").is_hidden()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_selector(DRAWN.format("dark"))
    assert page.locator("details[open]").count() == 0
    assert said == []
