from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from serverlesslora_loadgen.analysis import objectives, statistics
from serverlesslora_loadgen.analysis.build import complete
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.observe import Sample
from serverlesslora_loadgen.record import Failure, Record
from serverlesslora_loadgen.result import Calibration, Estimate, Limits, Result, read_result, write_result
from serverlesslora_loadgen.trace import TraceRequest
from tests.loadgen_runs import LIMITS, answered, failed, many, result, run, setup, shed, slower, unsent

times = st.floats(1e-6, 1e4, allow_nan=False)


# --- estimates


@given(values=st.lists(times, min_size=1, max_size=50), percent=st.integers(1, 100))
def test_a_percentile_is_the_smallest_seen_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    found = statistics.percentile(np.sort(values), Fraction(percent, 100)).value
    obvious = min(v for v in values if 100 * sum(each <= v for each in values) >= percent * len(values))
    assert found == obvious


@pytest.mark.parametrize(
    ("name", "least"), [("p50", 10), ("p90", 50), ("p95", 100), ("p99", 500), ("p99.9", 5000), ("max", None)]
)
def test_a_percentile_has_an_interval_only_with_enough_values(name: str, least: int | None) -> None:
    share = statistics.SHARES[name]
    for n in (1, 5, 9, 10, 49, 50, 99, 100, 499, 500, 4999, 5000, 10**6):
        assert statistics.is_enough(n, share) == (least is not None and n >= least)
    few = statistics.distribution(np.linspace(1, 2, (least or 100) - 1)).percentiles[name]
    assert (few.low, few.high, few.n) == (None, None, (least or 100) - 1)
    if least is not None:
        enough = statistics.distribution(np.linspace(1, 2, least)).percentiles[name]
        assert enough.low is not None and enough.high is not None and enough.low < enough.value < enough.high


def test_intervals_are_those_of_the_bootstrap_done_the_long_way() -> None:
    rng = np.random.default_rng(1)
    values = np.sort(rng.lognormal(0, 1, 600))
    drawn = np.sort(values[rng.integers(0, 600, (4000, 600))], axis=1)
    for name in ("p50", "p90", "p99"):
        found = statistics.percentile(values, statistics.SHARES[name])
        slow = np.quantile(drawn[:, statistics.rank(600, statistics.SHARES[name]) - 1], (0.025, 0.975))
        assert found.low is not None and found.high is not None
        # In ranks, of which the bootstrap's own doubt is one or two.
        assert np.searchsorted(values, [found.low, found.high]) == pytest.approx(np.searchsorted(values, slow), abs=2)
    mean = statistics.mean(values)
    assert mean.low is not None and mean.high is not None
    assert (mean.low, mean.high) == pytest.approx(tuple(np.quantile(drawn.mean(axis=1), (0.025, 0.975))), rel=0.01)
    assert mean.high - mean.value > 1.05 * (mean.value - mean.low)  # such a tail is longer upwards


def test_95_of_100_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(2)
    held = {"p50": 0, "mean": 0, "share": 0}
    for _ in range(400):
        found = statistics.distribution(rng.exponential(1.0, 200))
        shares = statistics.share(int(rng.binomial(200, 0.97)), 200)
        for name, estimate, truth in (
            ("p50", found.percentiles["p50"], math.log(2)),
            ("mean", found.mean, 1.0),
            ("share", shares, 0.97),
        ):
            assert estimate.low is not None and estimate.high is not None
            held[name] += estimate.low <= truth <= estimate.high
    assert all(0.91 <= count / 400 <= 0.99 for count in held.values()), held


@given(values=st.lists(times, max_size=60))
def test_estimates_are_numbers_inside_their_intervals(values: list[float]) -> None:
    found = statistics.distribution(np.array(values + [math.nan]))
    assert found.n == len(values)
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found
    for each in (found.mean, *found.percentiles.values()):
        assert each.low is None or each.high is None or each.low <= each.value * (1 + 1e-12) <= each.high * (1 + 1e-12)
        assert each.low is None or min(values) <= each.low


