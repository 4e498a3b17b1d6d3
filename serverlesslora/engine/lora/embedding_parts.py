"""What an adapter's tensors do to an embedding, and through it to an output embedding that is tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serverlesslora.engine.lora.draft import Draft, needs_lora, none_left, shaped
from serverlesslora.engine.lora.linear_parts import DORA_ROWS, dora_factor
from serverlesslora.engine.lora.names import ModuleTensors
from serverlesslora.engine.lora.occasional import EmbeddingPart, EmbeddingSite
from serverlesslora.engine.lora.overlays import EmbeddingLora, InputTokens, OutputTokens, Overlay, Replace, ReplaceTable
from serverlesslora.engine.lora.projection import LinearPart
from serverlesslora.errors import AdapterInvalid


def add_embedding(draft: Draft, site: EmbeddingSite, tensors: ModuleTensors) -> None:
    name, module = site.name, site.module
    assert isinstance(module, nn.Embedding)
    size, width = module.num_embeddings, module.embedding_dim
    scale = getattr(module, "embed_scale", None)
    scale = scale if isinstance(scale, Tensor) else None if scale is None else torch.tensor(float(scale))
    overlays: list[Overlay] = []
    factor: Tensor | None = None
    weight = module.weight.detach()
    own = draft.take_parameters(tensors)
    if "weight" in own:
        found = own.pop("weight")
        shape = found.tensor.shape
        grows = name == draft.sites.input_name and len(shape) == 2 and shape[0] > size
        weight = shaped(found, (shape[0] if grows else size, width), name)
        size = weight.shape[0]
        overlays.append(ReplaceTable(weight, scale))
        _tie(draft, name, weight)
    none_left(own, name)

    a, b, magnitude = tensors.take("embedding_a"), tensors.take("embedding_b"), tensors.take("magnitude")
    if (a is None) != (b is None):
        present = a or b
        assert present is not None
        raise AdapterInvalid(
            f"tensor {present.key!r} has no partner: lora_embedding_A and _B of {name!r} belong together"
        )
    if a is not None and b is not None:
        rank = draft.settings.rank_of(name)
        lora_a, lora_b = shaped(a, (rank, size), name), shaped(b, (width, rank), name)
        scaling = draft.settings.scale_of(name, rank)
        overlays.append(EmbeddingLora(lora_a, lora_b, scaling, scale))
        draft.note(name, rank)
        draft.kinds.add("embedding")
        draft.expect(magnitude, draft.settings.dora, "use_dora", f"{name}.lora_magnitude_vector")
        if magnitude is not None:
            total = torch.zeros(width, dtype=torch.float32, device=weight.device)
            for start in range(0, size, DORA_ROWS):
                rows = slice(start, start + DORA_ROWS)
                merged = torch.addmm(
                    weight[rows].float(), lora_a[:, rows].t().float(), lora_b.t().float(), alpha=scaling
                )
                total += merged.square().sum(0)
            factor = dora_factor(shaped(magnitude, (width,), name), total.sqrt(), magnitude)
            draft.kinds.add("dora")
    elif magnitude is not None:
        needs_lora(magnitude)
    tokens = tensors.take("tokens")
    if tokens is not None:
        ids, rows_ = draft.tokens(tokens, name, width)
        overlays.append(InputTokens(ids, rows_, scale))
        size = max(size, int(ids.max()) + 1)
        if draft.ties(name) and not draft.names_output():
            output = draft.sites.linears[draft.sites.output_name]
            tied = LinearPart(after=(OutputTokens(ids, rows_),), width=size)
            draft.join(output, draft.linears.get(output, LinearPart()), tied)
    if size > module.num_embeddings:
        draft.grow(size)
    if overlays or factor is not None:
        grown = size if size > module.num_embeddings else 0
        draft.others[site] = EmbeddingPart(tuple(overlays), factor, grown)


def _tie(draft: Draft, name: str, weight: Tensor) -> None:
    """An embedding that was saved as part of the base (resized, not `modules_to_save`) is the output's, too."""
    if not draft.ties(name):
        return
    output = draft.sites.output_name
    if draft.listed(name) and not draft.settings.tie:
        return
    if not draft.has(output, "=weight"):
        site = draft.sites.linears[output]
        tied = LinearPart(before=(Replace(weight, site.bias),), width=weight.shape[0])
        draft.join(site, draft.linears.get(site, LinearPart()), tied)
