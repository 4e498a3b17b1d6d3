"""Sends the tensors of one module to what builds that kind of module's part."""

from __future__ import annotations

import difflib

from serverlesslora.engine.lora.draft import Draft
from serverlesslora.engine.lora.embedding_parts import add_embedding
from serverlesslora.engine.lora.expert_parts import add_experts, add_leaf
from serverlesslora.engine.lora.linear_parts import add_linear
from serverlesslora.engine.lora.names import ModuleTensors
from serverlesslora.engine.lora.occasional import EmbeddingSite, ExpertsSite, LeafSite
from serverlesslora.errors import AdapterInvalid


def add(draft: Draft, tensors: ModuleTensors) -> None:
    name = tensors.name
    linear = draft.sites.linears.get(name)
    if linear is not None:
        add_linear(draft, linear, tensors)
        return
    site = draft.sites.other(name)
    if isinstance(site, EmbeddingSite):
        add_embedding(draft, site, tensors)
    elif isinstance(site, ExpertsSite):
        add_experts(draft, site, tensors)
    elif isinstance(site, LeafSite):
        add_leaf(draft, site, tensors)
    else:
        raise _no_site(draft, tensors)


def _no_site(draft: Draft, tensors: ModuleTensors) -> AdapterInvalid:
    key, name = tensors.leftover[0], tensors.name
    if name in draft.sites.modules:
        kind = type(draft.sites.modules[name]).__name__
        return AdapterInvalid(f"tensor {key!r} changes {name!r}, a {kind}: adapters on such modules are not served")
    message = f"tensor {key!r} is for module {name!r}, which the backbone ({draft.sites.model_name}) does not have"
    close = difflib.get_close_matches(name, list(draft.sites.modules)[:2000], 1)
    return AdapterInvalid(f"{message}; the nearest is {close[0]!r}" if close else message)
