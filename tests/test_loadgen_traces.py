"""What is known of the real traces is what the importers find in them."""

from __future__ import annotations

import csv
import gzip
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from serverlesslora_loadgen.classes import CLASSES, MIN_ARRIVALS, adapter_facts, class_of, cv
from serverlesslora_loadgen.generate.lengths import EmpiricalLengths, FixedLengths
from serverlesslora_loadgen.sources import ImportOptions, import_trace
from serverlesslora_loadgen.sources.functions import read_minutes
from serverlesslora_loadgen.sources.servegen import read_clients, requests_in
from serverlesslora_loadgen.trace import TraceRequest, read_trace

ROOT = Path(__file__).parents[1]
TRACES = Path(os.environ.get("SERVERLESSLORA_TRACES") or ROOT.parent / "shared" / "traces")
DAY = "azure_functions_2019_invitro_1250fn_1440min.csv.gz"
STATS = "azure_functions_2019_invitro_1250_stats.csv"
LENGTHS = FixedLengths(1000, 100)


def real(name: str) -> Path:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; SERVERLESSLORA_TRACES names the folder of real traces")
    return path


def table(name: str) -> list[dict[str, str]]:
    data = real(name).read_bytes()
    return list(csv.DictReader((gzip.decompress(data) if name.endswith(".gz") else data).decode().splitlines()))


def percentiles(values: Sequence[int]) -> list[float]:
    return [float(np.percentile(values, at, method="nearest")) for at in (50, 90, 99)]


def cv_of(requests: Sequence[TraceRequest]) -> float:
    found = cv([request.timestamp for request in requests])
    assert found is not None
    return found


def top_share(counts: Sequence[int], part: float) -> float:
    """Of all requests, that the most popular `part` of functions has."""
    ordered = np.sort(np.asarray(counts))[::-1]
    return float(ordered[: round(part * len(ordered))].sum() / ordered.sum())


@pytest.mark.parametrize(
    ("name", "requests", "seconds", "context", "generated", "variation"),
    [
        ("code", 8819, 3436, [1469, 5188, 7436], [13, 55, 251], 13.2),
        ("conv", 19_366, 3502, [1020, 2735, 4142], [129, 424, 601], 1.09),
    ],
)
def test_azure_llm_inference(
    name: str, requests: int, seconds: int, context: list[float], generated: list[float], variation: float
) -> None:
    trace = import_trace("azure-llm", real(f"AzureLLMInferenceTrace_{name}.csv.gz"), ImportOptions()).requests
    assert len(trace) == requests and round(trace[-1].timestamp / 1000) == seconds
    assert percentiles([each.input_length for each in trace]) == pytest.approx(context, abs=3)
    assert percentiles([each.output_length for each in trace]) == pytest.approx(generated, abs=1)
    assert cv_of(trace) == pytest.approx(variation, rel=0.01)


def test_mooncake_s_conversations_come_every_three_seconds() -> None:
    path = real("mooncake_conversation_trace.jsonl.gz")
    raw = import_trace("mooncake", path, ImportOptions(jitter_ms=0)).requests
    spread = import_trace("mooncake", path, ImportOptions())
    assert len(raw) == len(spread.requests) == 12_031 and raw[-1].timestamp // 1000 == 3536
    assert cv_of(raw) > 2.5 and cv_of(spread.requests) < 1.2  # the volleys are the clock's, not the users'
    assert any("steps of 3 s" in note for note in spread.notes)
    assert Counter(each.hash_ids for each in raw) == Counter(each.hash_ids for each in spread.requests)


def test_mooncake_s_synthetic_arrivals_are_poisson() -> None:
    imported = import_trace("mooncake", real("mooncake_synthetic_trace.jsonl.gz"), ImportOptions())
    assert len(imported.requests) == 3993 and imported.requests[-1].timestamp // 1000 == 1022
    assert not imported.notes and cv_of(imported.requests) == pytest.approx(1, abs=0.1)


def test_few_functions_have_most_invocations() -> None:
    streams = read_minutes(real(DAY), ImportOptions()).streams
    counts = [stream.least for stream in streams]
    assert counts == [int(row["invocations_24h"]) for row in table(STATS)]
    assert len(counts) == 1250 and sum(counts) == 18_279_781
    shares = [top_share(counts, part) for part in (0.01, 0.05, 0.10, 0.20)]
    assert shares == pytest.approx([0.61, 0.86, 0.93, 0.98], abs=0.006)
    popular = np.log(np.sort(counts)[::-1][:400])
    assert np.polyfit(np.log(np.arange(1, 401)), popular, 1)[0] == pytest.approx(-1.6, abs=0.1)


def test_classes_are_those_known_of_the_day() -> None:
    """By gaps, uniform inside the minute. Random placement moves the few functions that are next to a border."""
    known = table(STATS)
    frequent = [int(row["row"]) for row in known if int(row["invocations_24h"]) >= 20]
    expected = Counter(known[row]["class_by_iat_uniform"] for row in frequent)
    assert expected == {"Predictable": 89, "Normal": 451, "Bursty": 258}

    streams = read_minutes(real(DAY), ImportOptions()).streams
    checked = [row for row in frequent if streams[row].least <= 50_000]  # the busiest few take most of the time
    assert len(checked) > 0.9 * len(frequent)
    found = {row: cv(streams[row].times()) or 0.0 for row in checked}
    off = [abs(found[row] / float(known[row]["cv_iat_uniform_in_minute"]) - 1) for row in checked]
    assert np.median(off) < 0.01 and np.percentile(off, 95) < 0.1
    alike = [class_of(found[row]) == known[row]["class_by_iat_uniform"] for row in checked]
    assert np.mean(alike) > 0.98


