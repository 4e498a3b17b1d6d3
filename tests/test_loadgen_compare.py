from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from serverlesslora_loadgen.analysis.differences import Difference, Pair, resampled, times
from serverlesslora_loadgen.compare import Comparison, compare, print_comparison, write_comparison
from serverlesslora_loadgen.errors import ResultError
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Calibration, Limits
from tests.loadgen_runs import answered, failed, many, result, run, setup, shed, slower, unsent

GREEN = {"A faster", "B faster", "A better", "B better"}


def compared(a: list[Record], b: list[Record], setups: tuple[Any, Any] | None = None, **more: Any) -> Comparison:
    left, right = setups or (setup(), setup())
    return compare(result(a, setup=left, title="left", **more), result(b, setup=right, title="right", **more), a, b)


def verdicts(found: Comparison) -> dict[str, str]:
    return {each.metric: each.verdict for each in found.differences}


def metric(found: Comparison, name: str) -> Difference:
    return next(each for each in found.differences if each.metric == name)


def noisy(records: list[Record], seed: int, scale: float = 0.02) -> list[Record]:
    """As another run of the same server."""
    rng = np.random.default_rng(seed)
    return slower(records, lambda ttft: ttft * float(rng.normal(0, scale)))


def test_the_same_run_twice_does_not_differ() -> None:
    records = many(1000)
    found = compared(records, records)
    assert found.paired
    assert set(verdicts(found).values()) == {"no difference"}
    assert all(each.difference == each.low == each.high == 0 for each in found.differences)


def test_two_runs_of_one_server_do_not_differ() -> None:
    records = many(600)
    for seed in range(4):
        found = compared(records, noisy(records, seed))
        assert not GREEN & set(verdicts(found).values()), seed


