"""From the tensor names PEFT saves to (module, what it is): the only place that knows PEFT's spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from serverlesslora.errors import AdapterInvalid

PREFIX = "base_model.model."

# Last two parts, or the last part, of a saved name -> our word for it.
_TWO_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
}
_ONE_PART = {
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
}

# The same parameter as another tensor of the file, or the base's that the adapter's own replaces.
_WRAPPERS = {"modules_to_save": "copy=", "original_module": "base=", "base_layer": "="}


class Found(NamedTuple):
    key: str  # as in the file, for messages
    tensor: Tensor


class ModuleTensors:
    """What the file holds for one module: `take` by kind; whatever is left at the end was not understood."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: dict[str, Found] = {}

    def add(self, kind: str, found: Found) -> None:
        if kind in self._found:
            raise AdapterInvalid(f"tensors {self._found[kind].key!r} and {found.key!r} are for the same place")
        self._found[kind] = found

    def take(self, kind: str) -> Found | None:
        return self._found.pop(kind, None)

    def take_parameters(self) -> dict[str, Found]:
        """Plain parameters of the module itself (trained biases, modules_to_save), by parameter name."""
        names = [kind for kind in self._found if kind.startswith("=")]
        return {name[1:]: self._found.pop(name) for name in names}

    @property
    def parameters(self) -> dict[str, Found]:
        return {kind[1:]: found for kind, found in self._found.items() if kind.startswith("=")}

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self._found)

    @property
    def leftover(self) -> list[str]:
        return [found.key for found in self._found.values()]


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, ModuleTensors]:
    """Kinds are a, b, b_bias, ... as above, with a leading `<depth>:` for LoRA nested on one module's parameters,
    and `=name` for a plain parameter."""
    modules: dict[str, ModuleTensors] = {}
    for key, tensor in tensors.items():
        head, _, last = key.removeprefix(PREFIX).rpartition(".")
        parent, _, middle = head.rpartition(".")
        kind = _TWO_PARTS.get(f"{middle}.{last}")
        name = parent if kind else head
        kind = kind or _ONE_PART.get(last)
        if kind is None and middle in _WRAPPERS:  # saved twice by PEFT when the vocabulary was resized
            module_name = parent.removesuffix(".token_adapter")
            kind, name = _WRAPPERS[middle] + last, module_name
        depth = 0
        while name.endswith(".base_layer"):
            name = name[: -len(".base_layer")]
            depth += 1
        if kind is None:
            kind = f"={last}"
        elif depth and "=" not in kind:
            kind = f"{depth}:{kind}"
        module = modules.get(name)
        if module is None:
            module = modules[name] = ModuleTensors(name)
        module.add(kind, Found(key, tensor))
    return modules
