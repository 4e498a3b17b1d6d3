"""When an ask would get its first token, predicted from what the server did lately.

    TTFT = rest of the cold start + wait for a slot + M·T(tokens)

A domain with s slots whose answers take D seconds each frees a slot every D/s seconds while it is saturated (Little's
law). The time until the n-th slot is free spreads like the square root of n, and who is admitted at the edge of a full
queue should be in time more often than in half of all cases: hence n + CAUTION·sqrt(n) of them.
"""

from __future__ import annotations

import math

from serverlesslora.scheduler.latency import LatencyModel

CAUTION = 1.0
RETRY_AT_LEAST_S, RETRY_AT_MOST_S = 1, 60


class Pace:
    """What answers took lately: seconds in the worker, and tokens. Plain means, because what counts is their sum: an
    answer ten times as long as usual is no outlier, it does hold its slot for that long."""

    __slots__ = ("_window", "num_observed", "output_tokens", "seconds")

    def __init__(self, window: int) -> None:
        self._window = window  # how many answers it remembers
        self.num_observed = 0
        self.seconds = 0.0
        self.output_tokens = 0.0

    def observe(self, seconds: float, output_tokens: int) -> None:
        self.num_observed = min(self.num_observed + 1, self._window)
        self.seconds += (seconds - self.seconds) / self.num_observed
        self.output_tokens += (output_tokens - self.output_tokens) / self.num_observed

    def follower(self) -> Pace:
        """The first guess of a new domain: what it sees itself soon counts more."""
        pace = Pace(self._window)
        pace.num_observed = min(self.num_observed, 2)
        pace.seconds, pace.output_tokens = self.seconds, self.output_tokens
        return pace


class Learned:
    """Of one backbone on one device, over all domains."""

    __slots__ = ("latency", "pace")

    def __init__(self, latency: LatencyModel, slots: int) -> None:
        self.latency = latency
        self.pace = Pace(max(8, 2 * slots))


def wait_for_slots(num: int, *, answer_s: float, slots: int) -> float:
    """Seconds until `num` more slots have become free, in a worker that has none free now."""
    return 0.0 if num <= 0 else answer_s / slots * (num + CAUTION * math.sqrt(num))


def retry_after(late_s: float) -> int:
    """Whole seconds after which the same ask would be in time by what is known now."""
    return RETRY_AT_MOST_S if late_s >= RETRY_AT_MOST_S else max(RETRY_AT_LEAST_S, math.ceil(late_s))
