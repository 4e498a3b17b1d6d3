"""Backbone projections with the adapters' part added by segments; fused where the weights allow it.

The backbone's own matrix multiplications all go through the device's `linear`: the seam at which another executor
could one day serve several domains at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from serverlesslora.engine.device import Arithmetic, LoadedLora, Update
from serverlesslora.engine.lora.batch import Batch, Segment
from serverlesslora.engine.lora.groups import join_adjacent, join_biases
from serverlesslora.engine.lora.overlays import Overlay
from serverlesslora_kernels.segments import LoraPiece


class LoraFactors(NamedTuple):
    """y += scale · (x·Aᵀ)·Bᵀ"""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float


class LinearPart(NamedTuple):
    """What one adapter does to one linear: replaced first, then plain LoRA, then the rest."""

    factors: LoraFactors | None = None
    before: tuple[Overlay, ...] = ()
    after: tuple[Overlay, ...] = ()
    width: int = 0  # columns written; more than the backbone's when the adapter adds tokens


class LinearSite:
    """One linear module of the backbone, as adapters name it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        self.name = name
        self.module = module
        self.weight = weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()  # GPT-2's Conv1D
        self.bias: Tensor | None = None if bias is None else bias.detach()
        self.out_features, self.in_features = self.weight.shape
        self.projection: Projection  # set by the projection that computes this site,
        self.offset = 0  # from this column on


class ProjectionPart(NamedTuple):
    """What one adapter does to one projection, taken together from its sites; the factors are in a `LoadedLora`."""

    has_lora: bool
    before: tuple[tuple[int, Overlay], ...]  # with the column at which each begins
    after: tuple[tuple[int, Overlay], ...]
    width: int

    @property
    def tensors(self) -> list[Tensor | None]:
        return [tensor for _, overlay in (*self.before, *self.after) for tensor in overlay.tensors]


class Grouped(NamedTuple):
    """An adapter's parts by matrix multiplication of the backbone instead of by site."""

    parts: dict[Projection, ProjectionPart]
    pieces: dict[Projection, list[LoraPiece]]  # the plain factors, not copied yet


def group(parts: Mapping[LinearSite, LinearPart]) -> Grouped:
    members: dict[Projection, list[tuple[LinearSite, LinearPart]]] = {}
    for site, part in parts.items():
        members.setdefault(site.projection, []).append((site, part))
    grouped = Grouped({}, {})
    for projection, found in members.items():
        pieces = [LoraPiece(*part.factors, site.offset) for site, part in found if part.factors is not None]
        if pieces:
            grouped.pieces[projection] = pieces
        grouped.parts[projection] = ProjectionPart(
            bool(pieces),
            tuple((site.offset, overlay) for site, part in found for overlay in part.before),
            tuple((site.offset, overlay) for site, part in found for overlay in part.after),
            max(projection.width, *(part.width for _, part in found)),
        )
    return grouped


class _Slow(NamedTuple):
    start: int
    end: int
    offset: int
    overlay: Overlay

    def apply(self, y: Tensor, x: Tensor) -> None:
        self.overlay.apply(y[self.start : self.end, self.offset :], x[self.start : self.end])


class ProjectionPlan(NamedTuple):
    """The work one batch of segments gives to one projection."""

    update: Update | None
    before: Sequence[_Slow]
    after: Sequence[_Slow]
    width: int


NOTHING = ProjectionPlan(None, (), (), 0)


