"""The worker's life cycle as a table: every pair is either listed or refused."""

import itertools

import pytest

from serverlesslora.gateway.worker_state import TRANSITIONS, IllegalTransition, WorkerEvent, WorkerState, advance


@pytest.mark.parametrize(("state", "event"), list(itertools.product(WorkerState, WorkerEvent)))
def test_every_pair(state: WorkerState, event: WorkerEvent) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition):
            advance(state, event)


def test_nobody_comes_back() -> None:
    assert all(TRANSITIONS[s, e] is not WorkerState.STARTING for s, e in TRANSITIONS)
    assert not any(s is WorkerState.GONE for s, _ in TRANSITIONS)
    assert {TRANSITIONS[s, e] for s, e in TRANSITIONS if s is WorkerState.LEAVING} == {
        WorkerState.LEAVING,
        WorkerState.GONE,
    }
