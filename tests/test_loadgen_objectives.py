from __future__ import annotations

import contextlib
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlesslora_loadgen.analysis.objectives import INCORRECT, check_objectives, parse_limits, parse_objective
from serverlesslora_loadgen.errors import ObjectiveError
from serverlesslora_loadgen.record import Record
from serverlesslora_loadgen.result import Limits, Objective, Verdict
from tests.loadgen_runs import answered, failed, result, setup, shed, unsent

# --- reading


@pytest.mark.parametrize(
    ("text", "name", "limit", "share", "is_count"),
    [
        ("ttft=500ms:p99", "ttft", 0.5, Fraction(99, 100), False),
        ("tpot=50ms:p95", "tpot", 0.05, Fraction(95, 100), False),
        ("e2e=10s:p99.9", "e2e", 10.0, Fraction(999, 1000), False),
        (" TTFT = 1 s : P50 ", "ttft", 1.0, Fraction(1, 2), False),
        ("gap=2s:max", "gap", 2.0, Fraction(1), False),
        ("errors=0", "errors", 0.0, None, True),
        ("errors=0.1%", "errors", 0.001, None, False),
        ("shed=1%", "shed", 0.01, None, False),
        ("wrong=0", "wrong", 0.0, None, True),
        ("cold=5%", "cold", 0.05, None, False),
        ("attainment=99%", "attainment", 0.99, None, False),
        ("attainment=0.99", "attainment", 0.99, None, False),
    ],
)
def test_objectives(text: str, name: str, limit: float, share: Fraction | None, is_count: bool) -> None:
    found = parse_objective(text)
    assert (found.name, found.share, found.is_count) == (name, share, is_count)
    assert found.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    [
        *("", "ttft", "ttft=", "ttft=500ms", "ttft=500ms:", "ttft=500ms:99", "ttft=500ms:p0", "ttft=500ms:p101"),
        *("ttft=fast:p99", "ttft=0:p99", "ttft=-1s:p99", "ttft=nan:p99", "ttft=1e-3:p99:p50", "latency=1s:p99"),
        *("errors=0.5", "errors=-1", "errors=many", "shed=101%", "errors=%", "attainment=99", "attainment=-1%"),
        *("attainment=", "wrong=x", "=1", "cold=1e-3", "errors<=0", "ttft=٣s:p99", "errors=٣"),
    ],
)
def test_what_is_no_objective(text: str) -> None:
    with pytest.raises(ObjectiveError) as error:
        parse_objective(text)
    assert repr(text.partition("=")[0].strip())[1:-1] in str(error.value)


@given(st.text(max_size=30) | st.from_regex(r"(ttft|errors|attainment)=.{0,12}", fullmatch=True))
def test_any_text_is_an_objective_or_an_error_for_people(text: str) -> None:
    with contextlib.suppress(ObjectiveError):
        assert parse_objective(text).limit >= 0


def test_limits() -> None:
    assert parse_limits("ttft=500ms,tpot=50ms") == Limits(ttft_s=0.5, tpot_s=0.05)
    assert parse_limits(" e2e = 10 s , ") == Limits(e2e_s=10.0)


