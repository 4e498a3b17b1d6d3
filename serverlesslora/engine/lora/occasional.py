"""Sites that few adapters touch (embeddings, norms, routers): hooked in only while a loaded adapter needs them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from serverlesslora.engine.lora.batch import Batch
from serverlesslora.engine.lora.overlays import Overlay


class Part(Protocol):
    @property
    def tensors(self) -> Sequence[Tensor | None]: ...


class OccasionalSite(ABC):
    """Replaces `module.forward` from the first adapter that needs it to the last."""

    def __init__(self, name: str, module: nn.Module, batch: Batch) -> None:
        self.name = name
        self.module = module
        self._batch = batch
        self._users = 0
        self._original: Callable[..., Any] = module.forward
        self._patched = "forward" in module.__dict__  # by somebody before us

    def retain(self) -> None:
        if self._users == 0:
            self.module.__dict__["forward"] = self.forward
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            if self._patched:
                self.module.__dict__["forward"] = self._original
            else:
                del self.module.__dict__["forward"]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes, with the parts of the adapters in this batch."""

    def _parts(self) -> list[tuple[int, int, Any]]:
        """(start, end, part) of the adapters in this batch that change this site."""
        plans = self._batch.plans
        found: list[tuple[int, int, Any]] | None = plans.get(self)
        if found is None:
            found = [
                (start, end, adapter.others[self])
                for start, end, adapter in self._batch.adapted
                if adapter is not None and self in adapter.others
            ]
            if self._batch.adapted:
                plans[self] = found
        return found


class EmbeddingPart(NamedTuple):
    overlays: tuple[Overlay, ...]
    factor: Tensor | None = None  # DoRA's, applied to the row as a whole
    vocab_size: int = 0

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.factor, *(tensor for overlay in self.overlays for tensor in overlay.tensors)]


class EmbeddingSite(OccasionalSite):
    """An input embedding; ids beyond the backbone's table exist only for adapters that bring rows for them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = self._parts()
        if not parts:
            return self._original(*args, **kwargs)
        ids: Tensor = args[0] if args else kwargs["input"]
        flat = ids.reshape(-1)
        self._batch.check(flat.shape[0], self.name)
        assert isinstance(self.module, nn.Embedding)
        known = self.module.num_embeddings
        y: Tensor = self._original(ids.clamp(max=known - 1) if max(part.vocab_size for _, _, part in parts) else ids)
        rows = y.view(-1, y.shape[-1])
        for start, end, part in parts:
            for overlay in part.overlays:
                overlay.apply(rows[start:end], flat[start:end])
            if part.factor is not None:
                rows[start:end] *= part.factor
        return y


class LeafPart(NamedTuple):
    """The same module with the adapter's own parameters."""

    module: nn.Module

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.module.get_parameter(name) for name in getattr(self.module, "_own_names", ())]


def own_copy(module: nn.Module, parameters: dict[str, Tensor]) -> LeafPart:
    """A copy of a leaf module that shares everything but the given parameters."""
    clone = copy.copy(module)
    clone.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
    clone.__dict__["_parameters"] = module._parameters | {
        name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()
    }
    clone.__dict__["_own_names"] = tuple(parameters)
    return LeafPart(clone)


class LeafSite(OccasionalSite):
    """A module without children that works row by row (norms, routers): rows of an adapter are computed again."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self._original(*args, **kwargs)
        parts = self._parts()
        if not parts:
            return result
        x, rest = args[0], args[1:]
        assert isinstance(x, Tensor)
        dim = self._row_dim(x)
        outputs = (result,) if isinstance(result, Tensor) else result
        for start, end, part in parts:
            own = part.module(x.narrow(dim, start, end - start), *rest, **kwargs)
            for whole, piece in zip(outputs, (own,) if isinstance(own, Tensor) else own, strict=True):
                at = dim if whole.ndim == x.ndim else self._row_dim(whole)
                whole.narrow(at, start, end - start).copy_(piece)
        return result

    def _row_dim(self, x: Tensor) -> int:
        """The dimension of the packed rows; norms of single heads see [1, rows, heads, n] or [1, heads, rows, n].

        Where both sizes agree the larger stride tells: heads are cut out of rows, never the other way round.
        """
        candidates = [dim for dim in range(x.ndim - 1) if x.shape[dim] == self._batch.rows]
        if not candidates:
            self._batch.check(x.shape[-2], self.name)
        return max(candidates, key=x.stride)


class ExpertFactors(NamedTuple):
    """LoRA on a stack of experts."""

    a: Tensor  # [experts, rank, in]
    b: Tensor  # [experts, out, rank]
    scale: float


class ExpertsPart(NamedTuple):
    factors: dict[str, ExpertFactors]
    replaced: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor | None]:
        own: list[Tensor | None] = list(self.replaced.values())
        for factors in self.factors.values():
            own += [factors.a, factors.b]
        return own


class ExpertsSite(OccasionalSite):
    """A mixture-of-experts layer whose experts are stacked parameters (transformers' experts interface)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = self._parts()
        if not parts:
            return self._original(*args, **kwargs)
        hidden, index, weights = (
            value if position >= len(args) else args[position]
            for position, value in enumerate(
                kwargs.get(key) for key in ("hidden_states", "top_k_index", "top_k_weights")
            )
        )
        assert isinstance(hidden, Tensor)
        assert isinstance(index, Tensor)
        assert isinstance(weights, Tensor)
        self._batch.check(hidden.shape[0], self.name)
        result = torch.empty_like(hidden)
        adapted = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for start, end, part in parts:
            adapted[start:end] = True
            result[start:end] = self._run(part, hidden[start:end], index[start:end], weights[start:end])
        plain = (~adapted).nonzero().squeeze(1)
        if len(plain):
            result[plain] = self._original(hidden[plain], index[plain], weights[plain]).to(result.dtype)
        return result

    def _run(self, part: ExpertsPart, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        module: Any = self.module
        up = "gate_up_proj" if module.has_gate else "up_proj"
        result = torch.zeros_like(x)
        for expert in sorted(set(index.flatten().tolist())):
            rows, place = torch.where(index == expert)
            inner = self._linear(part, up, expert, x[rows])
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            outer = self._linear(part, "down_proj", expert, inner)
            if module.has_post_expert_norm:
                outer = module.post_expert_norm(outer)
            result.index_add_(0, rows, (outer * weights[rows, place, None]).to(result.dtype))
        return result

    def _linear(self, part: ExpertsPart, name: str, expert: int, x: Tensor) -> Tensor:
        module: Any = self.module
        weight = part.replaced.get(name, getattr(module, name))[expert].detach()
        y: Tensor = x @ (weight if module.is_transposed else weight.t())
        if module.has_bias:
            bias = f"{name}_bias"
            y = y + part.replaced.get(bias, getattr(module, bias))[expert].detach()
        factors = part.factors.get(name)
        if factors is not None:
            y.addmm_(x @ factors.a[expert].t(), factors.b[expert].t(), alpha=factors.scale)
        return y


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of transformers' experts interface, with weights stacked in three dimensions."""
    needed = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "down_proj")
    if not all(hasattr(module, name) for name in needed):
        return False
    return isinstance(module.down_proj, Tensor) and module.down_proj.ndim == 3
