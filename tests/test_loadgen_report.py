"""Reports of the load generator: what they say, that they say it of any result, and that they trust no name."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

pytest.importorskip("plotly")

from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.record import WARM
from serverlesslora_loadgen.report import tables, words
from serverlesslora_loadgen.report.figures import FIGURES
from serverlesslora_loadgen.report.html import CONTENTS, render, write_report
from serverlesslora_loadgen.report.markdown import code, summary, text, write_summary
from serverlesslora_loadgen.report.palette import LIGHT, TO_DARK
from serverlesslora_loadgen.result import Estimate, Heat, Histogram, KneePoint, Limits, Result, SlowRequest
from tests import loadgen_samples as samples

variants = pytest.mark.parametrize("name", samples.VARIANTS)
VOID = {"meta", "br", "img", "input", "link"}


class Page(HTMLParser):
    """Elements with their attributes and texts, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = [""]  # after what comes before any element
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts[-1] += data

    def ids(self, tag: str) -> list[str]:
        return [attributes["id"] for name, attributes in self.elements if name == tag and "id" in attributes]

    def text_of(self, tag: str) -> str:
        """Of the first such element, without its children's tags."""
        begin = next(at for at, (name, _) in enumerate(self.elements) if name == tag)
        return "".join(self.texts[begin + 1 :])


@functools.cache
def made(name: str) -> Result:
    return samples.VARIANTS[name]()


@functools.cache
def page_of(name: str) -> Page:
    return Page(render(made(name)))


def figures_of(page: Page) -> dict[str, Any]:
    return dict(json.loads(page.scripts[0]))


def strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    match value:
        case dict():
            for name, item in value.items():
                yield from strings(item, str(name))
        case list() | tuple():
            for item in value:
                yield from strings(item, key)
        case str():
            yield key, value


def plain(name: str, result: Result) -> dict[str, Any]:
    figure = FIGURES[name](result)
    assert figure is not None
    return dict(json.loads(figure.to_json()))


# --- the sentence


def said(result: Result) -> str:
    return "".join(fragment.text for fragment in words.sentence(result))


def test_the_sentence_says_it_all() -> None:
    result = samples.passed()
    met, cost = words.percent(result.whole.attainment.value), words.told_cost(result.money)
    assert cost is not None and cost.per_1k_requests is not None
    cold = {group.key: group for group in result.whole.groups["cold"]}
    more = cold["adapter-load"].latency["ttft"].percentiles["p50"].value - (
        cold[WARM].latency["ttft"].percentiles["p50"].value
    )
    assert said(result).startswith("VALID. 3,813 requests, 24 adapters, 1 h 00 min at ×1. " + met)
    for part in (
        "met TTFT ≤ 500 ms and TPOT ≤ 50 ms. ",
        f"4.3 % met adapter-load cold (p50 +{1000 * more:.0f} ms, n 163), ",
        f"0 wrong answers, {result.whole.counts.failed} failed, {result.whole.counts.shed} shed, 0 not sent. ",
        f"{cost.per_1k_requests:.3g} $ / 1k requests; idle 63.0 %. Prices are illustrative.",
    ):
        assert part in said(result)


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (samples.full, "VALID, NOT PASSED. "),
        (samples.invalid, "INVALID. "),
        (samples.closed, "CLOSED LOOP. VALID, NOT PASSED. "),
        (samples.swept, "SWEEP. VALID, NOT PASSED. "),
        (samples.nothing, "INVALID. 0 requests, 0 adapters, "),
    ],
)
def test_what_a_run_is_worth_comes_first(make: Any, first: str) -> None:
    assert said(make()).startswith(first)
    assert summary(make()).startswith(f"**{first.split('. ')[0]}")


def test_what_nobody_checked_is_not_called_right() -> None:
    assert "Answers were not checked" in said(samples.without_money())
    result = samples.full()
    counts = replace(result.whole.counts, failures={"wrong-answer": 2, "wrong-model": 1, "stall": 4})
    wrong = replace(result, whole=replace(result.whole, counts=counts))
    assert words.Fragment("3 wrong answers", strong=True) in words.sentence(wrong)


