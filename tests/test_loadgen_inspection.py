"""What is said of a trace before it is replayed."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.generate.workload import Workload, generate, parse_classes
from serverlesslora_loadgen.inspection import TOO_FEW, ClassFacts, inspect, print_inspection
from serverlesslora_loadgen.inspection_page import write_page
from serverlesslora_loadgen.trace import TraceRequest, digest, read_trace

TRACES = Path(os.environ.get("SERVERLESSLORA_TRACES", Path(__file__).parents[1].parent / "shared" / "traces"))


def request(at_s: float, model: str = "a", prompt: int = 10, answer: int = 4) -> TraceRequest:
    return TraceRequest(timestamp=1000 * at_s, input_length=prompt, output_length=answer, model=model)


def mixed() -> list[TraceRequest]:
    return generate(Workload(adapters=6, rate_rps=1, duration_s=900, classes=parse_classes("mixed")))


def shown(requests: list[TraceRequest], **more: int) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_inspection(inspect(requests), console, **more)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_totals_of_a_small_trace() -> None:
    requests = [request(0.5, "a", 10, 1), request(1.1, "a", 20, 2), request(1.9, "b", 30, 3), request(4.0, "a", 40, 4)]
    found = inspect(requests)
    assert (found.requests, found.adapters, found.seconds) == (4, 2, 4.0)
    assert (found.mean_rps, found.peak_second, found.cv) == (1.0, 2, None)
    assert found.sha256 == digest(requests)
    assert found.top_shares == {"1 %": 0.75, "5 %": 0.75, "10 %": 0.75, "20 %": 0.75}
    assert found.input.percentiles == {"p50": 20, "p90": 40, "p99": 40, "max": 40}
    assert (found.output.total, found.output.mean) == (10, 2.5)
    assert found.classes == {TOO_FEW: ClassFacts(2, 4)}
    assert found.notes == ("2 of 2 adapters have fewer than 15 requests, too few for a class",)
    assert found.prefix_reuse is None


def test_shares_of_the_most_asked_are_sums() -> None:
    requests = [request(at, f"a{min(at, 19)}") for at in range(39)]  # the last of 20 adapters has 20 of 39 requests
    found = inspect(requests)
    assert found.top_shares["1 %"] == found.top_shares["5 %"] == pytest.approx(20 / 39)
    assert found.top_shares["10 %"] == pytest.approx(21 / 39)
    assert found.top_shares["20 %"] == pytest.approx(23 / 39)


def test_classes_of_a_mixed_trace() -> None:
    found = inspect(mixed())
    assert {name: each.adapters for name, each in found.classes.items()} == {
        "Predictable": 2,
        "Normal": 2,
        "Bursty": 2,
    }
    assert sum(each.requests for each in found.classes.values()) == found.requests == 900
    assert found.notes == ()
    assert "standard deviation of the gaps" in found.definition


def test_reused_prefixes_are_counted() -> None:
    requests = [
        TraceRequest(timestamp=i, input_length=1024, output_length=1, hash_ids=(1, 2, 100 + i)) for i in range(4)
    ]
    assert inspect(requests).prefix_reuse == pytest.approx(6 / 12)


def test_what_to_beware_of() -> None:
    coarse = [request(3 * (i // 4), "") for i in range(20)]
    assert "all times are multiples of 3000 ms" in inspect(coarse).notes[0]
    assert "requests without an adapter" in inspect(coarse).notes[1]
    assert inspect([request(i) for i in range(20)]).notes == ()  # steady, and no heap
    late = [request(0, "other"), *(request(100 + i) for i in range(20))]
    assert "1 Predictable adapters are silent for more than half of the trace" in inspect(late).notes[0]
    told = [msgspec.structs.replace(request(i, "x"), class_="Bursty") for i in range(20)]
    assert inspect(told).notes == ("the trace gives 1 adapters another class than its times do: x",)
    assert "1 requests have a length of 0" in inspect([request(0, answer=0)]).notes[-1]


def test_nothing_at_all_is_no_error() -> None:
    found = inspect([])
    assert (found.requests, found.mean_rps, found.by_adapter, found.input.percentiles) == (0, 0, (), {})
    assert "0 in 0 s" in shown([])


def test_what_is_printed() -> None:
    text = shown(mixed())
    assert re.search(r"requests\s+900 in 1\d min", text)
    assert "2 Predictable" in text and "2 Bursty" in text
    assert all(f"adapter-{i:02d}" in text for i in range(6))
    assert "standard deviation of the gaps" in text
    assert "and 4 more, each with fewer requests" in shown(mixed(), adapters=2)


def test_names_are_printed_letter_by_letter() -> None:
    assert "[red]a[/red]" in shown([request(0, "[red]a[/red]")])


def test_it_goes_to_json() -> None:
    row = json.loads(msgspec.json.encode(inspect(mixed())))
    assert row["by_adapter"][0]["class"] in ("Predictable", "Normal", "Bursty")


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "trace.html"
    requests = [*mixed(), request(2000, "<script>alert(1)</script>")]
    found = write_page(requests, path, title="a <b>trace</b>")
    assert found == inspect(requests)
    page = path.read_text()
    assert page.count('class="plotly-graph-div"') == 5
    assert len(re.findall(r"plotly\.js v\d", page)) == 1  # the library, once
    assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["'](?:https?:)?//""", page)
    assert "<script>alert" not in page and "<b>trace</b>" not in page
    with pytest.raises(LoadgenError, match="has no requests"):
        write_page([], path, title="empty")


@pytest.mark.skipif(not TRACES.is_dir(), reason="the real traces are not here")
@pytest.mark.parametrize(
    ("name", "n", "peak", "cv", "cvs", "top"),
    [
        ("predictable_16ad", 3639, 6, 1.00, (0.36, 0.98), 0.17),
        ("normal_16ad", 3900, 14, 1.34, (1.02, 3.43), 0.39),
        ("bursty_16ad", 3292, 16, 2.78, (4.11, 17.4), 0.22),
        ("mixed_24ad", 3617, 8, 1.28, (0.45, 8.74), 0.14),
    ],
)
def test_facts_of_the_derived_traces(
    name: str, n: int, peak: int, cv: float, cvs: tuple[float, float], top: float
) -> None:
    found = inspect(read_trace(TRACES / "derived" / f"azf2019_{name}_60min.jsonl.gz"))
    assert (found.requests, found.peak_second) == (n, peak)
    assert found.cv == pytest.approx(cv, abs=0.006)
    every = [each.cv for each in found.by_adapter if each.cv is not None]
    assert (min(every), max(every)) == pytest.approx(cvs, rel=0.01)
    assert found.by_adapter[0].share == pytest.approx(top, abs=0.006)
    if "mixed" not in name:
        assert {each.class_ for each in found.by_adapter} == {name.partition("_")[0].capitalize()}
