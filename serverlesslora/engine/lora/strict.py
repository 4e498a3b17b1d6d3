"""Loads a PEFT directory for one backbone: every tensor is used and fits, or AdapterInvalid says why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from serverlesslora.engine.lora.adapter import Adapter
from serverlesslora.engine.lora.builder import add
from serverlesslora.engine.lora.draft import Draft
from serverlesslora.engine.lora.names import ModuleTensors, by_module
from serverlesslora.engine.lora.projection import group
from serverlesslora.engine.lora.settings import LoraSettings, read_settings
from serverlesslora.engine.lora.sites import Sites
from serverlesslora.engine.lora.tensor_file import read_tensors
from serverlesslora.errors import AdapterInvalid

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Copied into the kernels' form; the others go to the device as they are and must not keep the file's buffer alive.
_PACKED = ("lora_A.weight", "lora_B.weight")


def load_adapter(path: Path, digest: str, sites: Sites) -> Adapter:
    settings = read_settings(path / CONFIG_NAME)
    weights = path / WEIGHTS_NAME
    if not weights.exists():
        if (path / "adapter_model.bin").exists():
            raise AdapterInvalid(
                "adapter_model.bin is a pickle, which is never loaded; save the adapter as safetensors"
            )
        raise AdapterInvalid(f"{WEIGHTS_NAME} is missing")
    tensors = read_tensors(weights, sites.dtype)
    try:
        return build_adapter(settings, tensors, digest, sites)
    except torch.OutOfMemoryError as error:  # LoRA factors can wait on the host, whole parameters cannot
        raise AdapterInvalid("the device has no room for the parameters this adapter brings: try again") from error


def build_adapter(settings: LoraSettings, tensors: dict[str, Tensor], digest: str, sites: Sites) -> Adapter:
    modules = by_module(tensors)
    unchanged = _unchanged(modules.values(), sites)
    if any(not key.endswith(_PACKED) for key in tensors):
        tensors = {
            key: tensor if key.endswith(_PACKED) else tensor.to(sites.device, copy=True)
            for key, tensor in tensors.items()
            if key not in unchanged
        }
        modules = by_module(tensors)
    draft = Draft(settings, sites, modules)
    draft.saved.update(unchanged.values())
    for module in modules.values():
        add(draft, module)
    for module in modules.values():
        for key in module.leftover:
            raise AdapterInvalid(
                f"tensor {key!r} means nothing to this server, so the adapter cannot be served faithfully"
            )
    _check_complete(settings, draft, sites)
    if not (draft.linears or draft.others or unchanged):
        raise AdapterInvalid("the adapter holds no trained tensor")
    grouped = group(draft.linears)
    return Adapter(
        digest,
        projections=grouped.parts,
        lora=sites.store.load(grouped.pieces, sites.dtype),
        others=draft.others,
        kinds=tuple(sorted(draft.kinds)),
        rank=draft.rank,
        modules=len(draft.linears) + len(draft.others),
        vocab_size=draft.vocab_size,
    )


def _unchanged(modules: Iterable[ModuleTensors], sites: Sites) -> dict[str, str]:
    """Keys (and full names) of plain parameters equal to the backbone's: PEFT saves embeddings nobody trained."""
    keys: dict[str, str] = {}
    for module in modules:
        owner = sites.modules.get(module.name)
        for name, (key, tensor) in module.parameters.items():
            own = None if owner is None else getattr(owner, name, None)
            if isinstance(own, Tensor) and own.shape == tensor.shape and torch.equal(own, tensor.to(own.device)):
                keys[key] = f"{module.name}.{name}"
    return keys


def _check_complete(settings: LoraSettings, draft: Draft, sites: Sites) -> None:
    """Every module that the configuration targets by its plain name must be in the file."""
    targets = frozenset(settings.required_modules)
    for name in (*sites.linears, sites.input_name):
        target = next((end for end in _ends(name) if end in targets), None) if targets else None
        if target is not None and name not in draft.adapted:
            key = _key(name, "lora_embedding_A" if name == sites.input_name else "lora_A.weight")
            raise AdapterInvalid(f"tensor {key!r} is missing: target_modules lists {target!r}")
    parameters = frozenset(settings.target_parameters)
    for name, module in sites.modules.items() if parameters else ():
        for parameter, _ in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}"
            if full not in draft.adapted and any(end in parameters for end in _ends(full)):
                raise AdapterInvalid(f"LoRA tensors for {full!r} are missing: target_parameters names it")
    if settings.bias != "none":
        for name, site in sites.linears.items():
            trained = settings.bias == "all" or name in draft.adapted
            if trained and site.bias is not None and f"{name}.bias" not in draft.saved:
                raise AdapterInvalid(f"tensor {_key(name, 'bias')!r} is missing: bias is {settings.bias!r}")
    for name, module in sites.modules.items() if settings.modules_to_save else ():
        if name.endswith(settings.modules_to_save):
            for parameter, _ in module.named_parameters():
                full = f"{name}.{parameter}"
                if full not in draft.saved:
                    raise AdapterInvalid(f"tensor {_key(full)!r} is missing: modules_to_save names {name!r}")


def _ends(name: str) -> Iterator[str]:
    """The name and what follows each of its dots: how PEFT compares names with plain targets."""
    yield name
    position = name.find(".")
    while position >= 0:
        yield name[position + 1 :]
        position = name.find(".", position + 1)


def _key(*parts: str) -> str:
    return ".".join(("base_model.model", *parts))
