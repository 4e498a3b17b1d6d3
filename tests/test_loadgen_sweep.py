"""The search for the highest good rate, on servers that are functions of the rate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from serverlesslora_loadgen.result import Estimate, Result
from serverlesslora_loadgen.sweep import Found, compressed, sweep
from serverlesslora_loadgen.trace import TraceRequest
from tests.loadgen_samples import sample

RESULT = sample()


def with_attainment(share: float, *, valid: bool = True) -> Result:
    whole = replace(RESULT.whole, attainment=Estimate(share, 100))
    return replace(RESULT, whole=whole, verdict=replace(RESULT.verdict, valid=valid))


def found(server: Callable[[float], Result], *, rate_rps: float = 1.0, max_trials: int = 40) -> Found:
    async def trial(speedup: float) -> Result:
        return server(rate_rps * speedup)

    return asyncio.run(sweep(trial, rate_rps=rate_rps, max_trials=max_trials))


@given(st.floats(0.1, 200), st.floats(1, 10))
def test_the_capacity_is_found_from_below_within_the_precision(capacity: float, rate_rps: float) -> None:
    best = found(lambda rate: with_attainment(0.99 if rate <= capacity else 0.5), rate_rps=rate_rps).best
    assert best is not None
    assert best.rate_rps <= capacity * (1 + 1e-9) and best.rate_rps * 1.1 >= capacity * (1 - 1e-9)


def test_where_nothing_is_good_there_is_no_best() -> None:
    result = found(lambda rate: with_attainment(0.2))
    assert result.best is None and len(result.points) > 5
    assert sorted((point.rate_rps for point in result.points), reverse=True) == [p.rate_rps for p in result.points]


def test_a_client_that_fell_behind_proves_nothing() -> None:
    best = found(lambda rate: with_attainment(1.0, valid=rate <= 4)).best
    assert best is not None and best.rate_rps <= 4


def test_trials_are_bounded() -> None:
    assert len(found(lambda rate: with_attainment(0.99 if rate <= 37 else 0.1), max_trials=3).points) == 3


def test_compressing_keeps_everything_but_time() -> None:
    requests = [TraceRequest(timestamp=at, input_length=3, output_length=2, model="a") for at in (0.0, 100.0, 300.0)]
    faster = compressed(requests, 4.0)
    assert [each.timestamp for each in faster] == pytest.approx([0.0, 25.0, 75.0])
    assert [replace(each, timestamp=0.0) for each in faster] == [replace(each, timestamp=0.0) for each in requests]