@given(n=st.integers(1, 500), data=st.data())
def test_a_share_is_never_without_doubt(n: int, data: st.DataObject) -> None:
    found = statistics.share(data.draw(st.integers(0, n)), n)
    assert found.low is not None and found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_ten_of_ten_may_still_be_nine_of_ten() -> None:
    found = statistics.share(10, 10)
    assert (found.value, found.n, found.high) == (1.0, 10, 1.0)
    assert found.low == pytest.approx(0.7225, abs=0.001)
    assert statistics.share(0, 0) == Estimate(0.0, 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_fairness_lies_between_one_has_all_and_all_have_the_same(values: list[float]) -> None:
    found = statistics.jain(values)
    if found is not None:
        assert 1 / len(values) - 1e-9 <= found <= 1 + 1e-9


def test_fairness() -> None:
    assert statistics.jain([0.3, 0.3, 0.3]) == pytest.approx(1.0)
    assert statistics.jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert statistics.jain([0.0, 0.0]) is None
    assert statistics.jain([]) is None


def test_a_curve_has_101_seen_values() -> None:
    found = statistics.curve([3.0, 1.0, math.nan, 2.0])
    assert len(found) == 101
    assert (found[0], found[33], found[34], found[66], found[67], found[100]) == (1, 1, 2, 2, 3, 3)
    assert statistics.curve([]) == []


# --- denominators


def mixed() -> list[Record]:
    return [
        *(answered(i) for i in range(5)),
        answered(5, ttft=0.9),  # over the limit
        shed(6),
        failed(7),
        failed(8, failure="connect", written_s=None),
        unsent(9),
    ]


def test_attainment_is_good_of_all_that_was_sent() -> None:
    whole = result(mixed()).whole
    assert (whole.counts.sent, whole.counts.ok, whole.counts.shed) == (10, 6, 1)
    assert (whole.counts.failed, whole.counts.unsent) == (2, 1)
    assert whole.attainment.value == 0.5 and whole.attainment.n == 10
    assert whole.counts.failures == {"connect": 1, "stall": 1}


def test_without_limits_attainment_is_answered_of_sent() -> None:
    assert result(mixed(), limits=Limits()).whole.attainment.value == 0.6


def test_what_was_not_answered_is_in_no_latency() -> None:
    whole = result(mixed()).whole
    assert {name: each.n for name, each in whole.latency.items()} == {
        **dict.fromkeys(("ttft", "ttft_from_send", "ttst", "tpot", "max_gap", "e2e", "e2e_from_send"), 6),
        "itl": 60,
    }
    assert whole.latency["ttft"].percentiles["max"].value == pytest.approx(0.9)
    assert whole.counts.output_tokens == 66 and whole.counts.input_tokens == 42


def test_latencies_count_from_the_intended_time() -> None:
    late = answered(0, ttft=0.2, written_s=0.15)
    latency = result([late]).whole.latency
    assert latency["ttft"].mean.value == pytest.approx(0.2)
    assert latency["ttft_from_send"].mean.value == pytest.approx(0.05)
    assert latency["e2e"].mean.value == pytest.approx(0.3)
    assert latency["e2e_from_send"].mean.value == pytest.approx(0.15)
    assert latency["ttst"].mean.value == pytest.approx(0.21)
    assert latency["tpot"].mean.value == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("record", "good"),
    [
        (answered(0, ttft=0.5), True),
        (answered(0, ttft=0.501), False),
        (answered(0, gaps_s=(0.05,) * 10), True),
        (answered(0, gaps_s=(0.051,) * 10), False),
        (answered(0, tokens=1), True),  # nothing between tokens
        (answered(0, deadline_s=0.05), False),
        (answered(0, deadline_s=0.2), True),
        (answered(0, ttft=0.6, deadline_s=0.7), False),  # both hold
        (answered(0, tokens=1, first_token_s=None, last_token_s=None, output_tokens=0), False),
        (failed(0), False),
        (shed(0), False),
        (unsent(0), False),
    ],
)
def test_good(record: Record, good: bool) -> None:
    assert result([record], limits=Limits(ttft_s=0.5, tpot_s=0.05 + 1e-9)).whole.attainment.value == good


def test_the_limit_of_the_whole_answer() -> None:
    records = [answered(0, ttft=0.1), answered(1, ttft=0.3)]
    assert result(records, limits=Limits(e2e_s=0.25)).whole.attainment.value == 0.5


def test_deadlines_are_said_where_results_are_shown() -> None:
    notes = result([answered(0, deadline_s=1.0), answered(1)]).setup.trace.notes
    assert [note for note in notes if note.startswith("1 requests have a deadline")]


