"""What an adapter's tensors do to one linear: LoRA, DoRA, biases, a whole replacement, retrained tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serverlesslora.engine.lora.draft import Draft, needs_lora, none_left, shaped, wrong_shape
from serverlesslora.engine.lora.names import Found, ModuleTensors
from serverlesslora.engine.lora.overlays import Magnitude, OutputTokens, Overlay, Replace, Shift
from serverlesslora.engine.lora.projection import LinearPart, LinearSite, LoraFactors
from serverlesslora.errors import AdapterInvalid

DORA_ROWS = 4096  # rows of W + s·B·A in float32 at a time


def add_linear(draft: Draft, site: LinearSite, tensors: ModuleTensors) -> None:
    name, out, wide = site.name, site.out_features, site.out_features
    if "experts" in name.split("."):  # such a linear sees some rows only, in an order that segments do not tell
        raise AdapterInvalid(f"tensor {tensors.leftover[0]!r} is for a single expert: such adapters are not served")
    before: list[Overlay] = []
    after: list[Overlay] = []
    weight, bias = site.weight, site.bias
    own = draft.take_parameters(tensors)
    if "weight" in own:
        weight = _whole_weight(draft, site, own.pop("weight"))
        wide = weight.shape[0]
    if "bias" in own:
        found = own.pop("bias")
        if site.bias is None:
            raise AdapterInvalid(f"tensor {found.key!r} is a bias, but {name!r} of this backbone has none")
        bias = shaped(found, (wide,), name)
        draft.kinds.add("bias")
    none_left(own, name)
    if weight is not site.weight:
        before.append(Replace(weight, bias))
    elif bias is not site.bias and bias is not None and site.bias is not None:
        before.append(Shift(bias - site.bias))

    factors = _factors(draft, tensors, name, site.in_features, wide)
    lora_bias, magnitude = tensors.take("b_bias"), tensors.take("magnitude")
    if factors is None:
        needs_lora(lora_bias, magnitude)
    else:
        draft.expect(lora_bias, draft.settings.lora_bias, "lora_bias", f"{name}.lora_B.bias")
        draft.expect(magnitude, draft.settings.dora, "use_dora", f"{name}.lora_magnitude_vector")
        if lora_bias is not None:
            draft.kinds.add("lora_bias")
            after.append(Shift(shaped(lora_bias, (wide,), name) * factors.scale))
        if magnitude is not None:
            after.append(_magnitude(draft, magnitude, weight, factors, bias, name))
    tokens = tensors.take("tokens")
    if tokens is not None:
        ids, rows = draft.tokens(tokens, name, site.in_features)
        after.append(OutputTokens(ids, rows))
        wide = max(wide, int(ids.max()) + 1)
    if wide > out:
        draft.grow(wide)
    if factors is not None or before or after:
        draft.join(site, LinearPart(factors, tuple(before), tuple(after), wide), draft.linears.get(site))


def _whole_weight(draft: Draft, site: LinearSite, found: Found) -> Tensor:
    weight = found.tensor if isinstance(site.module, nn.Linear) else found.tensor.t()
    rows = weight.shape[0] if weight.ndim == 2 else -1
    grows = site.name == draft.sites.output_name and rows > site.out_features
    if weight.ndim != 2 or weight.shape[1] != site.in_features or not (rows == site.out_features or grows):
        raise wrong_shape(found, tuple(site.weight.shape), site.name)
    return weight


def _factors(
    draft: Draft, tensors: ModuleTensors, name: str, in_features: int, out_features: int
) -> LoraFactors | None:
    a, b = tensors.take("a"), tensors.take("b")
    if a is None and b is None:
        return None
    if a is None or b is None:
        present, missing = (a, "lora_B") if b is None else (b, "lora_A")
        assert present is not None
        raise AdapterInvalid(f"tensor {present.key!r} has no partner: {name}.{missing}.weight is missing")
    full = f"{name}.weight"
    if draft.is_target_parameter(full):
        draft.adapted.add(full)
        name = full  # PEFT compares patterns with the parameter's name then
    rank = draft.settings.rank_of(name)
    if a.tensor.shape == (in_features, rank) and b.tensor.shape == (rank, out_features) and in_features != rank:
        raise AdapterInvalid(f"tensors {a.key!r} and {b.key!r} are transposed: PEFT saves A as [rank, in]")
    scale = draft.settings.scale_of(name, rank)
    factors = LoraFactors(shaped(a, (rank, in_features), name), shaped(b, (out_features, rank), name), scale)
    draft.note(name, rank)
    return factors


def _magnitude(
    draft: Draft, found: Found, weight: Tensor, factors: LoraFactors, bias: Tensor | None, name: str
) -> Magnitude:
    magnitude = shaped(found, (weight.shape[0],), name)
    norm = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    a, b = factors.a.to(weight.device).float(), factors.b.to(weight.device)
    for start in range(0, weight.shape[0], DORA_ROWS):
        rows = slice(start, start + DORA_ROWS)
        merged = torch.addmm(weight[rows].float(), b[rows].float(), a, alpha=factors.scale)
        norm[rows] = torch.linalg.vector_norm(merged, dim=1)
    draft.kinds.add("dora")
    return Magnitude(dora_factor(magnitude, norm, found), bias)


def dora_factor(magnitude: Tensor, norm: Tensor, found: Found) -> Tensor:
    factor = magnitude.float() / norm
    if not bool(torch.isfinite(factor).all()):
        raise AdapterInvalid(f"tensor {found.key!r}: DoRA divides by a weight row of length zero")
    return factor.to(magnitude.dtype)
