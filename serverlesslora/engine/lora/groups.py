"""Fused groups: projections of the same input whose weights lie side by side are one matrix multiplication."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from serverlesslora.backbone.layout import FUSED


def join_adjacent(params: Sequence[Tensor]) -> Tensor | None:
    """One view over tensors that follow each other in the same storage, stacked along dim 0; None if they do not."""
    first = params[0]
    expected, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for param in params:
        if (
            param.data_ptr() != expected
            or param.untyped_storage().data_ptr() != storage
            or param.dtype != first.dtype
            or param.device != first.device
            or param.shape[1:] != first.shape[1:]
            or not param.is_contiguous()
        ):
            return None
        expected += param.numel() * param.element_size()
    rows = sum(param.shape[0] for param in params)
    base = first.detach()
    return base.as_strided((rows, *first.shape[1:]), base.stride(), base.storage_offset())


def find_groups(model: nn.Module) -> Iterator[list[tuple[str, nn.Linear]]]:
    """Sibling linears that can be fused, as (full name, module) in the order in which they lie in memory."""
    for parent_name, parent in model.named_modules():
        for names in FUSED:
            children = [(f"{parent_name}.{name}".lstrip("."), getattr(parent, name, None)) for name in names]
            members = [(name, child) for name, child in children if type(child) is nn.Linear]
            if len(members) == len(names) and can_join([module for _, module in members]):
                yield members


def can_join(modules: Sequence[nn.Linear]) -> bool:
    biases = {module.bias is None for module in modules}
    return len(biases) == 1 and join_adjacent([module.weight for module in modules]) is not None


def join_biases(modules: Sequence[nn.Linear]) -> Tensor | None:
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    if not biases:
        return None
    joined = join_adjacent(biases)
    return torch.cat(biases) if joined is None else joined  # a few kilobytes of our own at most
