"""The colours of a report, by what they mean, on light and on dark ground.

The hues of cold starts keep apart for colour-blind eyes: they start from the set of Okabe and Ito ("Color Universal
Design", 2008), shifted until they stand out on both grounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from serverlesslora_loadgen.record import UNKNOWN, WARM

Theme = Literal["light", "dark"]

# Figures are drawn in the light colours; the page turns each into its dark twin. So no two light ones may be equal.
_COLOURS = {
    "ink": ("#1d2433", "#e8ecf4"),
    "muted": ("#667086", "#98a3b8"),
    "grid": ("#e6eaf1", "#28303f"),
    "surface": ("#ffffff", "#151b26"),
    "axis": ("#c3cad7", "#465067"),
    "watermark": ("#c4342b", "#ff7b70"),
    "limit": ("#b4231a", "#ff8a80"),
    "served": ("#8db9e3", "#3a71a8"),
    "shed": ("#f0a196", "#b9584d"),
    "failed": ("#c4281f", "#ff6257"),
    "flight": ("#b9c4d6", "#4a5770"),
    "workers": ("#0b7a6f", "#45cdbb"),
    "memory": ("#8a5cc4", "#b696ec"),
    "warm": ("#2777b8", "#62b2f2"),
    "cold-1": ("#e09b00", "#f7c244"),
    "cold-2": ("#d9541e", "#ff8850"),
    "cold-3": ("#a3286c", "#ea78b6"),
    "cold-4": ("#6a48b0", "#a78df0"),
    "unknown": ("#8b95a7", "#8a95a9"),
    "all": ("#344054", "#d3d9e5"),
    "backbone": ("#3f73b8", "#5b93de"),
    "adapters": ("#e3a51f", "#f0bd4d"),
    "workers-paid": ("#2f9c8f", "#43bbac"),
    "compute": ("#9460c9", "#b48be4"),
    "requests": ("#4b5568", "#a9b3c6"),
    "idle": ("#ccd3df", "#414c60"),
    "heat-0": ("#e3eef9", "#16304a"),
    "heat-1": ("#9cc4e8", "#24588a"),
    "heat-2": ("#4a90cc", "#4a94d4"),
    "heat-3": ("#f6cf65", "#f3c552"),
    "heat-4": ("#e2702d", "#f07f3c"),
    "heat-5": ("#96202a", "#ff5a6b"),
}
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
TO_DARK = {light: dark for light, dark in _COLOURS.values()}
_PARTS = {"workers": "workers-paid"}


def part_colour(name: str) -> str:
    """Of a part of the costs."""
    return LIGHT.get(_PARTS.get(name, name), LIGHT["unknown"])


def cold_colours(kinds: Sequence[str]) -> dict[str, str]:
    """`kinds` from the least cold to the coldest; the fifth starts over."""
    fixed = {WARM: LIGHT["warm"], UNKNOWN: LIGHT["unknown"], "all": LIGHT["all"]}
    colds = [kind for kind in kinds if kind not in fixed]
    return fixed | {kind: LIGHT[f"cold-{1 + number % 4}"] for number, kind in enumerate(colds)}


def template(theme: Theme) -> dict[str, Any]:
    """What all figures have in common, as a plotly template."""
    ink, muted, grid, surface, axis = (
        _COLOURS[name][theme == "dark"] for name in ("ink", "muted", "grid", "surface", "axis")
    )
    line = {
        "gridcolor": grid,
        "linecolor": axis,
        "tickcolor": axis,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
        "title": {"font": {"color": muted, "size": 12}, "standoff": 8},
    }
    return {
        "layout": {
            "font": {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 12, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 56, "r": 20, "t": 34, "b": 40},
            "xaxis": {**line, "showline": True},
            "yaxis": {**line, "ticks": ""},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "traceorder": "normal",
            },
            "hoverlabel": {
                "bgcolor": surface,
                "bordercolor": axis,
                "font": {"color": ink, "size": 12},
                "align": "left",
                "namelength": -1,
            },
            "hovermode": "closest",
            "bargap": 0.3,
        }
    }