def test_how_many_answers_were_checked_is_said() -> None:
    result = samples.full()
    some = replace(result, setup=replace(result.setup, verified=True, verified_requests=12))
    assert f"0 wrong answers (12 of {result.whole.counts.sent:,} checked), " in said(some)


def test_good_is_what_the_limits_or_the_deadlines_say() -> None:
    result = samples.full()
    without = replace(result, setup=replace(result.setup, limits=Limits()))
    assert "were answered; no limits were set. " in said(without) and " met TTFT" not in said(without)
    trace = replace(result.setup.trace, deadlines=3)
    dated = replace(without, setup=replace(without.setup, trace=trace))
    assert "met the deadlines of their own. " in said(dated) and "no limits" not in said(dated)
    both = replace(result, setup=replace(result.setup, trace=trace))
    assert "met TTFT ≤ 500 ms and TPOT ≤ 50 ms and the deadlines of their own. " in said(both)


def test_a_server_that_says_nothing_of_cold_starts() -> None:
    result = samples.full()
    silent = [replace(group, key="unknown") for group in result.whole.groups["cold"][:1]]
    whole = replace(result.whole, groups={**result.whole.groups, "cold": silent})
    assert "did not say which were cold" in said(replace(result, whole=whole))


# --- the page


@variants
def test_eleven_items_in_order_behind_the_sentence(name: str) -> None:
    result, page = made(name), page_of(name)
    assert page.ids("section") == list(CONTENTS) and len(CONTENTS) == 11
    body = [tag for tag, _ in page.elements]
    assert body[body.index("header") + 1] == "h1"
    assert page.text_of("h1").startswith(words.visible(said(result)))
    for word in ("INVALID", "CLOSED LOOP", "SWEEP"):
        is_loud = word in said(result)
        assert (word in page.text_of("title").split("<")[0]) == is_loud
    assert page.open == []


@variants
def test_every_figure_has_its_place(name: str) -> None:
    page = page_of(name)
    drawn = figures_of(page)["figures"]
    assert list(drawn) == [figure for figure, draw in FIGURES.items() if draw(made(name)) is not None]
    assert [place.removeprefix("figure-") for place in page.ids("div")] == list(drawn)


def test_what_is_drawn_of_what() -> None:
    def names(result: Result) -> list[str]:
        return [name for name, draw in FIGURES.items() if draw(result) is not None]

    assert names(samples.swept()) == list(FIGURES)
    assert names(samples.full()) == [name for name in FIGURES if name != "knee"]
    assert names(samples.without_money()) == [name for name in FIGURES if name not in ("knee", "cost")]
    assert names(samples.nothing()) == []


@variants
def test_nothing_comes_from_elsewhere(name: str) -> None:
    for tag, attributes in page_of(name).elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert attributes.keys().isdisjoint({"src", "srcset", "action", "data"})
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"@import|url\(", page_of(name).text_of("style").partition("Skip to")[0])


def test_only_the_two_scripts_of_the_page_may_run() -> None:
    page = page_of("hostile")
    kinds = [attributes.get("type") for name, attributes in page.elements if name == "script"]
    assert kinds == ["application/json", None, None]
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert re.findall("'sha256-(.*?)'", policy) == hashes
    assert policy.startswith("default-src 'none';") and "unsafe-eval" not in policy


def test_a_page_is_little_more_than_plotly() -> None:
    from plotly.offline import get_plotlyjs

    assert len(render(samples.swept()).encode()) - len(get_plotlyjs().encode()) < 160_000


# --- names from traces and servers


def test_names_are_only_ever_text() -> None:
    harmless, attacked = page_of("full"), page_of("hostile")
    tags = {name for name, _ in harmless.elements}
    assert {name for name, _ in attacked.elements} <= tags
    for _, attributes in attacked.elements:
        assert not any(name.startswith("on") for name in attributes)
    told = "\n".join(attacked.texts)
    for name in samples.HOSTILE:
        assert words.short(words.visible(name), 60) in told
    assert not any(ord(char) < 32 and char not in "\n\t" for char in told)
    assert "\u202e" not in told and "\u200b" not in told


