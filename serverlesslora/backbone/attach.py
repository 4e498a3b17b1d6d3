"""Builds a model whose parameters are views into shared read-only memory.

The module tree is made on the meta device from the manifest's config, so nothing is computed, copied or initialised,
and no thread is started: a launcher can attach and then fork.
"""

from __future__ import annotations

import json
import mmap
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights, no_tie_weights

from serverlesslora_ipc.manifest import Manifest, TensorSpec

PAGED_ATTENTION = "serverlesslora_paged"  # registered by serverlesslora.engine.attention


class AttachError(Exception):
    """The memory and the module tree built from its manifest do not fit each other."""


def attach(weights: mmap.mmap, manifest: Manifest, *, attention: str = PAGED_ATTENTION) -> transformers.PreTrainedModel:
    """The model in eval mode. All its parameters share one storage, which keeps `weights` alive."""
    if len(weights) != manifest.total_bytes:
        raise AttachError(f"the memory holds {len(weights)} bytes, the manifest describes {manifest.total_bytes}")
    model = _meta_tree(manifest, attention)
    modules = dict(model.named_modules())
    region = _region(weights)
    parameters = {spec.name: nn.Parameter(_view(region, spec), requires_grad=False) for spec in manifest.tensors}
    for name, stored in manifest.aliases.items():
        parameters[name] = parameters[stored]
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in modules or leaf not in modules[owner]._parameters:
            raise AttachError(f"{manifest.architecture} has no parameter {name}")
        modules[owner]._parameters[leaf] = parameter
    for spec in manifest.buffers:
        owner, _, leaf = spec.name.rpartition(".")
        if owner not in modules:
            raise AttachError(f"{manifest.architecture} has no module for {spec.name}")
        value = _private_copy(weights, spec)
        if leaf in modules[owner]._buffers:
            modules[owner]._buffers[leaf] = value
        else:
            setattr(modules[owner], leaf, value)
    _check_complete(modules)
    return model


def _meta_tree(manifest: Manifest, attention: str) -> transformers.PreTrainedModel:
    found = getattr(transformers, manifest.architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise AttachError(f"this transformers ({transformers.__version__}) has no {manifest.architecture}")
    architecture: Any = found
    config = architecture.config_class.from_dict(json.loads(manifest.config))
    with torch.device("meta"), no_init_weights(), no_tie_weights(), meta_device_safe_creation_ops():
        model = architecture._from_config(config, dtype=getattr(torch, manifest.dtype), attn_implementation=attention)
    assert isinstance(model, transformers.PreTrainedModel)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_dict(json.loads(manifest.generation_config))
    return model.eval()


def _region(weights: mmap.mmap) -> Tensor:
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; here the kernel enforces what torch cannot.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(weights, dtype=torch.uint8)


def _view(region: Tensor, spec: TensorSpec) -> Tensor:
    flat = region[spec.offset : spec.offset + spec.size]
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


def _private_copy(weights: mmap.mmap, spec: TensorSpec) -> Tensor:
    """Buffers are small and some modules write to theirs, which a view would answer with SIGSEGV."""
    dtype = getattr(torch, spec.dtype)
    if not spec.size:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(bytearray(weights[spec.offset : spec.offset + spec.size]), dtype=dtype).view(spec.shape)


def _check_complete(modules: dict[str, nn.Module]) -> None:
    for prefix, owner in modules.items():
        for name, value in (*owner._parameters.items(), *owner._buffers.items(), *vars(owner).items()):
            if isinstance(value, Tensor) and value.is_meta:
                raise AttachError(f"the manifest gives no value for {prefix}.{name}")
