"""Pictures of an experiment as SVG: drawn by plotly in a headless browser, complete in themselves."""

from __future__ import annotations

import base64
import shutil
import sys
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.table import Table

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = ("#1b6ca8", "#7aa6c2", "#94b49f", "#c9b458", "#c98b5a", "#a83b3b")
WIDTH, HEIGHT = 960, 360


def write_pictures(table: Table, folder: Path, stem: str) -> list[str]:
    """Names of the files. Without a browser, or the libraries to drive it, there are none, and stderr says so."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    try:
        import plotly.graph_objects as go
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return []
    if browser is None:
        print(f"no pictures: none of {', '.join(BROWSERS)} is there to draw them", file=sys.stderr)
        return []
    names = []
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        for what, figure in (("ttft", _ttft(go, table)), ("cost", _cost(go, table))):
            page.set_content(figure.to_html(include_plotlyjs=True, div_id="figure"))
            size = f"{{format: 'svg', width: {WIDTH}, height: {HEIGHT}}}"
            url: str = page.evaluate(f"Plotly.toImage(document.getElementById('figure'), {size})")
            name = f"{stem}-{what}.svg"
            (folder / name).write_bytes(_bytes_of(url))
            names.append(name)
    return names


def _bytes_of(data_url: str) -> bytes:
    head, _, data = data_url.partition(",")
    return base64.b64decode(data) if head.endswith(";base64") else urllib.parse.unquote_to_bytes(data)


def _ttft(go: Any, table: Table) -> Any:
    figure = go.Figure()
    for colour, system in zip(COLOURS, _systems(table), strict=False):
        rows = [row for row in table.rows if row.system == system and row.ttft_mean_s is not None]
        means = [row.ttft_mean_s for row in rows if row.ttft_mean_s is not None]
        figure.add_bar(
            name=system,
            x=[row.trace for row in rows],
            y=[each.value for each in means],
            error_y={
                "type": "data",
                "array": [(each.high or each.value) - each.value for each in means],
                "arrayminus": [each.value - (each.low or each.value) for each in means],
                "thickness": 1,
                "width": 2,
            },
            marker_color=colour,
        )
    figure.update_yaxes(type="log", title="time to first token, mean, s", gridcolor="#ddd")
    return _styled(figure)


def _cost(go: Any, table: Table) -> Any:
    figure = go.Figure()
    for colour, system in zip(COLOURS, _systems(table), strict=False):
        rows = [row for row in table.rows if row.system == system and row.cost is not None and row.answered]
        costs = [1000 * (row.cost or 0.0) / row.answered * 1000 for row in rows]
        figure.add_bar(name=system, x=[row.trace for row in rows], y=costs, marker_color=colour)
    figure.update_yaxes(title="cost of 1,000 answers, ‰ (illustrative)", gridcolor="#ddd", rangemode="tozero")
    return _styled(figure)


def _systems(table: Table) -> list[str]:
    return list(dict.fromkeys(row.system for row in table.rows))


def _styled(figure: Any) -> Any:
    return figure.update_layout(
        barmode="group",
        bargap=0.2,
        plot_bgcolor="white",
        paper_bgcolor="white",
        font={"family": "sans-serif", "size": 13, "color": "#222"},
        margin={"l": 70, "r": 10, "t": 40, "b": 40},
        legend={"orientation": "h", "y": 1.12},
    )
