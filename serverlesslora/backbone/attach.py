"""Builds a model whose parameters are views into shared read-only memory, on the host or on a device.

The module tree is made on the meta device from the manifest's config, so nothing is computed, copied or initialised,
and no thread is started: a launcher can build it and then fork. Where the memory is reached by what does not survive a
fork (a device), the two halves are done apart: the tree before, the memory after.
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
    """Both halves, on the host. All parameters share one storage, which keeps `weights` alive."""
    model = build_tree(manifest, attention=attention)
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; here the kernel enforces what torch cannot.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        region = torch.frombuffer(weights, dtype=torch.uint8)
    assign(model, region, manifest)
    return model


def build_tree(manifest: Manifest, *, attention: str = PAGED_ATTENTION) -> transformers.PreTrainedModel:
    """The model in eval mode, all of it on the meta device."""
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


def assign(model: nn.Module, region: Tensor, manifest: Manifest) -> None:
    """Gives `model` its values: parameters are views of `region` (uint8 [total_bytes]), buffers are private copies on
    the same device. Nothing of it is written."""
    if len(region) != manifest.total_bytes:
        raise AttachError(f"the memory holds {len(region)} bytes, the manifest describes {manifest.total_bytes}")
    modules = dict(model.named_modules())
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
        # Small, and some modules write to theirs, which a view of read-only memory would answer with a fault.
        value = _view(region, spec).clone()
        if leaf in modules[owner]._buffers:
            modules[owner]._buffers[leaf] = value
        else:
            setattr(modules[owner], leaf, value)
    _check_complete(modules)


def _view(region: Tensor, spec: TensorSpec) -> Tensor:
    flat = region[spec.offset : spec.offset + spec.size]
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


def _check_complete(modules: dict[str, nn.Module]) -> None:
    for prefix, owner in modules.items():
        for name, value in (*owner._parameters.items(), *owner._buffers.items(), *vars(owner).items()):
            if isinstance(value, Tensor) and value.is_meta:
                raise AttachError(f"the manifest gives no value for {prefix}.{name}")
