"""Numbers and names as people read them, in HTML and Markdown alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from serverlesslora_loadgen.record import UNKNOWN, WARM
from serverlesslora_loadgen.result import Cost, Estimate, Group, Limits, Money, Objective, Result, max_lag_s
from serverlesslora_loadgen.units import show_seconds

MISSING = "–"
LATENCIES = {
    "ttft": "TTFT",
    "ttft_from_send": "TTFT from send",
    "ttst": "second token",
    "tpot": "TPOT",
    "itl": "gaps between tokens",
    "max_gap": "longest gap",
    "e2e": "E2E",
    "e2e_from_send": "E2E from send",
}


class Fragment(NamedTuple):
    text: str
    strong: bool = False


class Cell(NamedTuple):
    """A number with what it is worth: `between` is its 95 % interval, or why there is none."""

    value: str
    between: str
    n: int
    sort: float = 0.0


def visible(text: str) -> str:
    """Characters that cannot be seen, or that turn the order of others around, are written out.

    Names come from traces and servers; none may look like another, or like a part of the report.
    """
    shown = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return shown if shown.strip() else repr(shown)


def short(text: str, limit: int = 40) -> str:
    """Both ends of a long name: what differs is usually there."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"


def number(value: float) -> str:
    """Whole numbers with commas, others with three digits that matter."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """Never `100 %` of what is not all, nor `0 %` of what is not nothing."""
    rest = min(share, 1 - share)
    if rest <= 0:
        return f"{100 * share:.0f} %"
    digits = next((digits for digits in (1, 2, 3, 4) if rest >= 10 ** -(digits + 2)), 5)
    return f"{100 * share:.{digits}f} %"


def size(size_bytes: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def price(value: float | None, currency: str) -> str:
    if value is None:
        return MISSING
    digits = f"{value:,.2f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {sign(currency)}"


def sign(currency: str) -> str:
    return "$" if currency == "USD" else short(visible(currency), 12)


def between(estimate: Estimate, show: Callable[[float], str]) -> str:
    """`142–160 ms`: the unit is said once where both have the same. Empty: nobody knows."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = show(estimate.low), show(estimate.high)
    unit = low.rpartition(" ")[2]
    if unit and high.endswith(f" {unit}") and not unit[0].isdigit() and low.count(" ") == high.count(" ") == 1:
        low = low.removesuffix(f" {unit}")
    return f"{low}–{high}"


def cell(estimate: Estimate | None, show: Callable[[float], str] = show_seconds) -> Cell:
    if estimate is None or estimate.n == 0:
        return Cell(MISSING, "n = 0", 0)
    return Cell(show(estimate.value), between(estimate, show) or "n too small", estimate.n, estimate.value)


def percentile(of: Any, name: str, share: str) -> Estimate | None:
    """Of a Section or a Group; None when nothing was measured."""
    found = of.latency.get(name)
    return None if found is None or found.n == 0 else found.percentiles.get(share)


def plain(value: Any) -> str:
    """A setting of any type."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return " ".join(map(plain, value))
    return msgspec.json.encode(value, enc_hook=str).decode()


def found(objective: Objective) -> str:
    """In the unit that the objective was asked in."""
    if objective.found is None:
        return "nothing to judge by"
    if "%" in objective.text:
        return percent(objective.found)
    if re.search(r"[\d.]\s*(us|µs|ms|s|m|min|h)\b", objective.text):
        return show_seconds(objective.found)
    return number(objective.found)


def limits(of: Limits) -> str:
    """`TTFT ≤ 500 ms and TPOT ≤ 50 ms`; empty when there are none."""
    named = (("TTFT", of.ttft_s), ("TPOT", of.tpot_s), ("E2E", of.e2e_s))
    return " and ".join(f"{name} ≤ {show_seconds(limit)}" for name, limit in named if limit is not None)


def good(result: Result) -> str:
    """What it means to be good here."""
    has_limits = limits(result.setup.limits) or result.setup.trace.deadlines
    return "met the limits" if has_limits else "were answered (no limits were set)"


def cold_groups(result: Result) -> list[Group]:
    """The warm first, then from the least cold to the coldest, then what the server said nothing of."""

    def how_cold(group: Group) -> tuple[int, float]:
        median = percentile(group, "ttft", "p50")
        rank = 0 if group.key == WARM else 2 if group.key == UNKNOWN else 1
        return rank, float("inf") if median is None else median.value

    return sorted(result.whole.groups.get("cold", ()), key=how_cold)


def told_cost(money: Money | None) -> Cost | None:
    """The server's own books where there are any, else what was seen from outside."""
    return money.measured[0] if money is not None and money.measured else None