def test_goodput_takes_all_the_time_and_only_good_requests() -> None:
    whole = result(mixed(), seconds=2.0).whole  # a run cannot be shorter than its answers
    assert whole.seconds == pytest.approx(8.101)
    assert whole.goodput_rps == pytest.approx(5 / whole.seconds)
    assert whole.goodput_tps == pytest.approx(55 / whole.seconds)
    assert result(mixed(), seconds=20.0).whole.goodput_rps == pytest.approx(5 / 20)


def test_shedding_without_retry_after_is_counted() -> None:
    counts = result([shed(0), shed(1, retry_after_s=None), answered(2)]).whole.counts
    assert (counts.shed, counts.shed_without_retry_after) == (2, 1)


def test_gaps_of_events_with_several_tokens_are_divided() -> None:
    coalesced = answered(0, tokens=12, gaps_s=(0.04, 0.04), chunks=3)
    found = result([coalesced, answered(1)])
    assert found.whole.counts.coalesced == 1
    itl = found.whole.latency["itl"]
    assert itl.n == 12 and itl.percentiles["max"].value == pytest.approx(0.01)
    assert found.whole.latency["max_gap"].percentiles["max"].value == pytest.approx(0.04)  # a stall stays one
    assert found.cdf["gap"]["all"][-1] == pytest.approx(0.04)


# --- nothing gets lost


def test_a_request_without_a_record_was_not_sent() -> None:
    asked = run(many(4)).requests
    found = result([answered(0), answered(2)], requests=asked)
    assert (found.whole.counts.sent, found.whole.counts.unsent) == (4, 2)
    assert found.whole.attainment.value == 0.5
    assert not found.verdict.valid and not found.verdict.passed
    assert [each.id for each in complete(asked, [answered(2), answered(0)])] == [0, 1, 2, 3]


@pytest.mark.parametrize("records", [[answered(0), answered(0)], [answered(1)], [answered(-1, 0.0)]])
def test_records_that_are_not_of_the_trace(records: list[Record]) -> None:
    with pytest.raises(ResultError, match="record"):
        result(records, requests=[TraceRequest(timestamp=0, input_length=1, output_length=1)])


# --- validity


def test_a_client_in_time_is_valid() -> None:
    found = result(many(300)).verdict
    assert found.valid and found.passed and found.reasons == []


@pytest.mark.parametrize(
    ("median", "lag", "valid"),
    [(0.1, 0.0099, True), (0.1, 0.0101, False), (1.0, 0.0499, True), (1.0, 0.0501, False)],
)
def test_more_lag_than_10_ms_or_5_percent_of_ttft_says_nothing(median: float, lag: float, valid: bool) -> None:
    records = [answered(i, ttft=median, written_s=i + (lag if i % 50 == 0 else 0.0)) for i in range(1000)]
    found = result(records, limits=Limits())
    assert found.verdict.valid is valid
    assert found.verdict.passed is valid
    assert valid or "the client was late" in found.verdict.reasons[0]


def test_one_late_request_in_a_hundred_is_forgiven() -> None:
    records = [answered(i, written_s=i + (0.05 if i % 100 == 0 else 0.0)) for i in range(1000)]
    assert result(records).verdict.valid


def test_failures_and_shed_do_not_hide_a_late_client() -> None:
    records = [*(answered(i) for i in range(90)), *(shed(i, written_s=i + 0.1) for i in range(90, 100))]
    assert not result(records, objectives=["shed=50%"]).verdict.valid


def test_one_request_that_was_not_sent_makes_a_run_invalid() -> None:
    found = result([*(answered(i) for i in range(999)), unsent(999)]).verdict
    assert not found.valid and not found.passed
    assert found.reasons[0] == "1 request of 1,000 was not sent"


def test_nothing_sent_is_not_valid() -> None:
    found = result([])
    assert (found.verdict.valid, found.verdict.passed) == (False, False)
    assert found.verdict.reasons[0] == "no request was sent"
    assert found.whole.counts.sent == 0 and found.steady is None and found.whole.attainment.n == 0


def test_a_server_that_is_not_there_makes_no_valid_run() -> None:
    found = result([failed(i, failure="connect", written_s=None) for i in range(3)])
    assert not found.verdict.valid and not found.verdict.passed
    assert found.client.lag is None


