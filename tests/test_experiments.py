"""Tables of experiments say what was found, and traces that are not there are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from experiments.cpu import cpu_seconds
from experiments.paper import SYSTEMS, TRACES, traced
from experiments.table import BASELINE, OURS, Row, Table, below, markdown, row_of
from serverlesslora_loadgen.classes import CLASSES, adapter_facts
from serverlesslora_loadgen.result import Estimate
from serverlesslora_loadgen.run import Finished
from tests.loadgen_samples import sample
from tests.server import ROOT

RESULT = sample()


def row(system: str, mean_s: float, gb_seconds: float, cost: float, *, answered: int = 100) -> Row:
    made = row_of("mixed", system, Finished(RESULT, []), cpu_s=1.0, took_s=1.0)
    ttft = Estimate(mean_s, answered)
    return replace(made, ttft_mean_s=ttft, gb_seconds=gb_seconds, cost=cost, answered=answered, device_seconds=None)


def test_a_row_is_what_the_result_says() -> None:
    made = row_of("mixed", OURS, Finished(RESULT, []), cpu_s=1.0, took_s=1.0)
    assert (made.requests, made.answered) == (RESULT.whole.counts.sent, RESULT.whole.counts.ok)
    assert made.ttft_p99_s == RESULT.whole.latency["ttft"].percentiles["p99"]
    assert RESULT.money is not None
    assert made.cost == next(cost.total for cost in RESULT.money.measured if cost.name == "lifetimes")
    assert 0 < made.cold < made.requests


def test_reductions_are_against_one_process_per_function() -> None:
    rows = [row(OURS, 0.2, 10.0, 2.0, answered=100), row(BASELINE, 2.0, 40.0, 4.0, answered=50)]
    found = below(rows)
    assert found == pytest.approx(
        {"mean TTFT": 90.0, "GB·s": 75.0, "CPU-s": 0.0, "cost": 50.0, "cost per answer": 75.0}
    )
    assert below(rows[:1]) == {}


def test_the_page_has_every_system_and_says_what_is_invalid() -> None:
    rows = [row(system, 0.2, 1.0, 1.0) for system in SYSTEMS]
    rows[1] = replace(rows[1], valid=False, ttft_p50_s=None)
    table = Table(
        date="2026-01-01",
        model="demo",
        traces={"mixed": "made up, mixed"},
        functions=8,
        seconds=20,
        speedup=15,
        length_scale=0.125,
        memory_mb=16000,
        good_ttft_s=2.5,
        deadline_s=10,
        took_s=60,
        environment=RESULT.setup.environment,
        rows=rows,
    )
    page = markdown(table, ["a.svg"])
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip().removesuffix(" (INVALID)") for line in lines[1:]] == list(SYSTEMS)
    assert "sharing off (INVALID)" in page and "![a.svg](a.svg)" in page and "illustrative" in page


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_that_is_not_there_is_made_up_of_its_class(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SERVERLESSLORA_TRACES", str(tmp_path))
    source, requests = traced(name, seconds=100)
    assert source == f"made up, {name}"
    wanted = set(CLASSES) if name == "mixed" else {name.capitalize()}
    assert {facts.class_ for facts in adapter_facts(requests)} - {None} == wanted


def test_processors_are_counted_also_of_children_that_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert cpu_seconds(process.pid) >= 0.3
        process.stdin.close()
    assert cpu_seconds(process.pid) == 0


def test_the_readme_says_what_was_published() -> None:
    table = msgspec.json.decode((ROOT / "docs" / "results" / "paper-demo.json").read_bytes(), type=Table)
    found = {(row.trace, row.system): row for row in table.rows}
    for trace in table.traces:
        cells = [f"{trace} ({found[trace, OURS].requests})"]
        for system in SYSTEMS:
            mean, good = found[trace, system].ttft_mean_s, found[trace, system].good.value
            assert mean is not None
            shown = f"{1000 * mean.value:.0f} ms" if mean.value < 1 else f"{mean.value:.1f} s"
            cells.append(f"{shown}, {100 * good:.0f} %")
        assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text("utf-8")
    assert (ROOT / "docs" / "results" / "paper-demo.md").read_text("utf-8") == markdown(
        table, [f"paper-demo-{what}.svg" for what in ("ttft", "cost")]
    )
