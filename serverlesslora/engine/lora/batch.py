"""What the next forward will see: the packed rows of each adapter, and a memory of plans made from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from serverlesslora.engine.device import LoraStore
    from serverlesslora.engine.lora.adapter import Adapter

REMEMBERED_BATCHES = 8  # body and lm_head segments of the last few steps; decode repeats the same ones


class Segment(NamedTuple):
    """Rows `start:end` of the packed batch belong to one adapter, or to the bare backbone."""

    start: int
    end: int
    adapter: Adapter | None


class Batch:
    """Shared by all sites of one model; plans are made on first use and kept while the same segments return."""

    store: LoraStore  # set by the sites, which it serves

    def __init__(self) -> None:
        self.adapted: tuple[Segment, ...] = ()
        self.rows = 0
        self.plans: dict[Any, Any] = {}
        self.epoch = 0
        self._remembered: OrderedDict[tuple[Segment, ...], dict[Any, Any]] = OrderedDict()

    def set(self, segments: Sequence[Segment]) -> None:
        adapted = tuple(segment for segment in segments if segment.adapter is not None)
        self.rows = segments[-1].end if segments else 0
        self.epoch += 1
        self.adapted = adapted
        if not adapted:
            self.plans = {}
            return
        loras = {id(segment.adapter): segment.adapter.lora for segment in adapted if segment.adapter is not None}
        self.store.require(list(loras.values()))
        plans = self._remembered.pop(adapted, None)
        self.plans = {} if plans is None else plans
        self._remembered[adapted] = self.plans
        if len(self._remembered) > REMEMBERED_BATCHES:
            self._remembered.popitem(last=False)

    def set_fixed(self, rows: int, plans: dict[Any, Any]) -> None:
        """The next forwards see `rows` rows and use `plans`, made beforehand: which adapter a row has is in memory
        that the plans point to."""
        self.adapted = (Segment(0, rows, None),) if plans else ()
        self.rows = rows
        self.epoch += 1
        self.plans = plans

    def check(self, rows: int, name: str) -> None:
        """A site that sees other rows than announced would give one tenant's adapter to another's tokens."""
        if rows != self.rows:
            raise RuntimeError(f"{name} was called with {rows} rows, the batch has {self.rows}")

    def uses(self, adapter: Adapter) -> bool:
        return any(segment.adapter is adapter for segment in self.adapted)

    def forget(self, adapter: Adapter) -> None:
        for segments in [key for key in self._remembered if any(segment.adapter is adapter for segment in key)]:
            del self._remembered[segments]