@pytest.mark.parametrize("text", ["", ",", "ttft", "ttft=0", "ttft=500ms:p99", "gap=1s", "ttft=1s,ttft=2s", "ttft=x"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ObjectiveError):
        parse_limits(text)


# --- judging


def judged(records: list[Record], *texts: str, **more: Any) -> Verdict:
    return result(records, objectives=texts, **more).verdict


def objective(verdict: Verdict, name: str) -> Objective:
    return next(each for each in verdict.objectives if each.text.startswith(f"{name}="))


def answers(n: int, **more: Any) -> list[Record]:
    return [answered(i, **more) for i in range(n)]


def test_a_percentile_is_judged_over_all_that_was_sent() -> None:
    records = [*answers(99), answered(99, ttft=9.0)]
    assert judged(records, "ttft=500ms:p99").passed
    assert objective(judged(records, "ttft=500ms:p99"), "ttft").found == pytest.approx(0.1)
    assert not judged(records, "ttft=500ms:max").passed
    assert not judged([*records, answered(100, ttft=9.0)], "ttft=500ms:p99").passed


@pytest.mark.parametrize("lost", [shed, failed, unsent])
def test_what_was_not_answered_is_later_than_any_limit(lost: Any) -> None:
    records = [*answers(98), lost(98), lost(99)]
    verdict = judged(records, "ttft=1h:p99", "e2e=1h:p99", "tpot=1h:p99", "shed=10%", "errors=10%")
    for name in ("ttft", "e2e", "tpot"):
        assert objective(verdict, name) == Objective(text=f"{name}=1h:p99", limit=3600.0, found=None, met=False)
    assert "2 of 100 requests were never answered" in "".join(verdict.reasons)
    assert objective(judged(records, "ttft=1h:p98"), "ttft").met


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    records = [*answers(5, tokens=1), answered(5)]
    assert objective(judged(records, "tpot=10.1ms:p99"), "tpot").met
    alone = objective(judged(answers(5, tokens=1), "tpot=10ms:p99"), "tpot")
    assert (alone.found, alone.met) == (None, False)


@pytest.mark.parametrize(
    ("text", "met"), [("errors=1", False), ("errors=2", True), ("errors=1.9%", False), ("errors=2%", True)]
)
def test_errors_by_number_and_by_share_of_sent(text: str, met: bool) -> None:
    records = [*answers(98), failed(98), failed(99, failure="timeout")]
    assert objective(judged(records, text), "errors").met is met
    assert judged(records, text).passed is met


def test_without_a_word_no_error_is_allowed() -> None:
    assert judged(answers(100)).passed
    verdict = judged([*answers(99), failed(99)])
    assert verdict.valid and not verdict.passed
    assert verdict.reasons == ["errors=0 was asked, 1 was found"]
    assert not judged([*answers(99), failed(99)], "ttft=10s:p50").passed
    assert [each.text for each in judged(answers(10), "ttft=1s:p50").objectives] == [
        *("ttft=1s:p50", "errors=0", "shed=5%")
    ]


@pytest.mark.parametrize(("number", "passed"), [(5, True), (6, False)])
def test_without_a_word_five_in_a_hundred_may_be_shed(number: int, passed: bool) -> None:
    records = [*answers(100 - number), *(shed(i) for i in range(100 - number, 100))]
    assert judged(records).passed is passed
    assert judged(records, "shed=10%").passed
    assert not judged(records, "shed=1%").passed
    assert not judged(records, "shed=0").passed


def test_attainment() -> None:
    records = [*answers(98), answered(98, ttft=0.6), shed(99)]
    assert judged(records, "attainment=98%").passed
    assert not judged(records, "attainment=98.1%").passed
    assert objective(judged(records, "attainment=99%"), "attainment").found == 0.98


def test_attainment_of_no_limits_is_not_met() -> None:
    verdict = judged(answers(50), "attainment=50%", limits=Limits())
    assert objective(verdict, "attainment").found is None and not verdict.passed
    assert any("no limits were set" in reason and "--limit" in reason for reason in verdict.reasons)
    assert judged([answered(i, deadline_s=1.0) for i in range(50)], "attainment=50%", limits=Limits()).passed


def test_attainment_of_no_limits_is_refused_before_the_run() -> None:
    with pytest.raises(ObjectiveError, match=r"attainment=99%.*--limit"):
        check_objectives(["errors=0", "attainment=99%"], Limits(), deadlines=False)
    check_objectives(["attainment=99%"], Limits(), deadlines=True)
    check_objectives(["attainment=99%"], Limits(e2e_s=1.0), deadlines=False)
    check_objectives(["errors=0", "ttft=1s:p99"], Limits(), deadlines=False)
    with pytest.raises(ObjectiveError):
        check_objectives(["nonsense"], Limits(e2e_s=1.0), deadlines=False)


def test_cold_starts_of_those_the_server_said_it_of() -> None:
    records = [*answers(48), *(answered(i, cold="worker") for i in (48, 49)), *(shed(i) for i in range(50, 55))]
    assert objective(judged(records, "cold=4%"), "cold").found == 0.04  # what was shed makes it no better
    assert not objective(judged(records, "cold=3.9%"), "cold").met
    assert objective(judged(records, "cold=2"), "cold").met
    silent = judged(answers(10, cold="unknown"), "cold=5%")
    assert not silent.passed and objective(silent, "cold").found is None


def test_nothing_wrong_must_have_been_looked_for() -> None:
    assert judged(answers(10), "wrong=0").passed
    verdict = judged(answers(10), "wrong=0", setup=setup(verified=False))
    assert not verdict.passed and objective(verdict, "wrong").found is None
    assert "--verify" in verdict.reasons[0]
    found = objective(judged([*answers(9), failed(9, failure="wrong-model")], "wrong=0"), "wrong")
    assert (found.found, found.met) == (1.0, False)


# --- what can never be green

EVERYTHING_ALLOWED = ("errors=100%", "shed=100%", "wrong=100%", "attainment=0%", "ttft=1h:p1")


@pytest.mark.parametrize("failure", INCORRECT)
@pytest.mark.parametrize("objectives", [(), ("ttft=10s:p50",), EVERYTHING_ALLOWED])
def test_one_incorrect_answer_is_enough(failure: str, objectives: tuple[str, ...]) -> None:
    verdict = judged([*answers(999), failed(999, failure=failure)], *objectives)
    assert verdict.valid and not verdict.passed
    assert f"answers were not correct: 1 {failure}" in verdict.reasons


def test_a_wrong_adapter_is_never_green() -> None:
    for objectives in ((), EVERYTHING_ALLOWED):
        verdict = judged([failed(i, failure="wrong-answer") for i in range(100)], *objectives)
        assert not verdict.passed
        verdict = judged([*answers(99), failed(99, failure="wrong-model")], *objectives)
        assert not verdict.passed


def test_a_truncating_server_is_never_green() -> None:
    for objectives in ((), EVERYTHING_ALLOWED):
        assert not judged([failed(i, failure="truncated") for i in range(100)], *objectives).passed


def test_a_shedding_server_is_never_green() -> None:
    records = [answered(i, ttft=0.001) if i % 10 == 0 else shed(i) for i in range(1000)]
    for objectives in ((), ("ttft=500ms:p99",), EVERYTHING_ALLOWED):
        verdict = judged(records, *objectives)
        assert verdict.valid and not verdict.passed
        assert "only 100 of 1,000 requests were answered" in verdict.reasons
    assert result(records).whole.attainment.value == 0.1


def test_a_failing_server_is_never_green() -> None:
    records = [answered(i) if i % 10 == 0 else failed(i, failure="status") for i in range(100)]
    assert not judged(records, *EVERYTHING_ALLOWED).passed


def test_a_server_that_says_nothing_is_never_green() -> None:
    """All well formed, and not one token."""
    silent = answers(100, tokens=1, first_token_s=None, second_token_s=None, last_token_s=None, output_tokens=0)
    for objectives in ((), ("ttft=10s:p99",), EVERYTHING_ALLOWED):
        assert not judged(silent, *objectives).passed


@given(
    st.lists(st.sampled_from(["ok", "ok", "ok", "shed", "stall", "wrong-answer", "truncated", "unsent"]), max_size=30),
    st.lists(st.sampled_from(["ttft=1s:p99", "errors=5%", "shed=50%", "attainment=50%", "wrong=1"]), max_size=3),
)
def test_passed_means_valid_and_met_and_nothing_wrong(outcomes: list[str], texts: list[str]) -> None:
    def made(number: int, outcome: str) -> Record:
        known = {"ok": answered, "shed": shed, "unsent": unsent}
        return known[outcome](number) if outcome in known else failed(number, failure=outcome)

    verdict = judged([made(i, outcome) for i, outcome in enumerate(outcomes)], *texts)
    assert verdict.passed == (not verdict.reasons)
    if verdict.passed:
        assert verdict.valid and all(each.met for each in verdict.objectives)
        assert not {"wrong-answer", "truncated", "unsent"} & set(outcomes)
        assert 2 * outcomes.count("ok") >= len(outcomes) > 0
        assert "stall" not in outcomes or "errors=5%" in texts