# --- the one line that says it all


def warnings(result: Result) -> list[tuple[str, str]]:
    """What has to be said louder than any number: a word, and its sentence."""
    said = []
    if not result.verdict.valid:
        why = "; ".join(result.verdict.reasons) or "the client did not keep its schedule"
        said.append(("INVALID", f"These numbers say nothing about the server: {visible(why)}."))
    if result.mode == "closed":
        said.append(
            (
                "CLOSED LOOP",
                "Requests waited for answers to those before them, so a slow server was asked less often. "
                "Latencies are no prediction for people who come when they like.",
            )
        )
    if result.mode == "sweep":
        said.append(
            (
                "SWEEP",
                "The trace was replayed at several speeds. All but the knee is of one of them, the last at its best.",
            )
        )
    return said


def sentence(result: Result) -> list[Fragment]:
    """Validity, size, attainment, cold starts, correctness, money."""
    whole, facts = result.whole, result.setup.trace
    verdict = "INVALID." if not result.verdict.valid else "VALID." if result.verdict.passed else "VALID, NOT PASSED."
    loops = {"open": "", "closed": "CLOSED LOOP. ", "sweep": "SWEEP. "}[result.mode]
    said = [
        Fragment(loops + verdict, strong=True),
        Fragment(
            f" {counted(whole.counts.sent, 'request')}, {counted(facts.adapters, 'adapter')}, "
            f"{show_seconds(whole.seconds)} at ×{facts.speedup:g}. "
        ),
    ]
    if whole.counts.sent:
        own = "the deadlines of their own" if facts.deadlines else ""
        asked = " and ".join(filter(None, (limits(result.setup.limits), own)))
        met = cell(whole.attainment, percent)
        said += [
            Fragment(met.value, strong=True),
            Fragment(f" ({met.between}) {f'met {asked}' if asked else 'were answered; no limits were set'}. "),
            *_cold(result),
            *_correct(result),
        ]
    cost = told_cost(result.money)
    if cost is not None and result.money is not None and cost.per_1k_requests is not None:
        said += [Fragment(f" {price(cost.per_1k_requests, result.money.currency)} / 1k requests", strong=True)]
        said += [Fragment(f"; idle {percent(cost.idle_share)}." if cost.idle_share is not None else ".")]
        if result.money.prices.get("illustrative"):
            said += [Fragment(" Prices are illustrative.")]
    return said


def _cold(result: Result) -> list[Fragment]:
    found = cold_groups(result)
    warm = next((percentile(group, "ttft", "p50") for group in found if group.key == WARM), None)
    colds = [group for group in found if group.key not in (WARM, UNKNOWN)]
    if not colds:
        return [Fragment("None was cold. " if warm is not None else "The server did not say which were cold. ")]
    said = []
    for group in colds:
        share = Fragment(percent(group.counts.sent / result.whole.counts.sent), strong=True)
        median = percentile(group, "ttft", "p50")
        cost = "no answer" if median is None else f"p50 {show_seconds(median.value)}"
        if median is not None and warm is not None:
            more = median.value - warm.value
            cost = f"p50 {'+' if more >= 0 else '−'}{show_seconds(abs(more))}"
        said += [share, Fragment(f" met {short(visible(group.key))} cold ({cost}, n {group.counts.sent:,}), ")]
    return [*said[:-1], Fragment(said[-1].text.removesuffix(", ") + ". ")]


def _correct(result: Result) -> list[Fragment]:
    counts = result.whole.counts
    wrong = sum(counts.failures.get(name, 0) for name in ("wrong-answer", "wrong-model"))
    held = result.setup.verified_requests
    checked = f"{wrong:,} wrong answers" if result.setup.verified or wrong else "Answers were not checked"
    return [
        Fragment(checked, strong=bool(wrong)),
        Fragment(f" ({held:,} of {counts.sent:,} checked), " if held else ", "),
        Fragment(f"{counts.failed:,} failed", strong=bool(counts.failed)),
        Fragment(f", {counts.shed:,} shed, "),
        Fragment(f"{counts.unsent:,} not sent.", strong=bool(counts.unsent)),
    ]


def allowed_lag_s(of: Result) -> float:
    """Of the 99th percentile, for a run to be valid."""
    median = percentile(of.whole, "ttft", "p50")
    return max_lag_s(median.value if median else None)
