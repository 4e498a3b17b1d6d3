"""The search for the highest good rate, on servers that are functions of the rate."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from serverlesslora_loadgen.analysis.objectives import INCORRECT
from serverlesslora_loadgen.cli.main import main
from serverlesslora_loadgen.cli.running import INVALID, MISSED, PASSED
from serverlesslora_loadgen.cli.sweeping import sentence
from serverlesslora_loadgen.errors import LoadgenError
from serverlesslora_loadgen.result import Estimate, Result, read_result
from serverlesslora_loadgen.run import Finished, Settings, make_setup
from serverlesslora_loadgen.sweep import Found, compressed, sweep
from serverlesslora_loadgen.trace import TraceRequest, write_trace
from tests.loadgen_samples import sample

RESULT = sample()


def with_attainment(
    share: float, *, valid: bool = True, passed: bool = True, failures: dict[str, int] | None = None
) -> Result:
    counts = replace(RESULT.whole.counts, failures=failures or {})
    whole = replace(RESULT.whole, attainment=Estimate(share, 100), counts=counts)
    reasons = [] if valid and passed else ["ttft=1s:p99 was asked, 2 s was found"]
    return replace(
        RESULT, whole=whole, verdict=replace(RESULT.verdict, valid=valid, passed=valid and passed, reasons=reasons)
    )


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


def test_a_single_wrong_answer_is_not_made_up_for() -> None:
    for name in INCORRECT:
        wrong = found(lambda rate, name=name: with_attainment(0.99, failures={name: 1} if rate > 4 else {"stall": 1}))  # type: ignore[misc]
        assert wrong.best is not None and wrong.best.rate_rps <= 4 < (wrong.bound.rate_rps if wrong.bound else 0)


def test_nothing_to_try_is_told() -> None:
    with pytest.raises(LoadgenError, match="0 trials"):
        found(lambda rate: with_attainment(1.0), max_trials=0)


# --- what is said of it


def test_what_is_known_is_what_is_said() -> None:
    open_end = found(lambda rate: with_attainment(1.0), max_trials=3)
    assert (open_end.bound, open_end.ratio) == (None, math.inf)
    assert "at least 4 requests/s" in sentence(open_end, 0.95) and "known within" not in sentence(open_end, 0.95)
    rough = found(lambda rate: with_attainment(1.0 if rate < 3 else 0.1), max_trials=3)
    assert "2 requests/s is the highest rate tried" in sentence(rough, 0.95)
    assert "3 trials, known within a factor 2)" in sentence(rough, 0.95)
    fine = found(lambda rate: with_attainment(1.0 if rate < 3 else 0.1))
    assert fine.ratio <= 1.1 and f"within a factor {math.ceil(1000 * fine.ratio) / 1000:g})" in sentence(fine, 0.95)


def test_the_limit_of_the_client_is_not_said_to_be_the_servers() -> None:
    client = found(lambda rate: with_attainment(1.0, valid=rate < 3))
    assert "the client's limit, not the server's" in sentence(client, 0.95)
    server = found(lambda rate: with_attainment(1.0 if rate < 3 else 0.1, valid=rate < 30))
    assert "client" not in sentence(server, 0.95)
    nothing = found(lambda rate: with_attainment(1.0, valid=False), max_trials=2)
    assert "no rate down to 0.5" in sentence(nothing, 0.95) and "the client was too slow" in sentence(nothing, 0.95)
    assert "the client" not in sentence(found(lambda rate: with_attainment(0.1), max_trials=2), 0.95)


# --- the command


class Trials:
    """In the place of runs: `server` says what comes of a rate."""

    def __init__(self, server: Callable[[float], Result], *, interrupted_at: int = 0) -> None:
        self.settings: list[Settings] = []
        self._server, self._interrupted_at = server, interrupted_at

    async def __call__(self, requests: Sequence[TraceRequest], settings: Settings, told: Any) -> Finished:
        self.settings.append(settings)
        rate = len(requests) / (requests[-1].timestamp / 1000)
        setup = make_setup(requests, settings, {}, 0.0, verified=0)
        result = replace(self._server(rate), setup=setup, title="hello", knee=[], mode="open")
        return Finished(result, [], len(self.settings) == self._interrupted_at)


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command on trials that are played; answers its exit code. Ten requests a second."""
    write_trace(tmp_path / "trace.jsonl", [TraceRequest(100.0 * (i + 1), 3, 2, "a") for i in range(20)])

    def command(trials: Trials, *more: str) -> int:
        monkeypatch.setattr("serverlesslora_loadgen.run.run", trials)
        asked = ["sweep", "--url", "http://127.0.0.1:9", "--trace", str(tmp_path / "trace.jsonl"), "--limit", "ttft=1s"]
        return main([*asked, "--no-html", *more])

    return command


