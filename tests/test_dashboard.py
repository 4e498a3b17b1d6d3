"""The Grafana dashboard: whole, without overlaps, and every series it asks for is on /metrics."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest

from serverlesslora.gateway.backend import BackendStats, Cold
from serverlesslora.gateway.metrics import Metrics
from serverlesslora_ipc.messages import Delta, Finished
from tests.server import ROOT

DASHBOARD: dict[str, Any] = json.loads((ROOT / "dashboards" / "serverlesslora.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SERIES = re.compile(r"\b(?:serverlesslora_|vllm:)\w+")


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Labels by the name of the sample, after one request of every kind of number."""
    stats = BackendStats(memory=(("kv", 1),), workers=(("serving", 1),), domains=(("tenant", 1, 0),), currency="EUR")
    metrics = Metrics(lambda: stats, 10)
    record = metrics.record("f")
    record.cold(Cold("worker", (("worker", 0.1),)))
    record.delta(0, Delta("r", 0, "a", (1,)))
    record.delta(0, Delta("r", 0, "b", (1,), finish_reason="stop"))
    record.finished(Finished("r", 1, 2, first_token_s=0.1))
    record.close(200)
    metrics.spent("f", None, 1.0, 1.0)
    metrics.held("f", None, "adapter", 1.0, 1.0)
    metrics.responses.labels("/v1/models", "200").inc()
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel.get("targets", ())]


def test_every_series_it_asks_for_exists(exposed: dict[str, set[str]]) -> None:
    asked = {name for query in queries() for name in SERIES.findall(query)}
    variables = {name for each in DASHBOARD["templating"]["list"] for name in SERIES.findall(str(each["query"]))}
    assert asked and variables
    assert (asked | variables) - exposed.keys() == set()


def test_every_label_it_chooses_or_groups_by_exists(exposed: dict[str, set[str]]) -> None:
    for query in queries():
        for name, chosen in re.findall(r"((?:serverlesslora_|vllm:)\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)[!=]~?=?\"", chosen)) <= exposed[name], query
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        for name in SERIES.findall(query):
            assert grouped <= exposed[name], query


def test_it_is_a_dashboard_that_grafana_takes() -> None:
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["title"] and DASHBOARD["uid"]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert (
        DASHBOARD["templating"]["list"][0] | {"type": "datasource", "query": "prometheus"}
        == (DASHBOARD["templating"]["list"][0])
    )
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["targets"] and panel["title"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)


def test_no_panel_lies_on_another_or_beyond_the_grid() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
        return {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}

    for one, other in combinations(PANELS, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