def test_a_client_that_sends_too_early_is_not_valid() -> None:
    assert not result([answered(5, 5.0, written_s=4.9)], requests=run(many(6)).requests).verdict.valid
    found = result([answered(0, written_s=-0.1), answered(1)]).verdict
    assert not found.valid and "before their time" in found.reasons[0]


def test_what_is_said_of_the_client() -> None:
    client = result(many(100), cpu_s=5.0, seconds=50.0, processes=2, late_sockets=3).client
    assert (client.processes, client.late_sockets, client.cpu_share) == (2, 3, 0.1)
    assert client.lag is not None and client.lag.percentiles["p50"].value == pytest.approx(0.001)
    assert sum(client.lag_histogram.counts) == 100
    assert len(client.lag_histogram.edges) == len(client.lag_histogram.counts) + 1


def test_lags_outside_the_histogram_are_in_its_ends() -> None:
    found = statistics.histogram(np.array([-1.0, 0.5, 7.0]), [0.0, 0.4, 1.0])
    assert found.counts == [1, 2]


# --- groups


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from("osfu"), st.sampled_from(["warm", "adapter"])),
        min_size=1,
        max_size=40,
    )
)
def test_groups_take_a_whole_apart(what: list[tuple[str, str, str]]) -> None:
    kinds = {"o": answered, "s": shed, "f": failed}
    records = [
        replace(unsent(i), model=model) if kind == "u" else kinds[kind](i, model=model, cold=cold)
        for i, (model, kind, cold) in enumerate(what)
    ]
    found = result(records)
    whole = found.whole.counts
    for dimension, groups in found.whole.groups.items():
        if dimension == "class" or (dimension == "decile" and len({model for model, _, _ in what}) < 10):
            assert groups == []
            continue
        assert sum(group.counts.sent for group in groups) == whole.sent
        assert sum(group.counts.ok for group in groups) == whole.ok == sum(g.latency["ttft"].n for g in groups)
        assert sum(group.counts.failed for group in groups) == whole.failed
        assert all(group.attainment.n == group.counts.sent for group in groups)
        good = sum(group.attainment.value * group.attainment.n for group in groups)
        assert good == pytest.approx(found.whole.attainment.value * whole.sent)
    assert sum(sum(counts) for counts in found.timeline.cold.values()) == whole.sent
    assert sum(found.timeline.offered) == whole.sent
    assert sum(found.timeline.done) == whole.ok
    assert (sum(found.timeline.shed), sum(found.timeline.failed)) == (whole.shed, whole.failed)
    assert found.timeline.in_flight[-1] == 0
    assert msgspec.json.decode(msgspec.json.encode(found), type=Result) == found


def test_adapters_by_popularity_and_deciles_of_them() -> None:
    records, number = [], 0
    for adapter in range(20):
        for _ in range(20 - adapter):
            records.append(answered(number, model=f"m{19 - adapter:02d}", ttft=0.1 if adapter < 10 else 0.6))
            number += 1
    groups = result(records).whole.groups
    assert [group.key for group in groups["adapter"]][:3] == ["m19", "m18", "m17"]
    assert [group.key for group in groups["decile"]] == [str(n) for n in range(1, 11)]
    assert groups["decile"][0].counts.sent == 20 + 19 and groups["decile"][9].counts.sent == 2 + 1
    assert [group.attainment.value for group in groups["decile"]] == [1.0] * 5 + [0.0] * 5


def test_the_head_does_not_hide_the_tail() -> None:
    head = [answered(i, model="head") for i in range(98)]
    tail = [answered(98, model="rare", ttft=3.0, cold="adapter"), shed(99, model="rarest")]
    found = result([*head, *tail]).whole
    assert found.attainment.value == 0.98
    assert found.fairness == pytest.approx(1 / 3)
    assert {group.key: group.attainment.value for group in found.groups["adapter"]} == {
        "head": 1.0,
        "rare": 0.0,
        "rarest": 0.0,
    }
    assert [(group.key, group.counts.sent) for group in found.groups["cold"]] == [
        ("warm", 98),
        ("adapter", 1),
        ("unknown", 1),
    ]