def test_plotly_is_given_no_markup_and_no_template_of_others() -> None:
    page = page_of("hostile")
    raw = page.scripts[0]
    assert not set("<>&\u2028\u2029") & set(raw)
    ours = re.compile(r"</?b>|<extra></extra>|&(lt|gt|amp);|&#(36|37);")
    for key, value in strings(figures_of(page)["figures"]):
        left = ours.sub("", value)
        assert not set("<>&") & set(left), value
        if key == "hovertemplate":
            assert set(re.findall(r"%\{(\w+)", left)) <= {"x", "y", "customdata"}, value
        else:
            assert "%{" not in value and "$" not in left.replace(" $", ""), value


def test_names_that_look_like_dates_and_colours_stay_names() -> None:
    layout = plain("heat", made("hostile"))["layout"]
    assert layout["yaxis"]["tickvals"] == list(range(24))
    assert {"2024-01-01", "1e3", LIGHT["warm"]} <= set(layout["yaxis"]["ticktext"])


@given(st.text())
def test_a_visible_name_hides_nothing(name: str) -> None:
    shown = words.visible(name)
    assert shown.strip() and shown.isprintable()
    assert words.visible(shown) == shown
    assert len(words.short(shown)) <= 40


@given(st.text(alphabet="ab`|\\\n <@", max_size=30))
def test_no_name_leaves_its_code_span(name: str) -> None:
    """A span ends at the first run of backticks as long as the one it began with (CommonMark 6.1)."""
    span = code(name)
    fence = re.match("`+", span)
    assert fence is not None
    inner = span[len(fence[0]) : -len(fence[0])]
    assert len(fence[0]) not in {len(run) for run in re.findall("`+", inner)}
    assert not inner.startswith("`") and not inner.endswith("`")
    assert "\n" not in span
    assert all(inner[at.start() - 1] == "\\" for at in re.finditer(r"\|", inner))


@given(st.text(alphabet="ab\\`*_[](){}<>|@#:/ \n", max_size=40))
def test_text_of_others_is_no_markdown(said: str) -> None:
    shown = text(said)
    for at in re.finditer(r"[`*_\[\]<>|]", shown):
        before = shown[: at.start()]
        assert (len(before) - len(before.rstrip("\\"))) % 2 == 1
    assert "\n" not in shown and "://" not in shown and not re.search("[@#](?!\u2060)", shown)


def test_a_summary_has_no_markup_of_others() -> None:
    lines = summary(made("hostile")).split("\n")
    outside = re.sub(r"```sh\n.*?\n```", "", "\n".join(lines), flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside))
    rows = [line for line in lines if line.startswith("|")]
    heads = [at for at, row in enumerate(rows) if row.startswith("| ---")]
    for begin, end in pairwise([*(at - 1 for at in heads), len(rows)]):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows[begin:end]}) == 1


def test_a_summary_has_the_whole_of_the_lag_and_of_the_money() -> None:
    said = summary(made("full"))
    (client,) = (line for line in said.split("\n") if line.startswith("Client: "))
    assert [name for name in re.findall(r"\b(p50|p99|max) \d", client)] == ["p50", "p99", "max"]
    assert "if the calibration is of this client (CPU: not told" in client
    head, _, *rows = (line for line in said[said.index("| cost |") :].split("\n") if line.startswith("|"))
    assert head.endswith("| 1 / (E2E × cost) |")
    costs = samples.money()
    for row, cost in zip(rows[:4], (*costs.measured, *costs.baselines), strict=True):
        assert cost.effectiveness is not None and row.endswith(f"| {words.number(cost.effectiveness)} |")
    assert "Idle: of what was measured" in said


def test_a_summary_says_that_there_were_no_limits() -> None:
    result = made("full")
    assert "met the limits" in summary(result) and "no limits" not in summary(result)
    free = replace(result, setup=replace(result.setup, limits=Limits()))
    assert "met the limits" not in summary(free) and "were answered (no limits were set)" in summary(free)


# --- what figures show


def test_what_was_served_is_all_there() -> None:
    result = samples.full()
    data = {trace.get("name"): trace for trace in plain("timeline", result)["data"]}
    every_s = data["served"]["dx"] * 60
    for name, counts in (
        ("served", result.timeline.done),
        ("shed", result.timeline.shed),
        ("failed", result.timeline.failed),
        ("offered", result.timeline.offered),
    ):
        assert sum(data[name]["y"][:-1]) * every_s == pytest.approx(sum(counts), rel=1e-3)
        assert len(data[name]["y"]) <= 402
    ticks = [trace for trace in plain("timeline", result)["data"] if trace.get("yaxis") == "y2"]
    found = {kind: sum(counts) for kind, counts in result.timeline.cold.items() if kind != WARM}
    assert [sum(tick["customdata"]) for tick in ticks] == [found[group.key] for group in words.cold_groups(result)[1:4]]