def ttfts(records: list[Record]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([each.ttft_s for each in records], dtype=np.float64)


def apart(a: list[Record], b: list[Record]) -> list[Difference]:
    """Of requests that are not the same ones."""
    return list(times("ttft", Pair(ttfts(a), ttfts(b)), paired=False, least_s=0.0, withheld=()))


def test_two_draws_of_one_load_do_not_differ() -> None:
    said = []
    for seed in range(16):
        said += [each.verdict in GREEN for each in apart(many(500, seed=2 * seed), many(500, seed=2 * seed + 1))]
    assert sum(said) <= 0.08 * len(said)  # 5 % is what a 95 % interval allows


def test_a_slower_server_is_slower() -> None:
    records = many(1000)
    slow = slower(records, lambda ttft: 0.3 * ttft)
    found = compared(records, slow)
    assert found.paired
    assert verdicts(found)["ttft p50"] == verdicts(found)["e2e p50"] == verdicts(found)["ttft p99"] == "A faster"
    assert verdicts(found)["tpot p50"] == "no difference"
    assert verdicts(compared(slow, records))["ttft p50"] == "B faster"
    assert [each.verdict for each in apart(records, slow)] == ["A faster", "A faster"]
    assert [each.verdict for each in apart(slow, records)] == ["B faster", "B faster"]
    ttft = metric(found, "ttft p50")
    assert ttft.low is not None and ttft.high is not None and ttft.difference is not None
    assert 0 < ttft.low <= ttft.difference <= ttft.high
    assert ttft.difference == pytest.approx(0.3 * 0.1, rel=0.1)


def test_the_same_requests_show_what_others_would_not() -> None:
    records = many(1000)
    slow = slower(records, lambda ttft: 0.02 * ttft)
    together, others = metric(compared(records, slow), "ttft p50"), apart(records, slow)[0]
    assert together.verdict == "A faster" and others.verdict == "no difference"
    assert together.low is not None and together.high is not None
    assert others.low is not None and others.high is not None
    assert together.high - together.low < 0.5 * (others.high - others.low)


def test_less_than_one_in_a_hundred_has_no_name() -> None:
    records = many(1000)
    found = compared(records, slower(records, lambda ttft: 0.005 * ttft))
    ttft = metric(found, "ttft p50")
    assert ttft.low is not None and ttft.low > 0 and ttft.verdict == "no difference"


def test_what_the_client_adds_has_no_name() -> None:
    calibrated = replace(
        setup(),
        calibration=Calibration(
            measured_at="", added_ttft_p50_s=0.004, added_ttft_p99_s=0.01, lag_p99_s=0.001, rate_rps=300
        ),
    )
    records = many(1000)
    slow = slower(records, lambda _: 0.003)
    assert metric(compared(records, slow), "ttft p50").verdict == "A faster"
    assert metric(compared(records, slow, (calibrated, setup())), "ttft p50").verdict == "no difference"


@pytest.mark.parametrize(("n", "few"), [(9, True), (10, False), (499, True), (500, False)])
def test_few_requests_say_nothing(n: int, few: bool) -> None:
    records = many(n)
    found = verdicts(compared(records, slower(records, lambda ttft: ttft)))
    name = "ttft p50" if n < 100 else "ttft p99"
    assert found[name] == ("n too small" if few else "A faster")
    assert n > 100 or found["ttft p99"] == "n too small"


def test_a_server_that_sheds_is_not_faster() -> None:
    """It answers one in ten, at once; the other takes all."""
    records = many(1000)
    shedding = [
        slower([record], lambda ttft: -0.9 * ttft)[0]
        if record.id % 10 == 0
        else shed(record.id, record.intended_s, model=record.model)
        for record in records
    ]
    found = compared(records, shedding)
    assert {name: each for name, each in verdicts(found).items() if name != "attainment"} == {
        **{f"{latency} {share}": "A faster" for latency in ("ttft", "tpot", "e2e") for share in ("p50", "p99")},
        "answered": "A better",
    }
    assert verdicts(found)["attainment"] == "A better"
    ttft = metric(found, "ttft p50")
    assert ttft.b is None and ttft.difference is None and ttft.a is not None
    assert verdicts(compared(shedding, shedding))["ttft p50"] == "no difference"


def test_a_few_sheds_move_the_tail_only() -> None:
    records = many(1000)
    some = [shed(r.id, r.intended_s) if r.id % 40 == 0 else r for r in records]
    found = verdicts(compared(records, some))
    assert found["ttft p99"] == "A faster" and found["answered"] == "A better"


@pytest.mark.parametrize("failure", ["wrong-answer", "wrong-model", "truncated", "usage-mismatch"])
def test_a_server_that_answers_wrongly_is_ahead_in_nothing(failure: str) -> None:
    right = slower(many(500), lambda ttft: ttft)
    wrong = [replace(each, outcome="failed", failure=failure) if each.id == 7 else each for each in many(500)]
    found = compared(right, wrong)
    assert not {"B faster", "B better"} & set(verdicts(found).values())
    assert verdicts(found)["ttft p50"] == "no verdict"
    assert f"B gave answers that were not correct, and is ahead in nothing: 1 {failure}" in found.warnings


def test_a_server_that_answers_wrongly_may_be_behind() -> None:
    wrong = slower(many(500), lambda ttft: ttft)
    wrong[7] = replace(wrong[7], outcome="failed", failure="wrong-answer")
    assert verdicts(compared(many(500), wrong))["ttft p50"] == "A faster"


def test_a_run_that_is_not_valid_has_no_verdict() -> None:
    records = many(600)
    lost = [*slower(records, lambda ttft: ttft)[:-1], unsent(599, records[-1].intended_s)]
    found = compared(records, lost)
    assert set(verdicts(found).values()) == {"no verdict"}
    assert found.warnings[0].startswith("B is INVALID")


def test_loops_that_mean_different_things_are_refused() -> None:
    records = many(10)
    with pytest.raises(ResultError, match="closed loop"):
        compare(result(records), result(records, mode="closed"), records, records)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sha256": "b" * 64}, "did not replay the same requests"),
        ({"speedup": 8.0}, "the speed of time is 1 and 8"),
        ({"length_scale": 4.0}, "the scale of lengths is 1 and 4"),
    ],
)
def test_servers_that_were_not_asked_the_same_get_no_verdict(change: dict[str, Any], why: str) -> None:
    records = many(100)
    left = setup()
    pair = (left, replace(left, trace=replace(left.trace, **change)))
    found = compared(records, slower(records, lambda ttft: ttft), pair)
    assert set(verdicts(found).values()) == {"no verdict"}
    assert found.warnings[0].startswith("no verdict: ") and why in found.warnings[0]
    assert metric(found, "ttft p50").difference is not None
    nobody = replace(left, trace=replace(left.trace, sha256=""))
    assert set(verdicts(compared(records, records, (nobody, nobody))).values()) == {"no verdict"}


def test_sweeps_get_no_verdict() -> None:
    records = many(100)
    found = compared(records, slower(records, lambda ttft: ttft), mode="sweep")
    assert set(verdicts(found).values()) == {"no verdict"} and "sweeps" in found.warnings[0]


