"""What an adapter's tensors do to stacked experts, routers and norms: LoRA on parameters, or parameters of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serverlesslora.engine.lora.draft import Draft, shaped
from serverlesslora.engine.lora.names import Found, ModuleTensors
from serverlesslora.engine.lora.occasional import ExpertFactors, ExpertsPart, ExpertsSite, LeafSite, own_copy
from serverlesslora.errors import AdapterInvalid


def add_experts(draft: Draft, site: ExpertsSite, tensors: ModuleTensors) -> None:
    replaced = {
        name: shaped(found, tuple(site.module.get_parameter(name).shape), site.name)
        for name, found in draft.take_parameters(tensors).items()
        if draft.is_parameter(site.module, name, found)
    }
    factors: dict[str, ExpertFactors] = {}
    for depth, name in _targeted(draft, site.name, site.module, tensors):
        parameter = replaced.get(name, site.module.get_parameter(name).detach())
        if parameter.ndim == 3:
            factors[name] = _expert_factors(draft, site, tensors, depth, name, parameter)
        else:
            replaced[name] = _merged(draft, tensors, depth, f"{site.name}.{name}", parameter)
    if factors:
        draft.kinds.add("experts")
    if factors or replaced:
        draft.others[site] = ExpertsPart(factors, replaced)


def _expert_factors(
    draft: Draft, site: ExpertsSite, tensors: ModuleTensors, depth: str, name: str, parameter: Tensor
) -> ExpertFactors:
    full = f"{site.name}.{name}"
    experts, out, inner = parameter.shape
    if site.module.is_transposed:
        out, inner = inner, out
    rank = draft.settings.rank_of(full)
    a, b = _pair(draft, tensors, depth, full)
    lora_a = shaped(a, (experts * rank, inner), full)
    lora_b = shaped(b, (out, rank * experts), full)
    draft.note(full, rank)
    return ExpertFactors(
        lora_a.view(experts, rank, inner).to(parameter.device, copy=True),  # not a view that keeps the whole file
        lora_b.view(out, rank, experts).permute(2, 0, 1).contiguous().to(parameter.device),
        draft.settings.scale_of(full, rank),
    )


def add_leaf(draft: Draft, site: LeafSite, tensors: ModuleTensors) -> None:
    parameters = {
        name: shaped(found, tuple(site.module.get_parameter(name).shape), site.name)
        for name, found in draft.take_parameters(tensors).items()
        if draft.is_parameter(site.module, name, found)
    }
    for depth, name in _targeted(draft, site.name, site.module, tensors):
        own = parameters.get(name, site.module.get_parameter(name).detach())
        if own.ndim != 2:
            raise AdapterInvalid(f"LoRA on {site.name}.{name} with {own.ndim} dimensions is not served")
        parameters[name] = _merged(draft, tensors, depth, f"{site.name}.{name}", own)
    if parameters:
        draft.others[site] = own_copy(site.module, parameters)


def _targeted(draft: Draft, name: str, module: nn.Module, tensors: ModuleTensors) -> list[tuple[str, str]]:
    """(prefix of kinds, parameter) in PEFT's nesting: the first targeted parameter lies innermost."""
    if not any(kind.endswith(("a", "b")) for kind in tensors.kinds):
        return []
    names = [
        parameter
        for parameter, _ in module.named_parameters(recurse=False)
        if draft.is_target_parameter(f"{name}.{parameter}")
    ]
    if not names:
        key = tensors.leftover[0]
        raise AdapterInvalid(
            f"tensor {key!r} is LoRA on parameters of {name!r}, but target_parameters names none of them"
        )
    depths = range(len(names) - 1, -1, -1)
    return [(f"{depth}:" if depth else "", parameter) for depth, parameter in zip(depths, names, strict=True)]


def _merged(draft: Draft, tensors: ModuleTensors, depth: str, full: str, parameter: Tensor) -> Tensor:
    """A small two-dimensional parameter (a router's weight) is kept with its LoRA applied."""
    out, inner = parameter.shape
    rank = draft.settings.rank_of(full)
    a, b = _pair(draft, tensors, depth, full)
    lora_a = shaped(a, (rank, inner), full).to(parameter.device)
    lora_b = shaped(b, (out, rank), full).to(parameter.device)
    draft.note(full, rank)
    draft.kinds.add("parameters")
    scale = draft.settings.scale_of(full, rank)
    return torch.addmm(parameter.float(), lora_b.float(), lora_a.float(), alpha=scale).to(parameter.dtype)


def _pair(draft: Draft, tensors: ModuleTensors, depth: str, full: str) -> tuple[Found, Found]:
    a, b = tensors.take(f"{depth}a"), tensors.take(f"{depth}b")
    if a is None or b is None:
        raise AdapterInvalid(f"LoRA tensors for {full!r} are missing or have no partner")
    return a, b