def test_what_was_shed_was_not_warm() -> None:
    cold = result([answered(0), shed(1, cold="warm"), failed(2, cold="warm"), failed(3, cold="worker")])
    assert {group.key: group.counts.sent for group in cold.whole.groups["cold"]} == {
        "warm": 1,
        "worker": 1,
        "unknown": 2,
    }


def test_classes_in_their_order() -> None:
    names = ("Bursty", "vip", None, "Predictable", "Normal", "batch")
    records = [answered(i, class_=name) for i, name in enumerate(names)]
    assert [group.key for group in result(records).whole.groups["class"]] == [
        *("Predictable", "Normal", "Bursty", "batch", "vip", "none")
    ]


def test_slices_of_time() -> None:
    found = result([answered(i, 60.0 * i) for i in range(60)]).whole.groups["slice"]
    assert [group.key for group in found][:2] == ["0–5 min", "5–10 min"]
    assert [group.counts.sent for group in found] == [5] * 12
    found = result([answered(i, float(i)) for i in range(8)]).whole.groups["slice"]
    assert [group.key for group in found][:2] == ["0–1 s", "1–2 s"]


# --- warm-up


def test_the_warm_up_ends_when_each_adapter_has_had_a_request() -> None:
    records = [answered(i, model="ab"[i == 3], ttft=2.0 if i <= 3 else 0.1) for i in range(10)]
    found = result(records)
    assert found.steady is not None
    assert (found.whole.counts.sent, found.steady.counts.sent) == (10, 6)
    assert (found.whole.attainment.value, found.steady.attainment.value) == (0.6, 1.0)
    assert "each adapter" in found.warmup_rule and "4 requests" in found.warmup_rule
    assert found.steady.seconds == pytest.approx(9.0 - 3.0)


def test_a_warm_up_of_some_seconds() -> None:
    found = result([answered(i) for i in range(10)], warmup_s=4.0)
    assert found.steady is not None and found.steady.counts.sent == 6
    assert "4 s" in found.warmup_rule


def test_nothing_is_left_of_a_run_that_was_all_warm_up() -> None:
    assert result([answered(i, model=str(i)) for i in range(5)]).steady is None
    assert result([answered(0)], warmup_s=100.0).steady is None


def test_goodput_after_the_warm_up_is_without_the_drain() -> None:
    """A server that is asked twice as much as it can do, and ends long after, does not get credit for what it is
    asked."""
    records = [answered(i, i / 10, ttft=i / 10) for i in range(100)]
    found = result(records, limits=Limits(), warmup_s=0.0)
    assert found.steady is not None
    assert found.steady.attainment.value == 1.0
    assert found.steady.goodput_rps == pytest.approx(5.0, rel=0.1)  # not 10


def test_objectives_are_judged_with_the_warm_up() -> None:
    records = [answered(i, ttft=5.0 if i == 0 else 0.1) for i in range(20)]
    assert not result(records, objectives=["ttft=1s:max"]).verdict.passed


def test_steady_gaps_are_those_of_its_requests() -> None:
    records = [answered(i, gaps_s=(0.1 if i < 5 else 0.01,) * 10) for i in range(10)]
    found = result(records, warmup_s=5.0).steady
    assert found is not None and found.latency["itl"].n == 50
    assert found.latency["itl"].percentiles["max"].value == pytest.approx(0.01)


# --- when


def test_the_timeline_by_the_second() -> None:
    records = [
        answered(0, 0.0, ttft=2.4),
        shed(1, 0.2),
        failed(2, 1.5),
        answered(3, 1.9, cold="worker"),
        unsent(4, 3.0),
    ]
    line = result(records).timeline
    assert line.step_s == 1.0
    assert line.offered == [2, 2, 0, 1] and line.sent == [2, 2, 0, 0]
    assert line.done == [0, 0, 2, 0] and line.shed == [1, 0, 0, 0] and line.failed == [0, 1, 0, 0]
    assert line.in_flight == [1, 2, 0, 0]
    assert line.cold == {"warm": [1, 0, 0, 0], "unknown": [1, 1, 0, 1], "worker": [0, 1, 0, 0]}
    assert line.workers == [] and line.held_bytes == []


