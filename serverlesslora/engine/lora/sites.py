"""The backbone as adapters see it: which module a name means, and what is tied to what."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serverlesslora.engine.device import Device
from serverlesslora.engine.lora.batch import Batch
from serverlesslora.engine.lora.groups import find_groups
from serverlesslora.engine.lora.occasional import EmbeddingSite, ExpertsSite, LeafSite, OccasionalSite, is_experts
from serverlesslora.engine.lora.projection import FusedGroup, LinearSite, Projection


class Sites:
    """Wraps every linear in place on construction; other kinds of sites are made when an adapter names them."""

    def __init__(self, model: PreTrainedModel, batch: Batch, device: Device) -> None:
        self._batch = batch
        self._arithmetic = device.arithmetic
        self.model_name = type(model).__name__
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.linears = {
            name: LinearSite(name, module)
            for name, module in self.modules.items()
            if isinstance(module, (nn.Linear, Conv1D))
            and type(module).forward in (nn.Linear.forward, Conv1D.forward)  # no subclass with arithmetic of its own
        }
        self.occasional: dict[str, OccasionalSite] = {}
        self.groups: list[FusedGroup] = []
        names = {id(module): name for name, module in self.modules.items()}
        input_table, output = model.get_input_embeddings(), model.get_output_embeddings()
        self.input_name = names[id(input_table)]
        self.output_name = names.get(id(output), "")
        weight = input_table.weight
        assert isinstance(weight, Tensor)
        self.vocab_size = weight.shape[0]
        self.tied = output is not None and output.weight.data_ptr() == weight.data_ptr()
        self.dtype: torch.dtype = weight.dtype
        self.device = weight.device
        self.projections: list[Projection] = []
        self._wrap(model)
        if self.output_name in self.linears:
            self.linears[self.output_name].projection.is_output = True
        self.store = batch.store = device.create_lora_store(self.projections)

    def _wrap(self, model: PreTrainedModel) -> None:
        fused: set[str] = set()
        for members in find_groups(model):
            if any(name in fused or name not in self.linears for name, _ in members):
                continue
            group = FusedGroup(self._batch, [self.linears[name] for name, _ in members], self._arithmetic)
            self.groups.append(group)
            self.projections.append(group.projection)
            for index, (name, module) in enumerate(members):
                module.__dict__["forward"] = group.first if index == 0 else _Later(group, index)
                fused.add(name)
        for name, site in self.linears.items():
            if name not in fused:
                projection = Projection(self._batch, [site], self._arithmetic)
                self.projections.append(projection)
                site.module.__dict__["forward"] = projection.forward

    def other(self, name: str) -> OccasionalSite | None:
        """The site of a module that is not a linear, or None where adapters cannot change such a module."""
        site = self.occasional.get(name)
        module = self.modules.get(name)
        if site is None and module is not None:
            if isinstance(module, nn.Embedding):
                site = EmbeddingSite(name, module, self._batch)
            elif is_experts(module):
                site = ExpertsSite(name, module, self._batch)
            elif _works_by_row(module):
                site = LeafSite(name, module, self._batch)
            if site is not None:
                self.occasional[name] = site
        return site


class _Later:
    """Call of a later sibling of a fused group."""

    __slots__ = ("_group", "_index")

    def __init__(self, group: FusedGroup, index: int) -> None:
        self._group = group
        self._index = index

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.later(self._index, x)


def _works_by_row(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    has_children = next(module.children(), None) is not None
    return bool(parameters) and not has_children and all(parameter.ndim <= 2 for parameter in parameters)