def test_curves_have_their_n_and_go_from_0_to_100() -> None:
    result = samples.full()
    traces = plain("ttft", result)["data"]
    groups = words.cold_groups(result)
    assert [trace["name"] for trace in traces] == [
        f"{group.key}, n = {group.latency['ttft'].n:,}" for group in groups if group.latency["ttft"].n
    ]
    for trace in traces:
        assert len(trace["x"]) == 101 and trace["y0"] == 0 and trace["dy"] == pytest.approx(0.01)
        assert trace["x"] == sorted(trace["x"])
    assert len({trace["line"]["color"] for trace in traces}) == len(traces)


def test_heat_turns_at_the_limit() -> None:
    base = samples.full()
    result = replace(base, heat=Heat(adapters=["a", "b"], step_s=60.0, ttft_s=[[0.05, 0.5, None], [5.0, 0.25, 50.0]]))
    figure = plain("heat", result)["data"][0]
    assert figure["z"] == [[-1.0, 0.0, None], [1.0, pytest.approx(-0.3), 2.0]]
    assert figure["customdata"] == result.heat.ttft_s
    assert figure["zmin"] == -1 and figure["zmax"] == 1
    assert dict(figure["colorscale"])[0.5] == LIGHT["heat-3"]


def test_attainment_shows_its_doubts() -> None:
    group = samples.full().whole.groups["decile"][0]
    unsure = replace(group, attainment=Estimate(0.5, 4))
    sure = replace(group, attainment=Estimate(0.9, 400, 0.85, 0.93))
    base = samples.full()
    result = replace(base, whole=replace(base.whole, groups={"decile": [sure, unsure]}))
    dots = plain("attainment", result)["data"][0]
    assert dots["y"] == [0.9, 0.5]
    assert dots["marker"]["symbol"] == ["circle", "circle-open"]
    assert dots["error_y"]["array"] == [pytest.approx(0.03), 0] and dots["error_y"]["arrayminus"][0] == pytest.approx(
        0.05
    )
    assert [n for _, n in dots["customdata"]] == [400, 4]


def test_costs_add_up() -> None:
    money = samples.full().money
    assert money is not None
    bars = [trace for trace in plain("cost", samples.full())["data"] if trace["type"] == "bar"]
    costs = [*money.measured, *money.baselines]
    for row, cost in enumerate(costs):
        assert sum(bar["x"][row] for bar in bars[0::2]) == pytest.approx(1, rel=1e-3)
        assert sum(bar["x"][row] for bar in bars[1::2]) == pytest.approx(cost.total, rel=1e-3)


def test_a_knee_marks_what_the_client_could_not_do() -> None:
    def point(rate: float, valid: bool) -> KneePoint:
        met = Estimate(0.9, 100, 0.8, 0.95)
        return KneePoint(
            rate_rps=rate, speedup=1, attainment=met, ttft_p50_s=0.1, ttft_p99_s=None, goodput_rps=1, valid=valid
        )

    trace = plain("knee", replace(samples.swept(), knee=[point(9, False), point(3, True)]))["data"][0]
    assert trace["x"] == [3, 9]
    assert trace["marker"]["symbol"][0] != trace["marker"]["symbol"][1]


def test_lag_beyond_what_is_allowed_is_red() -> None:
    base = samples.full()
    bins = Histogram([0.0, 0.005, 0.01, 0.02, 0.5], [90, 5, 4, 1])
    bars = plain("lag", replace(base, client=replace(base.client, lag_histogram=bins)))["data"][0]
    assert words.allowed_lag_s(base) == 0.01
    assert bars["y"] == [90, 5, 4, 1]
    assert bars["marker"]["color"] == [LIGHT["served"]] * 2 + [LIGHT["failed"]] * 2


