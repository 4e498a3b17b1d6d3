"""A trace as one HTML file with figures, for whoever wants to see a workload before replaying it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from serverlesslora_loadgen.classes import NORMAL_MAX, PREDICTABLE_MAX
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.inspection import TOO_FEW, Inspection, inspect
from serverlesslora_loadgen.trace import TraceRequest
from serverlesslora_loadgen.units import show_seconds

STEPS = 120  # of time, at most
HEAT_ROWS = 40  # adapters, at most
# Okabe and Ito's palette: told apart by everybody, on light and on dark ground.
COLOURS = {"Predictable": "#0072B2", "Normal": "#009E73", "Bursty": "#D55E00", TOO_FEW: "#888888"}
_NICE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)


def figures(requests: Sequence[TraceRequest], inspection: Inspection) -> list[Any]:
    """plotly Figures, in the order they are read in. Raises LoadgenError when plotly is not there."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise LoadgenError("figures need plotly: pip install 'serverlesslora[loadgen]'") from error
    drawn = [
        _over_time(go, requests, inspection),
        _heat(go, requests, inspection),
        _popularity(go, inspection),
        _regularity(go, inspection),
        _lengths(go, requests),
    ]
    for figure in drawn:
        figure.update_layout(
            template="none",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            font={"family": "system-ui, sans-serif", "color": "#808080"},
            margin={"l": 70, "r": 20, "t": 50, "b": 55},
            legend={"orientation": "h", "y": 1.02, "x": 1, "xanchor": "right", "yanchor": "bottom"},
            title_x=0,
            title_xref="paper",
        )
        figure.update_xaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
        figure.update_yaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    return drawn


