"""The life of a worker as the gateway sees it, as one table.

    starting ──ready──▶ serving ──retire──▶ leaving ──gone──▶ gone
        └────────────────gone───────┴──────────gone────────────▲

`leaving` takes no new request: the domain has already forgotten it, so a request that arrives during tear-down
starts (or finds) another worker. A worker never returns from `leaving` or `gone`, and never changes its domain.
"""

from __future__ import annotations

from enum import Enum


class WorkerState(Enum):
    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"
    GONE = "gone"


class WorkerEvent(Enum):
    READY = "ready"
    RETIRE = "retire"
    GONE = "gone"


TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.STARTING, WorkerEvent.READY): WorkerState.SERVING,
    (WorkerState.STARTING, WorkerEvent.RETIRE): WorkerState.LEAVING,
    (WorkerState.STARTING, WorkerEvent.GONE): WorkerState.GONE,
    (WorkerState.SERVING, WorkerEvent.RETIRE): WorkerState.LEAVING,
    (WorkerState.SERVING, WorkerEvent.GONE): WorkerState.GONE,
    # Asked to leave before it said that it was ready.
    (WorkerState.LEAVING, WorkerEvent.READY): WorkerState.LEAVING,
    (WorkerState.LEAVING, WorkerEvent.GONE): WorkerState.GONE,
}


class IllegalTransition(AssertionError):
    """Our own mistake: an event that cannot happen in this state."""


def advance(state: WorkerState, event: WorkerEvent) -> WorkerState:
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.value} while {state.value}") from None