def test_a_sweep_ends_with_the_code_of_its_best_trial(
    swept: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(Trials(lambda rate: with_attainment(1.0 if rate < 30 else 0.1))) == PASSED
    assert swept(Trials(lambda rate: with_attainment(1.0 if rate < 30 else 0.1, passed=False))) == MISSED
    assert "did not pass: ttft=1s:p99 was asked, 2 s was found" in capsys.readouterr().out
    assert swept(Trials(lambda rate: with_attainment(0.1))) == MISSED
    assert swept(Trials(lambda rate: with_attainment(0.1, valid=False))) == INVALID


def test_an_interrupt_ends_all_trials(swept: Callable[..., int], tmp_path: Path) -> None:
    trials = Trials(lambda rate: with_attainment(1.0), interrupted_at=2)
    assert swept(trials, "-o", str(tmp_path / "out")) == 130
    assert len(trials.settings) == 2 and not (tmp_path / "out" / "result.json").exists()


def test_trials_leave_the_servers_timers_and_say_so(swept: Callable[..., int], tmp_path: Path) -> None:
    trials = Trials(lambda rate: with_attainment(1.0 if rate < 70 else 0.1))
    swept(trials, "--speedup", "2", "--timer", "idle=60s", "--max-trials", "2", "-o", str(tmp_path / "out"))
    assert [each.speedup for each in trials.settings] == [2, 4]
    result = read_result(tmp_path / "out" / "result.json")
    assert result.setup.trace.speedup == 4 and result.setup.timers == {"idle": {"raw": 60.0, "effective": 30.0}}
    assert any("divided time by 2 once more" in note and "rarer" in note for note in result.setup.trace.notes)
    assert not any("once more" in note for note in trials.settings[0].notes)
    assert (result.mode, len(result.knee)) == ("sweep", 2) and "SATURATION SEARCH" in result.title


def test_json_is_all_that_is_printed(swept: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    swept(Trials(lambda rate: with_attainment(1.0 if rate < 30 else 0.1)), "--json")
    printed = capsys.readouterr()
    keys = json.loads(printed.out)
    assert "SATURATION SEARCH" in keys["label"] and "SATURATION SEARCH" in printed.err
    assert [point["rate_rps"] for point in keys["knee"]] == sorted(point["rate_rps"] for point in keys["knee"])
    assert keys["num_prompts"] == RESULT.whole.counts.sent


def test_trials_are_bounded() -> None:
    assert len(found(lambda rate: with_attainment(0.99 if rate <= 37 else 0.1), max_trials=3).points) == 3


def test_compressing_keeps_everything_but_time() -> None:
    requests = [TraceRequest(timestamp=at, input_length=3, output_length=2, model="a") for at in (0.0, 100.0, 300.0)]
    faster = compressed(requests, 4.0)
    assert [each.timestamp for each in faster] == pytest.approx([0.0, 25.0, 75.0])
    assert [replace(each, timestamp=0.0) for each in faster] == [replace(each, timestamp=0.0) for each in requests]