def test_the_timeline_has_what_was_seen_of_the_server() -> None:
    samples = [
        Sample(at_s=-1.0, workers=9),
        Sample(at_s=0.1, workers=1, held_bytes=10),
        Sample(at_s=0.9, workers=3, held_bytes=5),
        Sample(at_s=2.5, workers=2),
        Sample(at_s=99.0, workers=7),
    ]
    line = result([answered(i) for i in range(4)], samples=samples).timeline
    assert line.workers == [3, None, 2, None] and line.held_bytes == [10, None, None, None]


def test_a_long_run_has_longer_steps() -> None:
    line = result([answered(0), answered(1, 86400.0)]).timeline
    assert line.step_s == 15.0 and len(line.offered) == 5761


def test_the_heat_map() -> None:
    records = [answered(i, 10.0 * i, ttft=(0.1, 0.3, 0.2)[i % 3], model="ab"[i >= 90]) for i in range(120)]
    records[119] = shed(119, 1190.0, model="b")
    heat = result(records).heat
    assert heat.adapters == ["a", "b"] and [len(row) for row in heat.ttft_s] == [60, 60]
    assert heat.ttft_s[0][-1] is None and heat.ttft_s[1][0] is None
    slow = [[r.ttft_s for r in records if r.model == "a" and int(r.intended_s // heat.step_s) == c] for c in range(45)]
    for column, values in enumerate(slow):
        ordered = sorted(value for value in values if value is not None)
        assert heat.ttft_s[0][column] == pytest.approx(ordered[(len(ordered) + 1) // 2 - 1])


def interrupted(**more: Any) -> Result:
    """A closed loop of an hour, stopped after 3 s: what never left keeps its time in the trace."""
    records = [
        *(answered(i, 0.28 * i, model="ab"[i % 2]) for i in range(10)),
        *(unsent(i, 10.0 * i) for i in (10, 360)),
    ]
    records = [replace(each, id=number) for number, each in enumerate(records)]
    return result(records, mode="closed", seconds=2.8, **more)


def test_a_run_that_was_interrupted_is_no_longer_than_it_was() -> None:
    found = interrupted()
    assert found.steady is not None
    assert found.steady.seconds == pytest.approx(0.28 * 9 - 0.28) and found.steady.counts.ok == 8
    assert found.steady.goodput_rps == pytest.approx(8 / found.steady.seconds, rel=0.2)
    line = found.timeline
    assert len(line.sent) == len(line.offered) == 3
    assert sum(line.offered) == sum(line.sent) == 10 and {kind: sum(n) for kind, n in line.cold.items()} == {"warm": 10}
    assert len(found.heat.ttft_s[0]) == 3 and found.heat.step_s < 1
    assert found.whole.counts.unsent == 2 and not found.verdict.valid
    assert interrupted(warmup_s=20.0).steady is None


def test_an_adapter_that_was_never_asked_does_not_prolong_the_warm_up() -> None:
    found = result([*(answered(i) for i in range(5)), replace(unsent(5, 900.0), model="never")])
    assert found.steady is not None and found.steady.seconds == pytest.approx(4.0)
    assert result([unsent(0, 9.0)]).steady is None


def test_curves_of_each_kind_of_cold_start() -> None:
    records = [
        answered(i, cold="worker" if i % 10 == 0 else "warm", ttft=2.0 if i % 10 == 0 else 0.1) for i in range(50)
    ]
    found = result([*records, shed(50)]).cdf
    assert set(found) == {"ttft", "e2e", "gap"}
    assert set(found["ttft"]) == {"all", "warm", "worker"}  # nobody knows a latency of what was shed
    assert found["ttft"]["worker"] == pytest.approx([2.0] * 101)
    assert set(result([answered(0)]).cdf["ttft"]) == {"all"}
    assert result([shed(0)]).cdf["ttft"] == {}


def test_the_slowest_with_their_story() -> None:
    records = [answered(i, ttft=0.1 + i / 1000, request_id=f"r{i}") for i in range(40)]
    records[7] = failed(7, failure="timeout", done_s=67.0)
    records[8] = shed(8, done_s=500.0)
    slowest = result(records).slowest
    assert len(slowest) == 20
    assert [each.id for each in slowest[:3]] == [7, 39, 38]
    assert (slowest[0].ttft_s, slowest[1].request_id) == (None, "r39")
    assert slowest[1].stamps["intended"] == 39.0 and slowest[1].stamps["written"] == 39.001
    assert set(slowest[1].stamps) == {"intended", "written", "first_byte", "first_token", "last_token", "done"}


# --- the whole


def test_a_closed_loop_says_so_in_its_title() -> None:
    assert result(many(3), mode="closed", title="x").title == "x (closed loop)"
    assert result(many(3), mode="closed", title="A closed loop").title == "A closed loop"
    assert result(many(3), title="x").title == "x"


def test_limits_that_are_judged_are_the_limits_that_are_shown() -> None:
    found = result([answered(0, ttft=0.3)], limits=Limits(ttft_s=0.2))
    assert found.setup.limits == Limits(ttft_s=0.2) and found.whole.attainment.value == 0.0
    assert result([answered(0, ttft=0.3)]).setup.limits == LIMITS


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    for records in (mixed(), [], [unsent(0)], [shed(0)], [answered(0, tokens=1)], many(700, seed=3)):
        found = result(records)
        write_result(tmp_path / "r.json", found)
        assert read_result(tmp_path / "r.json") == found


def test_the_same_records_give_the_same_result() -> None:
    records = many(600, seed=5)
    assert result(records) == result(list(reversed(records)), requests=run(records).requests)


def test_every_failure_is_a_failure() -> None:
    for name in get_args(Failure):
        found = result([*(answered(i) for i in range(99)), failed(99, failure=name)])
        assert not found.verdict.passed
        assert found.whole.counts.failures == {name: 1}
    assert set(objectives.INCORRECT) < set(get_args(Failure))


def test_a_slower_server_is_seen_everywhere() -> None:
    fast = many(200)
    slow = slower(fast, lambda ttft: ttft)
    a, b = result(fast), result(slow)
    for name in ("ttft", "ttft_from_send", "e2e"):
        assert a.whole.latency[name].percentiles["p50"].value < b.whole.latency[name].percentiles["p50"].value
    assert a.cdf["ttft"]["all"][50] < b.cdf["ttft"]["all"][50]


def calibrated(*, processes: int = 1, **found: Any) -> Calibration:
    machine = msgspec.to_builtins(setup().environment)
    base = {"added_ttft_p50_s": 0.0, "added_ttft_p99_s": 0.0, "lag_p99_s": 0.0, "rate_rps": 300.0}
    fields = {"measured_at": "", "setup": {"processes": processes, "environment": machine}, **base, **found}
    return Calibration(**fields)


def test_a_calibration_that_does_not_fit_is_said() -> None:
    def notes(known: Calibration | None, **more: Any) -> list[str]:
        return result(
            [answered(i, i / 100) for i in range(200)], setup=replace(setup(), calibration=known), **more
        ).setup.trace.notes

    assert notes(None) == notes(calibrated()) == notes(calibrated(max_rps=100.0, max_streams=1000)) == []
    assert notes(calibrated(max_rps=99.0, max_streams=1)) == [
        "100 requests in the busiest second, and the calibrated client bears 99",
        "20 streams at one time, and the calibrated client bears 1",
    ]
    assert "0" in notes(calibrated(max_rps=0.0))[0]
    (note,) = notes(calibrated(processes=2))
    assert "client processes: 2, not 1" in note and "CPU" not in note
    assert "client processes: 1, not 3" in notes(calibrated(), processes=3)[0]
    machine = replace(setup().environment, cpu="another", cores=64)
    elsewhere = calibrated(setup={"processes": 1, "environment": msgspec.to_builtins(machine)})
    assert "CPU: another, not c; cores: 64, not 2" in notes(elsewhere)[0]
    assert "CPU: not told; cores: 2, not 1" not in notes(calibrated(setup={"cores": 2, "processes": 1}))[0]
    assert "CPU: not told" in notes(calibrated(setup={"cores": 2, "processes": 1}))[0]


def test_without_limits_it_is_said_that_there_were_none() -> None:
    notes = result([answered(0)], limits=Limits()).setup.trace.notes
    assert notes == ["no limits were set: whatever was answered counts as good"]
    assert result([answered(0)]).setup.trace.notes == []
    (deadline,) = result([answered(0, deadline_s=1.0)], limits=Limits()).setup.trace.notes
    assert "deadline" in deadline


def test_setups_are_kept() -> None:
    given_setup = setup("b" * 64, verified=False)
    assert result([answered(0)], setup=given_setup).setup == given_setup
