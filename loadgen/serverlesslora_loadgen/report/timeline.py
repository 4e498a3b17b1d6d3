"""The figures with time across: what happened when, and who waited when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure

from serverlesslora_loadgen.record import UNKNOWN, WARM
from serverlesslora_loadgen.report import words
from serverlesslora_loadgen.report.drawing import blank, label, marked, rounded, time_unit
from serverlesslora_loadgen.report.palette import LIGHT, cold_colours
from serverlesslora_loadgen.result import Result

MOST_POINTS = 400  # more cannot be told apart on a screen
_BEYOND = {0.1: "≤ ", 10: "≥ "}  # at the ends of the scale
MOST_NAMES = 60  # more rows than this are not labelled


def timeline(result: Result) -> Figure | None:
    """Offered against served per second; below it cold starts, requests in flight, and what the server held."""
    line = result.timeline
    if not line.offered:
        return None
    kinds = [group.key for group in words.cold_groups(result) if group.key not in (WARM, UNKNOWN)]
    kinds = [kind for kind in kinds if any(line.cold.get(kind, ()))]
    watched = any(value is not None for row in (line.workers, line.held_bytes) for value in row)
    domains = _stack([5.0, 0.5 * len(kinds), 1.5, 1.8 if watched else 0.0], gap=0.045)
    unit, scale = time_unit(len(line.offered) * line.step_s)
    every = _every(len(line.offered), line.step_s)
    step_s = every * line.step_s
    end = len(line.offered) * line.step_s / scale
    across = {"x0": 0, "dx": step_s / scale, "mode": "lines"}
    figure = blank(400 + 24 * len(kinds) + (90 if watched else 0), hovermode="x")

    for name, counts in (("served", line.done), ("shed", line.shed), ("failed", line.failed)):
        if name == "served" or any(counts):
            figure.add_scatter(
                y=_steps([sum(part) / step_s for part in _parts(counts, every)]),
                stackgroup="ended",
                line={"shape": "hv", "width": 0},
                fillcolor=LIGHT[name],
                name=name,
                hovertemplate=f"{name} %{{y:.2f}}/s<extra></extra>",
                **across,
            )
    figure.add_scatter(
        y=_steps([sum(part) / step_s for part in _parts(line.offered, every)]),
        line={"shape": "hv", "width": 1.2, "color": LIGHT["ink"]},
        name="offered",
        hovertemplate="offered %{y:.2f}/s<extra></extra>",
        **across,
    )
    for row, kind in enumerate(kinds):
        met = [(step * line.step_s / scale, count) for step, count in enumerate(line.cold[kind]) if count]
        figure.add_scatter(
            x=[round(at, 3) for at, _ in met],
            y=[row] * len(met),
            yaxis="y2",
            mode="markers",
            marker={"symbol": "line-ns", "size": 11, "line": {"width": 1.4, "color": cold_colours(kinds)[kind]}},
            customdata=[count for _, count in met],
            showlegend=False,
            hovertemplate=f"{label(kind)}: %{{customdata}} at %{{x:.2f}} {unit}<extra></extra>",
        )
    figure.add_scatter(
        y=_steps([max(part) for part in _parts(line.in_flight, every)]),
        yaxis="y3",
        line={"shape": "hv", "width": 0.8, "color": LIGHT["flight"]},
        fill="tozeroy",
        fillcolor=LIGHT["flight"],
        showlegend=False,
        hovertemplate="in flight, at most %{y}<extra></extra>",
        **across,
    )
    held = [value and value / 2**30 for value in line.held_bytes]
    for name, values, axis, show in (
        ("workers", line.workers, "y4", "workers alive %{y}"),
        ("memory", held, "y5", "memory held %{y:.3~g} GiB"),
    ):
        if any(value is not None for value in values):
            figure.add_scatter(
                y=_steps([_most(part) for part in _parts(values, every)]),
                yaxis=axis,
                line={"shape": "hv", "width": 1.6, "color": LIGHT[name]},
                connectgaps=True,
                showlegend=False,
                hovertemplate=f"{show}<extra></extra>",
                **across,
            )
    figure.update_layout(
        xaxis={
            "title": f"{unit} after the start",
            "anchor": "free",
            "position": 0,
            "range": [-0.004 * end, end],
        },
        yaxis={"domain": domains[0], "title": "requests / s", "rangemode": "tozero"},
        yaxis2={
            "domain": domains[1],
            "range": [len(kinds) - 0.5, -0.5],
            "showgrid": False,
            "fixedrange": True,
            "tickvals": list(range(len(kinds))),
            "ticktext": [label(kind) for kind in kinds],
            "visible": bool(kinds),
        },
        yaxis3={"domain": domains[2], "title": "in flight", "rangemode": "tozero", "nticks": 4},
    )
    if watched:
        figure.update_layout(
            yaxis4={
                "domain": domains[3],
                "rangemode": "tozero",
                "nticks": 4,
                "title": {"text": "workers", "font": {"color": LIGHT["workers"]}},
            },
            yaxis5={
                "overlaying": "y4",
                "side": "right",
                "rangemode": "tozero",
                "nticks": 4,
                "showgrid": False,
                "tickmode": "auto",
                "title": {"text": "GiB held", "font": {"color": LIGHT["memory"]}},
            },
        )
    return marked(figure, result)


def heat(result: Result) -> Figure | None:
    """Median time to first token, adapters by popularity, against its limit where there is one, else the median."""
    rows, limit = result.heat.ttft_s, result.setup.limits.ttft_s
    seen = sorted(value for row in rows for value in row if value)
    if not seen:
        return None
    middle = limit or seen[len(seen) // 2]
    unit, scale = time_unit(len(rows[0]) * result.heat.step_s)
    names = [label(name) for name in result.heat.adapters]
    figure = blank(min(900, max(190, 96 + 17 * len(names))))
    ratios = (0.1, 0.2, 0.5, 1, 2, 5, 10) if len(names) > 7 else (0.1, 1, 10)
    figure.add_heatmap(
        z=[[None if not value else round(math.log10(value / middle), 2) for value in row] for row in rows],
        customdata=[[None if value is None else rounded(value) for value in row] for row in rows],
        x0=result.heat.step_s / scale / 2,
        dx=result.heat.step_s / scale,
        zmin=-1,
        zmax=1,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        colorscale=[  # what met the limit is blue, what missed it is not
            (0, LIGHT["heat-0"]),
            (0.25, LIGHT["heat-1"]),
            (0.4999, LIGHT["heat-2"]),
            (0.5, LIGHT["heat-3"]),
            (0.75, LIGHT["heat-4"]),
            (1, LIGHT["heat-5"]),
        ],
        colorbar={
            "tickvals": [math.log10(ratio) for ratio in ratios],
            "ticktext": [f"{_BEYOND.get(ratio, '')}{ratio:g}×" for ratio in ratios],
            "title": {"text": "TTFT / limit" if limit else "TTFT / median", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "len": 1,
            "ypad": 0,
        },
        hovertemplate=f"%{{y}}, %{{x:.1f}} {unit}: TTFT p50 %{{customdata:.3s}}s<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": f"{unit} after the start", "showgrid": False},
        yaxis={
            "range": [len(names) - 0.5, -0.5],
            "showgrid": False,
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "showticklabels": len(names) <= MOST_NAMES,
            "title": "" if len(names) <= MOST_NAMES else "adapters, the most asked first",
            "tickfont": {"size": 11 if len(names) <= 45 else 9},
        },
    )
    return marked(figure, result)


def _every(steps: int, step_s: float) -> int:
    """How many steps make one point: a length that people count in, so that there are not too many."""
    for length_s in (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600):
        every = max(1, round(length_s / step_s))
        if steps / every <= MOST_POINTS:
            return every
    return math.ceil(steps / MOST_POINTS)


def _parts(values: Sequence[Any], every: int) -> list[Sequence[Any]]:
    return [values[at : at + every] for at in range(0, len(values), every)]


def _most(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _steps(values: list[Any]) -> list[Any]:
    """A step line ends where its last step ends."""
    return [value if value is None else rounded(value) for value in [*values, *values[-1:]]]


def _stack(heights: Sequence[float], *, gap: float) -> list[tuple[float, float]]:
    """Domains from the top down; what has no height takes no place."""
    scale = (1 - gap * (sum(height > 0 for height in heights) - 1)) / sum(heights)
    top, domains = 1.0, []
    for height in heights:
        bottom = max(0.0, round(top - height * scale, 4))
        domains.append((bottom, top) if height else (0.0, 0.001))
        top = max(0.001, bottom - gap) if height else top
    return domains