def write_page(requests: Sequence[TraceRequest], path: Path, *, title: str) -> Inspection:
    """Nothing on it is fetched from elsewhere.

    Raises LoadgenError when there is nothing to draw, no plotly, or no way to write it.
    """
    if not requests:
        raise LoadgenError(f"{title} has no requests; there is nothing to draw")
    inspection = inspect(requests)
    drawn = figures(requests, inspection)

    import jinja2

    template = resources.files("serverlesslora_loadgen").joinpath("inspection.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["seconds"] = show_seconds
    page = environment.from_string(template).render(
        title=title,
        one=inspection,
        # The library is in the page once, before the first figure.
        figures=[
            figure.to_html(
                full_html=False, include_plotlyjs=i == 0, config={"displayModeBar": False, "responsive": True}
            )
            for i, figure in enumerate(drawn)
        ],
    )
    try:
        path.write_text(page, "utf-8")
    except OSError as error:
        raise LoadgenError(f"cannot write the page {path}: {error}") from error
    return inspection


def _label(model: str) -> str:
    """A name from outside: plotly reads markup in every text."""
    return html.escape(model, quote=False) or "(none)"


def _step_s(seconds: float) -> float:
    return next((each for each in _NICE_S if seconds / each <= STEPS), seconds / STEPS)


def _bins(requests: Sequence[TraceRequest], seconds: float) -> tuple[float, np.ndarray[Any, np.dtype[np.int64]], int]:
    """Length of a step, the step of each request, and how many steps there are."""
    step_s = _step_s(seconds)
    steps = np.array([each.timestamp for each in requests]) / 1000 // step_s
    return step_s, steps.astype(np.int64), int(steps[-1]) + 1


def _over_time(go: Any, requests: Sequence[TraceRequest], inspection: Inspection) -> Any:
    step_s, steps, n = _bins(requests, inspection.seconds)
    class_of = {each.model: each.class_ or TOO_FEW for each in inspection.by_adapter}
    classes = np.array([class_of[each.model] for each in requests])
    figure = go.Figure()
    for name in inspection.classes:
        counts = np.bincount(steps[classes == name], minlength=n)
        figure.add_bar(
            x=((np.arange(n) + 0.5) * step_s).tolist(),
            y=(counts / step_s).tolist(),
            name=name,
            marker={"color": COLOURS[name], "line": {"width": 0}},
            hovertemplate="%{x:.0f} s: %{y:.3g} per second",
        )
    figure.update_layout(
        title=f"Requests per second, by class of the adapter (steps of {show_seconds(step_s)})",
        barmode="stack",
        bargap=0,
        showlegend=True,
    )
    figure.update_xaxes(title="seconds after the start")
    figure.update_yaxes(title="requests per second", rangemode="tozero")
    return figure


def _heat(go: Any, requests: Sequence[TraceRequest], inspection: Inspection) -> Any:
    step_s, steps, n = _bins(requests, inspection.seconds)
    rows = {each.model: row for row, each in enumerate(inspection.by_adapter[:HEAT_ROWS])}
    counts = np.zeros((len(rows), n), dtype=np.int64)
    for request, step in zip(requests, steps.tolist(), strict=True):
        if (row := rows.get(request.model)) is not None:
            counts[row, step] += 1
    # Logarithmic, as popular adapters would leave nothing to see of the others; none at all stays empty.
    shown = [[float(np.log10(count)) if count else None for count in row] for row in counts.tolist()]
    figure = go.Figure(
        go.Heatmap(
            x=((np.arange(n) + 0.5) * step_s).tolist(),
            y=[_label(model) for model in rows],
            z=shown,
            customdata=counts.tolist(),
            colorscale="Viridis",
            showscale=False,
            hovertemplate="%{y} at %{x:.0f} s: %{customdata} requests<extra></extra>",
        )
    )
    most = (
        f"the {len(rows)} most asked of {inspection.adapters}" if len(rows) < inspection.adapters else "the most asked"
    )
    figure.update_layout(title=f"Who is asked when ({most} on top)", height=max(260, 120 + 18 * len(rows)))
    figure.update_xaxes(title="seconds after the start", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", automargin=True)
    return figure


def _popularity(go: Any, inspection: Inspection) -> Any:
    ranks = list(range(1, inspection.adapters + 1))
    shares = [each.share for each in inspection.by_adapter]
    figure = go.Figure()
    names = [_label(each.model) for each in inspection.by_adapter]
    for name, y in (("of this adapter", shares), ("of this and all more asked ones", np.cumsum(shares).tolist())):
        figure.add_scatter(
            x=ranks,
            y=y,
            name=name,
            customdata=names,
            mode="lines+markers" if inspection.adapters <= 100 else "lines",
            line={"color": "#0072B2" if name == "of this adapter" else "#888888"},
            hovertemplate="%{x}. %{customdata}: %{y:.2%}",
        )
    figure.update_layout(title="Popularity: share of all requests", showlegend=True)
    figure.update_xaxes(title="adapter, by popularity", type="log", dtick="D2")
    figure.update_yaxes(type="log", tickformat="~%", dtick=1)
    return figure


def _regularity(go: Any, inspection: Inspection) -> Any:
    figure = go.Figure()
    for name in inspection.classes:
        facts = [each for each in inspection.by_adapter if each.class_ == name]
        if facts:
            figure.add_scatter(
                x=[3600 * each.rate_rps for each in facts],
                y=[each.cv for each in facts],
                customdata=[_label(each.model) for each in facts],
                name=name,
                mode="markers",
                marker={"color": COLOURS[name], "size": 9, "opacity": 0.8},
                hovertemplate="%{customdata}: %{x:.3g} per hour, CV %{y:.2f}",
            )
    for limit in (PREDICTABLE_MAX, NORMAL_MAX):
        figure.add_hline(y=limit, line={"color": "#888888", "dash": "dash", "width": 1})
    figure.update_layout(title="How regularly each adapter is asked", showlegend=True)
    figure.update_xaxes(title="requests per hour", type="log", dtick="D2")
    figure.update_yaxes(title="CV of its gaps", rangemode="tozero")
    return figure


def _lengths(go: Any, requests: Sequence[TraceRequest]) -> Any:
    figure = go.Figure()
    percents = list(range(101))
    for name, tokens, colour in (
        ("prompts", [each.input_length for each in requests], "#0072B2"),
        ("answers", [each.output_length for each in requests], "#D55E00"),
    ):
        values = np.percentile(tokens, percents, method="inverted_cdf")
        figure.add_scatter(
            x=np.maximum(values, 1).tolist(),
            y=percents,
            name=name,
            mode="lines",
            line={"color": colour, "shape": "hv"},
            hovertemplate="%{y} % have at most %{x} tokens",
        )
    figure.update_layout(title="Lengths", showlegend=True)
    figure.update_xaxes(title="tokens", type="log", dtick="D2")
    figure.update_yaxes(title="% of requests", rangemode="tozero")
    return figure