def test_only_functions_that_people_call() -> None:
    path = real("azure_functions_2019_invitro_500fn_480min_triggers.csv.gz")
    everything = read_minutes(path, ImportOptions())
    assert len(everything.streams) == 500 and sum(stream.least for stream in everything.streams) == 3_037_902
    assert everything.first_minute == 480 and everything.duration_s == 480 * 60
    of_trigger = {
        trigger: len(read_minutes(path, ImportOptions(trigger=trigger)).streams)
        for trigger in ("http", "timer", "queue")
    }
    assert of_trigger == {"http": 139, "timer": 247, "queue": 69}
    options = ImportOptions(lengths=LENGTHS, trigger="http", functions=10, popularity_cap=1000)
    notes = import_trace("azure-functions", path, options).notes
    assert notes[0].startswith("10 of the 139 functions") and "first minute, 480" in " ".join(notes)


def test_the_head_of_azure_functions_2021() -> None:
    imported = import_trace(
        "azure-functions-2021", real("azure_functions_2021_first199.csv"), ImportOptions(lengths=LENGTHS)
    )
    assert len(imported.requests) == 199 and len({each.model for each in imported.requests}) == 31
    assert 1190 < imported.requests[-1].timestamp / 1000 < 1201


@pytest.mark.parametrize(
    ("name", "clients", "top_tenth", "busiest"),
    [("small", 43, 0.71, 0.30), ("mid", 108, 0.79, 0.52), ("large", 162, 0.74, 0.16)],
)
def test_few_clients_of_servegen_have_most_requests(name: str, clients: int, top_tenth: float, busiest: float) -> None:
    windows = read_clients(real(f"servegen_m-{name}_clients_10min.csv.gz"))
    counts = [sum(requests_in(each, 600.0) for each in of_client) for of_client in windows.values()]
    assert len(counts) == clients
    assert top_share(counts, 0.1) == pytest.approx(top_tenth, abs=0.02)
    assert max(counts) / sum(counts) == pytest.approx(busiest, abs=0.01)


def test_an_hour_of_servegen_s_clients() -> None:
    path = real("servegen_m-small_clients_10min.csv.gz")
    options = ImportOptions(lengths=LENGTHS, start_s=3 * 86_400, duration_s=3600, popularity_cap=3000)
    trace = import_trace("servegen", path, options)
    hour = [
        (int(row["client"]), float(row["rate_rps"]))
        for row in table(path.name)
        if 3 * 86_400 <= float(row["window_start_s"]) < 3 * 86_400 + 3600
    ]
    per_client: Counter[int] = Counter()
    for client, rate in hour:
        per_client[client] += round(600 * rate)
    expected = sorted(n for n in per_client.values() if n <= 3000)
    assert sorted(Counter(each.model for each in trace.requests).values()) == expected


@pytest.mark.parametrize(
    ("classes", "functions", "variation"),
    [
        (("Predictable",), 16, (0.9, 1.1)),
        (("Normal",), 16, (1.15, 2.0)),
        (("Bursty",), 16, (2.0, 6.0)),
        (CLASSES, 24, (1.05, 1.8)),
    ],
)
def test_an_hour_of_adapters_of_each_class(
    classes: tuple[str, ...], functions: int, variation: tuple[float, float]
) -> None:
    """As the traces under `derived` were made: 10:00 to 11:00, one request per second, lengths of conversations."""
    lengths = EmpiricalLengths(str(real("AzureLLMInferenceTrace_conv.csv.gz")))
    options = ImportOptions(
        seed=7, start_s=36_000, duration_s=3600, functions=functions, classes=classes, rate_rps=1, lengths=lengths
    )
    trace = import_trace("azure-functions", real(DAY), options).requests
    facts = adapter_facts(trace)
    assert Counter(each.class_ for each in facts) == dict.fromkeys(classes, functions // len(classes))
    assert all(each.n >= MIN_ARRIVALS for each in facts) and facts[0].share < 0.5
    assert len(trace) == pytest.approx(3600, rel=0.1)
    assert variation[0] < cv_of(trace) < variation[1]
    assert np.mean([each.input_length for each in trace]) == pytest.approx(1155, rel=0.1)
    assert np.mean([each.output_length for each in trace]) == pytest.approx(211, rel=0.1)


@pytest.mark.parametrize(
    ("name", "adapters", "requests", "variation", "share"),
    [
        ("predictable", 16, 3639, 1.00, 0.17),
        ("normal", 16, 3900, 1.34, 0.39),
        ("bursty", 16, 3292, 2.78, 0.22),
        ("mixed", 24, 3617, 1.28, 0.14),
    ],
)
def test_the_traces_that_were_derived(name: str, adapters: int, requests: int, variation: float, share: float) -> None:
    trace = read_trace(real(f"derived/azf2019_{name}_{adapters}ad_60min.jsonl.gz"))
    facts = adapter_facts(trace)
    assert (len(trace), len(facts)) == (requests, adapters)
    assert cv_of(trace) == pytest.approx(variation, abs=0.01) and facts[0].share == pytest.approx(share, abs=0.01)
    classes = {class_of(each.cv) for each in facts if each.cv is not None}
    assert classes == (set(CLASSES) if name == "mixed" else {name.capitalize()})


def test_burstgpt_s_hours() -> None:
    """A table of the log, not the log: how it would have to come out of the importer if somebody has it."""
    hours = table("burstgpt1_derived_hourly_counts.csv")
    assert len(hours) == 1047 and sum(int(each["requests"]) for each in hours) == 1_429_737
    assert int(hours[-1]["time_bin_s"]) // 86_400 + 1 == 61
