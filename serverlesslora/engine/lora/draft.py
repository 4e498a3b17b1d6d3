"""An adapter while it is put together: what was built so far, and the rules that all kinds of modules share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serverlesslora.engine.lora.names import Found, ModuleTensors
from serverlesslora.engine.lora.occasional import OccasionalSite, Part
from serverlesslora.engine.lora.projection import LinearPart, LinearSite
from serverlesslora.engine.lora.settings import LoraSettings
from serverlesslora.engine.lora.sites import Sites
from serverlesslora.errors import AdapterInvalid

MAX_NEW_TOKENS = 65_536


class Draft:
    """Parts by site; `adapted` and `saved` tell the completeness check which names the file covered."""

    def __init__(self, settings: LoraSettings, sites: Sites, modules: dict[str, ModuleTensors]) -> None:
        self.settings = settings
        self.sites = sites
        self.modules = modules
        self.linears: dict[LinearSite, LinearPart] = {}
        self.others: dict[OccasionalSite, Part] = {}
        self.kinds: set[str] = set()
        self.rank = 0
        self.vocab_size = sites.vocab_size
        self.adapted: set[str] = set()  # modules and parameters with LoRA
        self.saved: set[str] = set()  # plain parameters in the file

    def note(self, name: str, rank: int) -> None:
        self.adapted.add(name)
        self.rank = max(self.rank, rank)

    def grow(self, vocab_size: int) -> None:
        self.vocab_size = max(self.vocab_size, vocab_size)
        self.kinds.add("vocabulary")

    def join(self, site: LinearSite, own: LinearPart, tied: LinearPart | None) -> None:
        """A tied output embedding gets a part from its own tensors and, after it, one from the input embedding's."""
        if tied is not None:
            before, after = own.before + tied.before, own.after + tied.after
            own = LinearPart(own.factors or tied.factors, before, after, max(own.width, tied.width))
        self.linears[site] = own

    def take_parameters(self, tensors: ModuleTensors) -> dict[str, Found]:
        """Plain parameters, each with a reason in the configuration for being in the file."""
        for kind in sorted(tensors.kinds):
            if kind.startswith(("copy=", "base=")):
                self.redundant(tensors, kind)
        taken = tensors.take_parameters()
        for name, found in taken.items():
            embedding = name == "weight" and tensors.name in (self.sites.input_name, self.sites.output_name)
            biased = self.settings.bias != "none" and "bias" in name
            if not (embedding or biased or self.listed(tensors.name)):
                raise AdapterInvalid(
                    f"tensor {found.key!r} is a whole parameter, but adapter_config.json lists {tensors.name!r}"
                    " neither in modules_to_save nor through bias"
                )
            self.saved.add(f"{tensors.name}.{name}")
            if self.listed(tensors.name):
                self.kinds.add("modules_to_save")
            elif biased:
                self.kinds.add("bias")
        return taken

    def redundant(self, tensors: ModuleTensors, kind: str) -> None:
        """PEFT saves a `modules_to_save` embedding of a resized base three times; only the trained one counts."""
        prefix, _, name = kind.partition("=")
        found, trained = tensors.take(kind), tensors.parameters.get(name)
        assert found is not None
        if not self.listed(tensors.name) or trained is None:
            raise AdapterInvalid(
                f"tensor {found.key!r} belongs to modules_to_save, which does not list {tensors.name!r}"
            )
        if prefix == "copy" and not torch.equal(found.tensor, trained.tensor):
            raise AdapterInvalid(f"tensors {found.key!r} and {trained.key!r} should be the same and differ")

    def listed(self, module: str) -> bool:
        """Whether the module or one that holds it is named by modules_to_save (PEFT compares ends of names)."""
        path = module
        while path:
            if path.endswith(self.settings.modules_to_save):
                return True
            path = path.rpartition(".")[0]
        return False

    def is_parameter(self, module: nn.Module, name: str, found: Found) -> bool:
        if name not in module._parameters or module._parameters[name] is None:
            raise AdapterInvalid(f"tensor {found.key!r} is a parameter that this backbone does not have")
        return True

    def is_target_parameter(self, full: str) -> bool:
        return f".{full}".endswith(tuple(f".{target}" for target in self.settings.target_parameters))

    def expect(self, found: Found | None, expected: bool, field: str, name: str) -> None:
        if found is None and expected:
            raise AdapterInvalid(f"tensor {name!r} is missing: {field} is true")
        if found is not None and not expected:
            raise AdapterInvalid(f"tensor {found.key!r} is in the file, but {field} is false")

    def ties(self, name: str) -> bool:
        return self.sites.tied and name == self.sites.input_name and self.sites.output_name in self.sites.linears

    def has(self, module: str, kind: str) -> bool:
        return module in self.modules and kind in self.modules[module].kinds

    def names_output(self) -> bool:
        """Whether the output embedding has retrained tokens of its own, so that PEFT does not tie them."""
        return any(key and self.sites.output_name.endswith(key) for key in self.settings.tokens)

    def tokens(self, found: Found, name: str, width: int) -> tuple[Tensor, Tensor]:
        indices: tuple[int, ...] | None = None
        for key, value in self.settings.tokens.items():
            tied = self.sites.tied and name == self.sites.output_name
            if (key == "" and (name == self.sites.input_name or tied)) or (
                key and (name == key or name.endswith(f".{key}"))
            ):
                indices = value
        if not indices:
            raise AdapterInvalid(
                f"tensor {found.key!r} has retrained tokens, but trainable_token_indices names none for it"
            )
        if max(indices) >= self.sites.vocab_size + MAX_NEW_TOKENS:
            raise AdapterInvalid(f"trainable_token_indices holds {max(indices)}, far beyond the backbone's vocabulary")
        rows = shaped(found, (len(indices), width), name)
        order = sorted(range(len(indices)), key=indices.__getitem__)
        self.kinds.add("tokens")
        self.adapted.add(name)
        return torch.tensor(sorted(indices), device=rows.device), rows[torch.tensor(order, device=rows.device)]


def shaped(found: Found, expected: tuple[int, ...], name: str) -> Tensor:
    if tuple(found.tensor.shape) != expected:
        raise wrong_shape(found, expected, name)
    return found.tensor


def wrong_shape(found: Found, expected: tuple[int, ...], name: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"tensor {found.key!r} has shape {list(found.tensor.shape)}, expected {list(expected)} for {name!r}"
        " of this backbone: wrong base model, wrong rank in adapter_config.json, or swapped tensors"
    )


def none_left(own: dict[str, Found], name: str) -> None:
    for found in own.values():
        raise AdapterInvalid(f"tensor {found.key!r} is a parameter that {name!r} of this backbone does not have")


def needs_lora(*found: Found | None) -> None:
    for one in found:
        if one is not None:
            raise AdapterInvalid(f"tensor {one.key!r} belongs to LoRA tensors that are missing")
