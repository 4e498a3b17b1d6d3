"""The one attention function behind every model family: packed sequences over a paged KV cache.

transformers looks attention up by name and calls it with the attention *module*; each module carries a reference to
the `PagedAttention` of its engine. That is how a step's plan reaches every layer without a global variable and without
relying on a family to pass unknown keyword arguments through. The name is not registered with the mask interface, so
transformers builds no mask: the plan knows which keys a query may see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from serverlesslora.engine.device import KvStore, LayerShape
from serverlesslora.errors import ConfigError

NAME = "serverlesslora_paged"
_OWNER = "_serverlesslora_paged_attention"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class PagedAttention:
    """Takes attention over from the model: the KV cache of every layer, and the plan of the step being computed."""

    def __init__(self, model: PreTrainedModel, create_kv: Callable[[Callable[[], list[LayerShape]]], KvStore]) -> None:
        """`create_kv` may ask for the shapes of all layers."""
        self._plan: Any = None
        self._seen: dict[int, LayerShape] | None = None  # while the shapes are found out
        self._calls = 0
        self._num_layers = _require_supported(model)
        self._model = model
        self._before = model.config.get_text_config()._attn_implementation
        AttentionInterface.register(NAME, attend)
        for module in model.modules():
            setattr(module, _OWNER, self)
        model.set_attn_implementation(NAME)
        if model.config.get_text_config()._attn_implementation != NAME:
            raise ConfigError(
                f"{type(model).__name__} cannot be served: it does not use transformers' attention interface"
            )
        self.kv = create_kv(self._find_shapes)

    def close(self) -> None:
        """Give the model back the attention it had."""
        self.kv.close()
        for module in self._model.modules():
            delattr(module, _OWNER)
        self._model.set_attn_implementation(self._before)

    def begin(self, plan: Any) -> None:
        """`plan` is one of `kv.plan`."""
        self._plan, self._calls = plan, 0

    def end(self) -> None:
        """A family that computes attention by itself would ignore the cache and answer nonsense: notice it."""
        self._plan = None
        if self._calls != self._num_layers:
            raise ConfigError(
                f"this model family cannot be served: {self._calls} of its {self._num_layers} layers use"
                " transformers' attention interface"
            )

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]"""
        self._calls += 1
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self._seen is not None:
            self._seen[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        assert self._plan is not None, "attention outside of a step"
        scale = options.get("scaling")
        out = self.kv.attend(
            layer,
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self._plan,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            # Some families only mention the window on the module and rely on the mask.
            sliding_window=options.get("sliding_window", getattr(module, "sliding_window", None)),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        return out.unsqueeze(0)

    @torch.inference_mode()
    def _find_shapes(self) -> list[LayerShape]:
        """By running one token through the model: what it keeps is nobody's field name."""
        self._seen, self._calls = {}, 0
        one = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        self._model.base_model(input_ids=one, position_ids=one, use_cache=False)
        seen, self._seen = self._seen, None
        self.end()
        assert sorted(seen) == list(range(self._num_layers))
        return [seen[layer] for layer in range(self._num_layers)]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' calling convention; attention weights are not returned."""
    owner: PagedAttention = getattr(module, _OWNER)
    return owner.attend(module, query, key, value, **options), None


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers, from a text config."""
    query_heads = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    widths = 2 * heads * head_dim
    if getattr(config, "qk_nope_head_dim", None):  # latent attention is expanded to all query heads
        widths = query_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return int(config.num_hidden_layers * widths * dtype.itemsize)


def _require_supported(model: PreTrainedModel) -> int:
    """The number of attention layers; refuses what a paged cache of keys and values cannot express."""
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise ConfigError(f"{type(model).__name__} has layers of kind {sorted(unknown)}, which cannot be served yet")
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        raise ConfigError(f"{type(model).__name__} is not a causal decoder")
    return int(config.num_hidden_layers)
