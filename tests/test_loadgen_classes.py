"""How bursty an adapter is: the coefficient of variation of its gaps, and the class that follows."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serverlesslora_loadgen.classes import MIN_ARRIVALS, adapter_facts, class_of, cv
from serverlesslora_loadgen.trace import TraceRequest


def asked(model: str, *seconds: float) -> list[TraceRequest]:
    return [TraceRequest(timestamp=1000 * at, input_length=1, output_length=1, model=model) for at in seconds]


@given(gaps=st.lists(st.floats(0, 1000), min_size=MIN_ARRIVALS - 1, max_size=60), factor=st.floats(0.01, 100))
def test_cv_is_the_plain_formula_and_knows_no_unit(gaps: list[float], factor: float) -> None:
    assume(sum(gaps) > 1)
    times = np.concatenate([[5.0], 5 + np.cumsum(gaps)])
    found = cv(times)
    assert found == pytest.approx(statistics.pstdev(gaps) / statistics.fmean(gaps), abs=1e-6)
    assert cv(factor * times) == pytest.approx(found, abs=1e-6)
    assert found is not None and found <= (len(gaps) - 1) ** 0.5 + 1e-6


def test_too_few_requests_or_all_at_once_have_none() -> None:
    assert cv(range(MIN_ARRIVALS - 1)) is None
    assert cv(range(MIN_ARRIVALS)) == 0
    assert cv([3.0] * 20) is None


def test_limits_belong_to_the_tamer_class() -> None:
    found = [class_of(each) for each in (0, 1, 1.001, 4, 4.001)]
    assert found == ["Predictable", "Predictable", "Normal", "Normal", "Bursty"]


def test_facts_of_adapters_come_by_popularity() -> None:
    steady = asked("steady", *range(1, 21))
    rare = asked("rare", 4.0, 10.0)
    also = asked("also", 3.0, 20.0)
    requests = sorted(steady + rare + also, key=lambda each: each.timestamp)
    facts = adapter_facts(requests)
    assert [each.model for each in facts] == ["steady", "also", "rare"]
    assert [each.n for each in facts] == [20, 2, 2]
    assert facts[0].rate_rps == pytest.approx(1.0)
    assert facts[0].share == pytest.approx(20 / 24)
    assert [each.cv for each in facts] == [pytest.approx(0), None, None]
    assert [each.class_ for each in facts] == ["Predictable", None, None]
    # From the start of the trace, between its requests, until the trace's last: whichever is longest.
    assert [each.silence_max_s for each in facts] == pytest.approx([1, 17, 10])
    assert adapter_facts([]) == []