class Projection:
    """One matrix multiplication of the backbone over one or several sites, plus what the adapters add."""

    def __init__(self, batch: Batch, sites: Sequence[LinearSite], arithmetic: Arithmetic) -> None:
        self._batch = batch
        self._arithmetic = arithmetic
        self._linear = arithmetic.linear
        self.name = sites[0].name
        self.in_features = sites[0].in_features
        self.columns: list[tuple[int, int]] = []  # first column and width of each site
        self.width = 0
        self.is_output = False  # set where it is the model's head, whose rows are not the body's
        self.into: Tensor | None = None  # the next output is added to this instead of being returned by itself
        for site in sites:
            site.projection, site.offset = self, self.width
            self.columns.append((self.width, site.out_features))
            self.width += site.out_features
        self.dtype = sites[0].weight.dtype
        if len(sites) == 1:
            self._weight, self._bias = sites[0].weight, sites[0].bias
        else:
            joined = join_adjacent([site.weight for site in sites])
            assert joined is not None, "only adjacent weights are fused"
            self._weight = joined
            self._bias = join_biases([site.module for site in sites if isinstance(site.module, nn.Linear)])

    def forward(self, x: Tensor) -> Tensor:
        if self.into is not None:
            return self._accumulate(x, self.into)
        y = self._linear(x, self._weight, self._bias)
        return self._adapt(y, x) if self._batch.adapted else y

    def _accumulate(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += everything this projection makes of x; returns the very `residual` that was asked for.

        What overwrites or scales an output must see it alone: then the sum is made afterwards.
        """
        self.into = None
        plan = self.current_plan if self._batch.adapted else NOTHING
        if self._bias is not None or plan.before or plan.after or plan.width > self.width:
            residual += self.forward(x)
            return residual
        rows, out = x.reshape(-1, x.shape[-1]), residual.view(-1, self.width)
        self._arithmetic.add_linear(out, rows, self._weight)
        if plan.update is not None:
            self._batch.check(rows.shape[0], self.name)
            plan.update.apply(out, rows)
        return residual

    @property
    def current_plan(self) -> ProjectionPlan:
        plans = self._batch.plans
        plan: ProjectionPlan | None = plans.get(self)
        if plan is None:
            plan = plans[self] = self._plan(self._batch.adapted)
        return plan

    def _adapt(self, y: Tensor, x: Tensor) -> Tensor:
        plan = self.current_plan
        if not plan.width:
            return y
        rows = x.reshape(-1, x.shape[-1])
        self._batch.check(rows.shape[0], self.name)
        if plan.width > self.width:
            wide = y.new_full((*y.shape[:-1], plan.width), float("-inf"))
            wide[..., : self.width] = y
            y = wide
        out = y.view(-1, plan.width)
        for slow in plan.before:
            slow.apply(out, rows)
        if plan.update is not None:
            plan.update.apply(out, rows)
        for slow in plan.after:
            slow.apply(out, rows)
        return y

    def _plan(self, segments: Sequence[Segment]) -> ProjectionPlan:
        entries: list[tuple[int, int, LoadedLora]] = []
        before: list[_Slow] = []
        after: list[_Slow] = []
        width = 0
        for start, end, adapter in segments:
            assert adapter is not None
            part = adapter.projections.get(self)
            if part is None:
                continue
            has_lora, replaced, overlaid, part_width = part
            width = max(width, part_width)
            if has_lora:
                entries.append((start, end, adapter.lora))
            if replaced:
                before += [_Slow(start, end, offset, overlay) for offset, overlay in replaced]
            if overlaid:
                after += [_Slow(start, end, offset, overlay) for offset, overlay in overlaid]
        update = self._batch.store.update(self, entries, self._batch) if entries else None
        return ProjectionPlan(update, before, after, width)


class FusedGroup:
    """Sibling projections of one input: the first computes all, the others hand out their part of it.

    A sibling that is called with anything else than the very tensor the first one saw (unchanged, in the same batch,
    for the first time) computes again: correct for any order of calls.
    """

    def __init__(self, batch: Batch, sites: Sequence[LinearSite], arithmetic: Arithmetic) -> None:
        self._batch = batch
        self._joint = Projection(batch, sites, arithmetic)
        self.sizes = [site.out_features for site in sites]
        self._input: Tensor | None = None
        self._version = self._epoch = -1
        self._outputs: list[Tensor | None] = []
        self._open = 0

    @property
    def projection(self) -> Projection:
        return self._joint

    def joint(self, x: Tensor) -> Tensor:
        """All siblings' outputs side by side, for a caller that wants them so."""
        return self._joint.forward(x)

    def first(self, x: Tensor) -> Tensor:
        outputs = self._joint.forward(x).split_with_sizes(self.sizes, -1)
        self._input, self._version, self._epoch = x, _version(x), self._batch.epoch
        self._outputs = list(outputs)
        self._outputs[0] = None
        self._open = len(outputs) - 1
        return outputs[0]

    def later(self, index: int, x: Tensor) -> Tensor:
        if x is self._input and self._epoch == self._batch.epoch and self._version == _version(x):
            output = self._outputs[index]
            if output is not None:
                self._outputs[index] = None
                self._open -= 1
                if not self._open:
                    self._input = None
                return output
        return self._joint.forward(x).split_with_sizes(self.sizes, -1)[index]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