@pytest.mark.parametrize("name", FIGURES)
def test_what_must_not_be_overlooked_is_in_every_figure(name: str) -> None:
    both = replace(samples.invalid(), mode="closed", knee=samples.knee())
    texts = [value for key, value in strings(plain(name, both)["layout"]) if key == "text"]
    assert "INVALID · CLOSED LOOP" in texts
    assert not any("INVALID" in value for _, value in strings(plain(name, samples.swept())))


@pytest.mark.parametrize("name", FIGURES)
def test_every_colour_has_its_twin_for_the_dark(name: str) -> None:
    figure = plain(name, samples.swept())
    del figure["layout"]["template"]
    colours = {value for key, value in strings(figure) if re.search("color", key, re.IGNORECASE)}
    assert colours and colours <= set(TO_DARK)
    assert len(TO_DARK) == len(LIGHT) and not set(TO_DARK) & set(TO_DARK.values())


# --- tables


def test_the_story_of_a_slow_request() -> None:
    slow = SlowRequest(
        id=7,
        model="a",
        request_id="r",
        cold="worker",
        cold_ms={"worker": 400.0, "adapter": 100.0},
        stamps={
            "intended": 10.0,
            "written": 10.1,
            "first_byte": 10.9,
            "first_token": 11.0,
            "last_token": 12.0,
            "done": 12.0,
        },
        ttft_s=1.0,
        e2e_s=2.0,
        output_tokens=3,
    )
    lost = replace(slow, ttft_s=None, e2e_s=None, cold_ms={}, stamps={"intended": 0.0, "written": 0.0, "done": 1.0})
    told, unanswered = tables.stories([slow, lost])
    assert told.offsets == pytest.approx([0.1, 0.9, 1.0, 2.0, 2.0])
    assert told.pieces == [("lag", 0, 50), ("cold", 50, 250), ("wait", 300, 200), ("decode", 500, 500)]
    assert unanswered.pieces == [("wait", 0, 500)]
    assert unanswered.offsets == [0.0, None, None, None, 1.0]


@variants
def test_stories_stay_within_their_bars(name: str) -> None:
    for story in tables.stories(made(name).slowest):
        for first, second in pairwise(story.pieces):
            assert first.x + first.width == second.x
        assert sum(piece.width for piece in story.pieces) <= 1000


def test_every_number_says_what_it_is_worth() -> None:
    assert words.cell(Estimate(0.151, 900, 0.142, 0.16))[:3] == ("151 ms", "142–160 ms", 900)
    assert words.cell(Estimate(0.9, 900, 0.5, 2.0)).between == "500 ms–2 s"
    assert words.cell(Estimate(0.9, 3)).between == "n too small"
    assert words.cell(None)[:2] == ("–", "n = 0")
    for tile in tables.tiles(samples.full())[:6]:
        assert "n = " in tile.note and "–" in tile.note


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_percent_is_never_more_than_true(part: int, whole: int) -> None:
    part = min(part, whole)
    shown = words.percent(part / whole)
    assert (shown == "100 %") == (part == whole) and (shown == "0 %") == (part == 0)
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * part / whole, abs=0.05)
    assert 0 < float(shown.removesuffix(" %")) < 100 or part in (0, whole)


def test_a_command_can_be_pasted() -> None:
    result = samples.full()
    page = page_of("full")
    assert shlex.join(result.setup.command) in page.text_of("pre")
    assert f"```sh\n{shlex.join(result.setup.command)}\n```" in summary(result)


# --- files


def test_files_are_written_and_said_when_not(tmp_path: Path) -> None:
    write_report(samples.nothing(), tmp_path / "report.html")
    write_summary(samples.nothing(), tmp_path / "summary.md")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == summary(samples.nothing())
    for write in (write_report, write_summary):
        with pytest.raises(LoadgenError, match="nowhere"):
            write(samples.nothing(), tmp_path / "nowhere" / "report")


def test_without_plotly_there_is_a_summary_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(LoadgenError, match=r"pip install 'serverlesslora\[loadgen\]'"):
        render(samples.nothing())
    assert summary(samples.nothing())


def test_plotly_is_loaded_only_to_draw() -> None:
    modules = "serverlesslora_loadgen.report.html, serverlesslora_loadgen.report.markdown"
    check = f"import sys, {modules}; sys.exit(any(name.split('.')[0] in ('plotly', 'numpy') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
