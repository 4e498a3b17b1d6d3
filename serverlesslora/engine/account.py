"""What steps have cost and who pays: every second of a step is charged to the requests that had rows in it.

A request pays per row, whatever kind of row it is: a prompt token and an output token pass through the same weights.
That the first row of a step costs more than the next is shared too: those who are together pay it once.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from serverlesslora.engine.request import Request
from serverlesslora.engine.scheduler import Work
from serverlesslora_ipc.messages import StepSums


@dataclass(slots=True)
class Sums:
    """Of x and t over steps, for a straight line through them."""

    n: int = 0
    x: float = 0.0
    xx: float = 0.0
    t: float = 0.0
    xt: float = 0.0

    def add(self, x: int, t: float) -> None:
        self.n += 1
        self.x += x
        self.xx += x * x
        self.t += t
        self.xt += x * t

    def to_wire(self) -> StepSums:
        return StepSums(n=self.n, sum_x=self.x, sum_xx=self.xx, sum_t=self.t, sum_xt=self.xt)


class Account:
    def __init__(self) -> None:
        self.num_steps = 0
        self.busy_s = 0.0  # always the sum of what was charged
        self.decode = Sums()
        self.prefill = Sums()

    def charge(self, work: Items[Work], owners: Items[Request], seconds: float) -> None:
        """`owners` are the requests of `work`, also those that have ended since: they had their rows computed."""
        self.busy_s += seconds
        per_row = seconds / sum(item.num_tokens for item in work)
        for item, request in zip(work, owners, strict=True):
            request.device_s += per_row * item.num_tokens

    def observe(self, work: Items[Work], seconds: float) -> None:
        """A step that went as it should."""
        self.num_steps += 1
        if all(item.num_tokens == 1 for item in work):
            self.decode.add(len(work), seconds)
        elif len(work) == 1:
            self.prefill.add(work[0].num_tokens, seconds)
