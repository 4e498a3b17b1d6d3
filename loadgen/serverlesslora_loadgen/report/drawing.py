"""What the figures of a report are made of.

They are drawn in the light colours of palette.py and without a template; the page adds both themes. Names are escaped,
because plotly reads markup in every text, and axes are numbers with labels, because plotly takes names such as
`2024-01-01` for dates.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from plotly.graph_objects import Figure

from serverlesslora_loadgen.record import UNKNOWN
from serverlesslora_loadgen.report import words
from serverlesslora_loadgen.report.palette import LIGHT, cold_colours
from serverlesslora_loadgen.result import Estimate, Result
from serverlesslora_loadgen.units import show_seconds

PERCENT = {"tickformat": "~%"}
_MARKS = {ord("%"): "&#37;", ord("$"): "&#36;"}  # of plotly's templates, and of formulas


def label(text: str, limit: int = 40) -> str:
    """A name from outside, as text that plotly shows letter by letter."""
    return html.escape(words.short(words.visible(text), limit), quote=False).translate(_MARKS)


def blank(height: int, figure: Figure | None = None, **layout: Any) -> Figure:
    figure = Figure() if figure is None else figure
    return figure.update_layout(template={}, height=height, **layout)


def marked(figure: Figure, result: Result) -> Figure:
    """What must not be overlooked, across every figure: figures are passed on without the report around them."""
    if loud := [word for word, _ in words.warnings(result)]:
        figure.add_annotation(
            text=" · ".join(loud),
            xref="paper",
            yref="paper",
            x=0.5,
            y=0.5,
            showarrow=False,
            textangle=-8,
            font={"size": 44, "color": LIGHT["watermark"]},
            opacity=0.16,
        )
    return figure


def seen(result: Result, metric: str) -> list[float]:
    """All that its curves go through; empty: there is nothing to draw."""
    return [value for values in result.cdf.get(metric, {}).values() for value in values]


def curves(figure: Figure, result: Result, metric: str, *, legend: bool, **place: int) -> None:
    """Quantiles at 0, 1, … 100 % as a curve, with how many requests it stands on."""
    curves = result.cdf.get(metric, {})
    groups = {group.key: group for group in words.cold_groups(result)}
    kinds = [*(kind for kind in groups if kind in curves), *(kind for kind in curves if kind not in groups)]
    colours = cold_colours(kinds)
    whole = {"gap": "itl"}.get(metric, metric)
    for kind in kinds:
        values = curves[kind]
        latency = groups.get(kind, result.whole).latency.get(whole)
        n = f", n = {latency.n:,}" if latency is not None else ""
        if values:
            figure.add_scatter(
                x=[rounded(value) for value in values],
                y0=0,
                dy=1 / max(1, len(values) - 1),
                mode="lines",
                line={"color": colours.get(kind, LIGHT["all"]), "dash": "dot" if kind == UNKNOWN else "solid"},
                name=label(kind) + n,
                showlegend=legend,
                hovertemplate=f"{label(kind)}: %{{y:.0%}} within %{{x:.3s}}s<extra></extra>",
                **place,
            )


def limit_line(
    figure: Figure, at: float | None, *, across: bool = False, log: bool = True, text: str = "", **place: int
) -> None:
    """A dashed line at what was asked for."""
    if at is None:
        return
    draw = figure.add_hline if across else figure.add_vline
    draw(at, line={"color": LIGHT["limit"], "dash": "dash", "width": 1.3}, **place)
    axis = figure.get_subplot(**place) if place else figure.layout
    where = math.log10(at) if log else at  # plotly takes logarithms for annotations, but not for lines
    figure.add_annotation(
        text=text or f"limit {show_seconds(at)}",
        font={"color": LIGHT["limit"], "size": 11},
        showarrow=False,
        x=0.99 if across else where,
        y=where if across else 0.04,
        xref=(axis.xaxis.plotly_name.replace("axis", "") + " domain")
        if across
        else axis.xaxis.plotly_name.replace("axis", ""),
        yref=axis.yaxis.plotly_name.replace("axis", "") + ("" if across else " domain"),
        xanchor="right" if across else "left",
        yanchor="bottom",
        xshift=0 if across else 3,
    )


def log_seconds(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis over `values`, labelled as people write times; a single value stands in the middle."""
    known = [value for value in values if value is not None and value > 0] or [1.0]
    low, high = math.log10(min(known)), math.log10(max(known))
    margin = max(0.04 * (high - low) + 0.03, (0.8 - high + low) / 2)  # wide enough for a label or two
    low, high = low - margin, high + margin
    steps = (1, 2, 5) if high - low < 3.2 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(low) - 1, math.ceil(high) + 1) for step in steps]
    names = [show_seconds(tick) for tick in ticks]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": names, "tickangle": 0}


def dots(
    figure: Figure,
    name: str,
    values: Sequence[Estimate | None],
    keys: Sequence[str],
    *,
    colour: str,
    show: str,
    **how: Any,
) -> None:
    """An estimate with its interval for each of `keys`; an open dot has no interval."""
    figure.add_scatter(
        x=list(range(len(keys))),
        y=[None if value is None else rounded(value.value) for value in values],
        error_y=whiskers(values),
        mode="markers",
        marker={
            "color": colour,
            "size": 7,
            "symbol": ["circle" if value and value.low is not None else "circle-open" for value in values],
        },
        customdata=[[key, value.n if value else 0] for key, value in zip(keys, values, strict=True)],
        hovertemplate=f"%{{customdata[0]}}: {name} {show}, n = %{{customdata[1]:,}}<extra></extra>",
        name=name,
        legendgroup=name,
        **how,
    )


def whiskers(values: Sequence[Estimate | None]) -> dict[str, Any]:
    known = [
        (0.0, 0.0)
        if value is None or value.low is None or value.high is None
        else (rounded(value.high - value.value), rounded(value.value - value.low))
        for value in values
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, up) for up, _ in known],
        "arrayminus": [max(0.0, down) for _, down in known],
        "thickness": 1.2,
        "width": 3,
    }


def rounded(value: float) -> float:
    """Four digits: no eye sees more, and the file stays small."""
    return float(f"{value:.4g}")


def time_unit(seconds: float) -> tuple[str, float]:
    return ("hours", 3600.0) if seconds > 4 * 3600 else ("minutes", 60.0) if seconds > 300 else ("seconds", 1.0)