def test_without_limits_there_is_no_attainment_to_compare() -> None:
    records, pair = many(100), (setup(limits=Limits()), setup(limits=Limits()))
    assert "attainment" not in verdicts(compared(records, records, pair))
    late = [replace(each, deadline_s=0.1) for each in records]
    assert "attainment" in verdicts(compared(late, late, pair))


def test_a_calibration_of_another_client_is_not_believed_in_silence() -> None:
    left = setup()
    here = {"environment": msgspec.to_builtins(left.environment), "processes": 1}
    found = Calibration(
        measured_at="", added_ttft_p50_s=0.0, added_ttft_p99_s=0.0, lag_p99_s=0.0, rate_rps=300, setup=here
    )
    elsewhere = replace(found, setup={**here, "processes": 2})
    records = many(20)
    told = compared(records, records, (replace(left, calibration=found), replace(left, calibration=elsewhere))).warnings
    (warning,) = (each for each in told if "calibration" in each)
    assert warning.startswith("the calibration of B") and "client processes: 2, not 1" in warning


def test_records_of_another_run_are_refused() -> None:
    records = many(10)
    with pytest.raises(ResultError, match=r"B has a result of 10 requests and records of 9"):
        compare(result(records), result(records), records, records[:9])
    with pytest.raises(ResultError):
        compare(result(records), result(records), records, [*records[:9], records[0]])


def test_what_else_differs_is_said() -> None:
    left = setup()
    right = replace(
        setup("b" * 64, limits=Limits(ttft_s=1.0), verified=False),
        target={"url": "http://other", "endpoint": "chat"},
        environment=replace(left.environment, cpu="other", cores=64),
        timers={"keep-alive": {"raw_s": 60.0, "effective_s": 6.0}},
        trace=replace(left.trace, sha256="b" * 64, speedup=10.0),
    )
    records = many(20)
    found = compared(records, records, (left, right))
    told = " | ".join(found.warnings)
    for word in (
        "same requests",
        "limits",
        "endpoint",
        "CPU",
        "cores",
        "timers",
        "speed of time",
        "golden",
        "calibrated",
    ):
        assert word in told, word
    assert "http" not in told
    assert "attainment" not in verdicts(found)
    assert "Unpaired" in found.how and "One run each" in found.how


def test_empty_runs() -> None:
    found = compare(result([]), result([]), [], [])
    assert set(verdicts(found).values()) == {"no verdict"}


def test_neighbours_are_late_together() -> None:
    """A queue makes blocks of late requests; to take them one by one would find a doubt that is much too small."""
    rng = np.random.default_rng(0)
    truths, doubts = [], []
    for _ in range(40):
        values = np.repeat(rng.lognormal(0, 1, 40), 25)
        drawn = resampled(Pair(values, np.zeros(1000)), lambda rows: rows.mean(axis=1, keepdims=True), paired=True)
        truths.append(values.mean())
        doubts.append(drawn.std())
    assert 0.6 * np.std(truths) < np.mean(doubts) < 1.4 * np.std(truths)


def test_a_comparison_as_json_and_on_a_screen(tmp_path: Path) -> None:
    records = many(600)
    found = compared(records, [shed(r.id, r.intended_s) if r.id % 2 else r for r in records])
    write_comparison(tmp_path / "c.json", found)
    assert msgspec.json.decode((tmp_path / "c.json").read_bytes(), type=Comparison) == found
    console = Console(file=io.StringIO(), width=160)
    print_comparison(replace(found, a="[red]left[/] :smile:"), console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "[red]left[/] :smile:" in shown
    for each in found.differences:
        assert each.metric in shown and each.verdict in shown
    assert "never" in shown or all(each.b is not None for each in found.differences)


def test_an_answer_of_one_token_is_compared_by_what_it_has() -> None:
    records = [answered(i, ttft=0.1, tokens=1) for i in range(20)]
    found = compared(records, records)
    assert verdicts(found)["tpot p50"] == "n too small" and metric(found, "tpot p50").n_a == 0
    assert verdicts(found)["ttft p50"] == "no difference"


def test_a_failure_that_looked_fast_is_no_fast_answer() -> None:
    records = [answered(i) for i in range(20)]
    found = compared(records, [failed(i) for i in range(20)])
    assert metric(found, "ttft p50").b is None and verdicts(found)["ttft p50"] == "A faster"
    assert not math.isnan(metric(found, "ttft p50").a or math.nan)
    assert run(records).records == records
