"""How many prompts make a batch, how long it may wait to fill, and who is most in a hurry.

The formulas of ServerlessLoRA (arXiv 2505.14468, section 4.2) for prompts of n tokens each, T(b) = base + slope·n·b:

    N_f   = floor((SLO - T(1)) / (slope·n)) + 1     the largest batch that makes the SLO by itself
    d_f   = SLO - T(N_f)                            how long its first request may wait for the others
    T_eff = M·T(b)                                  M batches in flight on one device stretch each other
    Delta = SLO - (waited + M·T(b))                 the margin; the smallest goes first

M counts the workers with work on the whole device, whoever they belong to. Where M > 1, N_f and d_f are those of the
stretched time. Waiting until a batch is full only pays while the device is busy anyway, and pure fill-or-expire makes
a quiet server slow: the window is capped, and 0 on an idle device.
"""

from __future__ import annotations

import math

from serverlesslora.scheduler.latency import LatencyModel


class Batching:
    def __init__(self, *, max_window_s: float = 0.1) -> None:
        self._max_window_s = max_window_s

    def largest_batch(self, model: LatencyModel, slo_s: float, tokens: float, *, num_batches: int, slots: int) -> int:
        """N_f, at least 1 (a late answer is better than none) and at most what the worker takes at once."""
        if slo_s == math.inf:
            return slots
        alone_s = num_batches * model.predict(tokens)
        more_s = num_batches * model.slope_s * tokens
        if slo_s <= alone_s:
            return 1
        # Compared before dividing: the quotient may be too large for an integer.
        return slots if slo_s - alone_s >= more_s * (slots - 1) else min(slots, int((slo_s - alone_s) / more_s) + 1)

    def fill_window(self, model: LatencyModel, slo_s: float, tokens: float, *, num_batches: int, slots: int) -> float:
        """min(d_f, the cap) in seconds, never negative. `num_batches` counts this one: 1 is an idle device."""
        if num_batches <= 1:
            return 0.0
        size = self.largest_batch(model, slo_s, tokens, num_batches=num_batches, slots=slots)
        return min(self._max_window_s, max(0.0, slo_s - num_batches * model.predict(tokens * size)))

    def margin(self, model: LatencyModel, slo_s: float, waited_s: float, tokens: float, *, num_batches: int) -> float:
        """Delta in seconds: negative if it will be late; inf without an SLO."""
        return slo_s - (waited_s + num_batches * model.predict(tokens))
