"""The figures of a report: each takes a result, and gives None when there is nothing to draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from serverlesslora_loadgen.report import words
from serverlesslora_loadgen.report.drawing import (
    PERCENT,
    blank,
    curves,
    dots,
    label,
    limit_line,
    log_seconds,
    marked,
    rounded,
    seen,
    whiskers,
)
from serverlesslora_loadgen.report.palette import LIGHT, part_colour
from serverlesslora_loadgen.report.timeline import heat, timeline
from serverlesslora_loadgen.result import Result
from serverlesslora_loadgen.units import show_seconds


def ttft(result: Result) -> Figure | None:
    """Distribution of the time to first token, a curve for each kind of cold start."""
    if not seen(result, "ttft"):
        return None
    figure = blank(330)
    curves(figure, result, "ttft", legend=True)
    limit_line(figure, result.setup.limits.ttft_s)
    title = "time to first token, from the intended time"
    limit_s = result.setup.limits.ttft_s
    figure.update_xaxes(title=title, **log_seconds([limit_s, *seen(result, "ttft")]))
    figure.update_yaxes(title="of the answered", range=[0, 1.01], **PERCENT)
    return marked(figure, result)


def latency(result: Result) -> Figure | None:
    """Distributions of the whole answer, and of the waits between tokens."""
    if not (seen(result, "e2e") or seen(result, "gap")):
        return None
    figure = blank(320, make_subplots(rows=1, cols=2, horizontal_spacing=0.05, shared_yaxes=True))
    curves(figure, result, "e2e", legend=True, row=1, col=1)
    curves(figure, result, "gap", legend=False, row=1, col=2)
    limit_line(figure, result.setup.limits.e2e_s, row=1, col=1)
    limit_line(figure, result.setup.limits.tpot_s, row=1, col=2)
    limits = result.setup.limits
    e2e, gap = log_seconds([limits.e2e_s, *seen(result, "e2e")]), log_seconds([limits.tpot_s, *seen(result, "gap")])
    figure.update_xaxes(title="end to end, until the last token", row=1, col=1, **e2e)
    figure.update_xaxes(title="gap between two events with tokens", row=1, col=2, **gap)
    figure.update_yaxes(range=[0, 1.01], **PERCENT)
    figure.update_yaxes(title="of the answered", row=1, col=1)
    return marked(figure, result)


def attainment(result: Result) -> Figure | None:
    """Share of good requests, and time to first token, by popularity, class and time."""
    titles = {
        "decile": "decile of popularity, 1 the most asked",
        "class": "class of the adapter",
        "slice": "slice of time",
    }
    panels = [(title, result.whole.groups[key]) for key, title in titles.items() if result.whole.groups.get(key)]
    if not panels:
        return None
    figure = blank(
        400,
        make_subplots(
            rows=2,
            cols=len(panels),
            shared_xaxes=True,
            shared_yaxes="rows",
            horizontal_spacing=0.025,
            vertical_spacing=0.08,
            column_widths=[max(5, len(members)) for _, members in panels],
        ),
    )
    for col, (title, members) in enumerate(panels, 1):
        keys = [label(group.key, 14) for group in members]
        met = [group.attainment if group.attainment.n else None for group in members]
        colour = LIGHT["ink"]
        dots(figure, words.good(result), met, keys, colour=colour, show="%{y:.1%}", showlegend=False, row=1, col=col)
        for name, share, colour in (("TTFT p50", "p50", LIGHT["warm"]), ("TTFT p99", "p99", LIGHT["cold-2"])):
            found = [words.percentile(group, "ttft", share) for group in members]
            dots(figure, name, found, keys, colour=colour, show="%{y:.3s}s", showlegend=col == 1, row=2, col=col)
        figure.update_xaxes(range=[-0.6, len(keys) - 0.4], showgrid=False, col=col)
        every = 1 + len(keys) // 13 if len(keys) < 10 or len(keys[-1]) < 4 else 3
        named = {"tickvals": list(range(0, len(keys), every)), "ticktext": keys[::every], "tickangle": 0}
        figure.update_xaxes(title=title, row=2, col=col, **named)
    every_one = [group for _, members in panels for group in members]
    shares = [group.attainment for group in every_one if group.attainment.n]
    lowest = min((share.value if share.low is None else share.low for share in shares), default=0.0)
    floor = math.floor(20 * lowest - 0.01) / 20  # a step of 5 % below what is drawn
    figure.update_yaxes(range=[max(-0.03, floor), 1 + 0.04 * (1 - floor)], row=1, **PERCENT)
    times = [words.percentile(group, "ttft", share) for group in every_one for share in ("p50", "p99")]
    ends = [end for time in times if time is not None for end in (time.value, time.low, time.high)]
    figure.update_yaxes(row=2, **log_seconds(ends))
    figure.update_yaxes(title=words.good(result), row=1, col=1)
    figure.update_yaxes(title="TTFT", row=2, col=1)
    return marked(figure, result)


def cost(result: Result) -> Figure | None:
    """What was paid for, and the same for the baselines: the split of each beside its size."""
    money = result.money
    costs = [] if money is None else [*money.measured, *money.baselines]
    if money is None or not any(one.parts for one in costs):
        return None
    figure = blank(
        92 + 42 * len(costs),
        make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.045, column_widths=[0.4, 0.6]),
        barmode="stack",
        bargap=0.34,
    )
    rows, currency = list(range(len(costs))), label(words.sign(money.currency))
    for name in dict.fromkeys(part.name for one in costs for part in one.parts):
        paid = [sum(part.amount for part in one.parts if part.name == name) for one in costs]
        share = [amount / one.total if one.total else 0.0 for amount, one in zip(paid, costs, strict=True)]
        shape = "/" if name == "idle" else ""
        marker = {"color": part_colour(name), "pattern": {"shape": shape, "size": 6, "solidity": 0.3}}
        for col, amounts, show in ((1, share, "%{x:.1%}"), (2, paid, f"%{{x:.3~g}} {currency}")):
            figure.add_bar(
                x=[rounded(amount) for amount in amounts],
                y=rows,
                orientation="h",
                marker=marker,
                name=label(name),
                legendgroup=label(name),
                showlegend=col == 1,
                hovertemplate=f"{label(name)} {show}<extra></extra>",
                row=1,
                col=col,
            )
    own, most = costs[0].total, max(one.total for one in costs)
    totals = [f" <b>{label(words.price(one.total, money.currency))}</b>" for one in costs]
    figure.add_scatter(
        x=[rounded(one.total) for one in costs],
        y=rows,
        mode="text",
        textposition="middle right",
        text=[
            f"{total} · {one.total / own:.3g}×" if row and own > 0 else total
            for row, (one, total) in enumerate(zip(costs, totals, strict=True))
        ],
        cliponaxis=False,
        showlegend=False,
        hoverinfo="skip",
        row=1,
        col=2,
    )
    figure.update_xaxes(title="what it was paid for", range=[0, 1], row=1, col=1, **PERCENT)
    figure.update_xaxes(title=f"{currency} for the whole run", range=[0, 1.2 * most or 1], row=1, col=2)
    names = [label(one.name) for one in costs]
    figure.update_yaxes(tickvals=rows, ticktext=names, showgrid=False, range=[len(rows) - 0.5, -0.5], fixedrange=True)
    return marked(figure, result)


def knee(result: Result) -> Figure | None:
    """What more load does to attainment, latency and goodput. Crosses: the client could not keep up."""
    points = sorted(result.knee, key=lambda point: point.rate_rps)
    if not points:
        return None
    figure = blank(300, make_subplots(rows=1, cols=3, horizontal_spacing=0.075))
    x, met = [point.rate_rps for point in points], [point.attainment for point in points]
    symbols = ["circle" if point.valid else "x-thin-open" for point in points]
    good = [point.goodput_rps for point in points]
    p50, p99 = [point.ttft_p50_s for point in points], [point.ttft_p99_s for point in points]
    for col, name, values, colour, show in (
        (1, words.good(result), [value.value for value in met], LIGHT["ink"], "%{y:.1%} of n = %{customdata:,}"),
        (2, "TTFT p50", p50, LIGHT["warm"], "%{y:.3s}s"),
        (2, "TTFT p99", p99, LIGHT["cold-2"], "%{y:.3s}s"),
        (3, "goodput", good, LIGHT["workers"], "%{y:.3~g} good / s"),
    ):
        figure.add_scatter(
            x=x,
            y=values,
            error_y=whiskers(met) if col == 1 else None,
            customdata=[value.n for value in met],
            mode="lines+markers",
            marker={"symbol": symbols, "size": 8, "line": {"width": 1.5, "color": colour}},
            line={"color": colour},
            name=name,
            hovertemplate=f"{name}: {show} at %{{x:.3~g}} / s<extra></extra>",
            row=1,
            col=col,
        )
    dotted = {"dash": "dot", "width": 1.2, "color": LIGHT["muted"]}
    both = [0, x[-1]]
    figure.add_scatter(x=both, y=both, mode="lines", line=dotted, name="all good", hoverinfo="skip", row=1, col=3)
    limit_line(figure, result.setup.limits.ttft_s, across=True, row=1, col=2)
    figure.update_xaxes(title="offered, requests / s", rangemode="tozero")
    figure.update_yaxes(title=words.good(result), rangemode="tozero", row=1, col=1, **PERCENT)
    times = log_seconds([result.setup.limits.ttft_s, *p50, *p99])
    figure.update_yaxes(title="TTFT", row=1, col=2, **times)
    figure.update_yaxes(title="good requests / s", rangemode="tozero", row=1, col=3)
    return marked(figure, result)


def lag(result: Result) -> Figure | None:
    """How late the client itself was. Bars are of equal width, whatever their bins are."""
    edges, counts = result.client.lag_histogram.edges, result.client.lag_histogram.counts
    if not any(counts):
        return None
    allowed, names = words.allowed_lag_s(result), [show_seconds(edge) for edge in edges]
    figure = blank(230, bargap=0.04)
    figure.add_bar(
        y=[count or None for count in counts],
        marker={"color": [LIGHT["failed" if low >= allowed else "served"] for low in edges[:-1]]},
        customdata=[f"{low} to {high}" for low, high in itertools.pairwise(names)],
        hovertemplate="%{y:,} requests were %{customdata} late<extra></extra>",
    )
    limit_line(figure, _place(edges, allowed), log=False, text=f"invalid when p99 is over {show_seconds(allowed)}")
    every = 1 + len(edges) // 22
    at = [number - 0.5 for number in range(len(edges))]
    title = "sent later than intended"
    figure.update_xaxes(tickvals=at[::every], ticktext=names[::every], title=title, showgrid=False)
    top = math.log10(max(counts)) + 0.2
    figure.update_yaxes(type="log", title="requests", dtick=1, tickformat=",d", range=[-0.3, top])
    return marked(figure, result)


FIGURES: dict[str, Callable[[Result], Figure | None]] = {
    "timeline": timeline,
    "ttft": ttft,
    "latency": latency,
    "heat": heat,
    "attainment": attainment,
    "cost": cost,
    "knee": knee,
    "lag": lag,
}


def _place(edges: Sequence[float], value: float) -> float | None:
    """Where a value lies among bars that are one wide."""
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        if low <= value < high:
            return number + (value - low) / (high - low) - 0.5
    return None
