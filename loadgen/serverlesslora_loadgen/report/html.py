"""`report.html`: one file that needs no network, and that nothing in a trace or an answer can write scripts into.

Jinja2 escapes every text, figures are JSON without a `<`, and the page's own policy lets no script run but the two it
was written with.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.report import tables, words
from serverlesslora_loadgen.report.palette import TO_DARK, template
from serverlesslora_loadgen.result import Result
from serverlesslora_loadgen.units import show_seconds

HERE = Path(__file__).parent


class Title(NamedTuple):
    short: str
    long: str


CONTENTS = {
    "verdict": Title("Verdict", "What was asked, what was found"),
    "timeline": Title("Timeline", "What happened when"),
    "ttft": Title("First token", "Time to first token"),
    "latency": Title("Answers", "End to end, and between tokens"),
    "heat": Title("Adapters", "Who waited, and when"),
    "attainment": Title("Fairness", "Does the tail pay for the head?"),
    "cost": Title("Cost", "What it costs"),
    "slowest": Title("Slowest", "The slowest requests, and their stories"),
    "knee": Title("Knee", "How much load it takes"),
    "client": Title("Client", "Can the client be believed?"),
    "setup": Title("Setup", "Do it again"),
}


def write_report(result: Result, path: Path) -> None:
    """Raises LoadgenError when plotly is not installed, or the file cannot be written."""
    page = render(result)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise LoadgenError(f"cannot write the report {path}: {error}") from error


def render(result: Result) -> str:
    try:
        from plotly.offline import get_plotlyjs

        from serverlesslora_loadgen.report.figures import FIGURES
    except ImportError as error:
        raise LoadgenError(f"a report needs plotly ({error}): pip install 'serverlesslora[loadgen]'") from error

    drawn = {name: draw(result) for name, draw in FIGURES.items()}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    plotly, script = get_plotlyjs(), (HERE / "report.js").read_text(encoding="utf-8")
    money, whole = result.money, result.whole
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            result=result,
            contents=CONTENTS,
            sentence=words.sentence(result),
            warnings=words.warnings(result),
            tone="invalid" if not result.verdict.valid else "passed" if result.verdict.passed else "missed",
            tiles=tables.tiles(result),
            percentiles=tables.PERCENTILES,
            latencies=tables.latencies(result),
            cold=words.cold_groups(result),
            stories=tables.stories(result.slowest),
            longest=tables.longest(result.slowest),
            client=tables.client(result),
            calibration=tables.calibration(result.setup.calibration),
            command=shlex.join(result.setup.command),
            setup=tables.setup(result),
            heights={name: int(figure.layout.height) for name, figure in figures.items()},
            share=lambda estimate: words.cell(estimate, words.percent),
            time=lambda of, name, share: words.cell(words.percentile(of, name, share)),
            price=lambda amount: words.price(amount, money.currency if money else ""),
            n=whole.counts.sent,
            policy=_policy(plotly, script),
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            figures=_embedded(figures),
            plotly=Markup(plotly),
            script=Markup(script),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.visible(value) if type(value) is str and value else value,
    )
    environment.globals |= {
        "found": words.found,
        "number": words.number,
        "percent": words.percent,
        "plain": words.plain,
        "seconds": show_seconds,
        "short": words.short,
        "visible": words.visible,
    }
    return environment


def _embedded(figures: dict[str, Any]) -> Markup:
    """JSON inside a script element: nothing in it may end the element, or begin a comment."""
    from plotly.io.json import to_json_plotly

    plain = {name: figure.to_plotly_json() for name, figure in figures.items()}
    for figure in plain.values():
        del figure["layout"]["template"]  # the page has it once, for each theme
    text: str = to_json_plotly(
        {"figures": plain, "dark": TO_DARK, "templates": {"light": template("light"), "dark": template("dark")}}
    )
    for char in "<>&\u2028\u2029":  # some of plotly's encoders do this, others do not
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _policy(*scripts: str) -> str:
    """Content-Security-Policy: these scripts, styles of the page, pictures that plotly makes, and no network at all."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    rules = ("default-src 'none'", f"script-src {allowed}", "style-src 'unsafe-inline'", "img-src data: blob:")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))
