"""The one attention function behind every model family: packed sequences over a paged KV cache.

transformers looks attention up by name and calls it with the attention *module*; each module carries a reference to
the `PagedAttention` of its engine. That is how a step's plan reaches every layer without a global variable and without
relying on a family to pass unknown keyword arguments through. The name is not registered with the mask interface, so
transformers builds no mask: the plan knows which keys a query may see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from serverlesslora.errors import ConfigError
from serverlesslora_kernels.attention import AttentionPlan, KvCache, allocate_kv, paged_attention, write_kv

NAME = "serverlesslora_paged"
_OWNER = "_serverlesslora_paged_attention"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class PagedAttention:
    """The paged KV cache of every layer, and the plan of the step that is being computed."""

    def __init__(self, model: PreTrainedModel, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers: dict[int, KvCache] = {}
        self._plan: AttentionPlan | None = None
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

    def close(self) -> None:
        """Give the model back the attention it had."""
        for module in self._model.modules():
            delattr(module, _OWNER)
        self._model.set_attn_implementation(self._before)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)

    def begin(self, plan: AttentionPlan) -> None:
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
        assert self._plan is not None, "attention outside of a step"
        self._calls += 1
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        cache = self._layers.get(layer)
        if cache is None:
            cache = self._layers[layer] = allocate_kv(
                self.num_blocks,
                self.block_size,
                keys.shape[1],
                keys.shape[2],
                values.shape[2],
                keys.dtype,
                keys.device,
            )
        k_cache, v_cache = cache
        write_kv(k_cache, v_cache, keys, values, self._plan)
        scale = options.get("scaling")
        out = paged_attention(
            query[0].transpose(0, 1),
            k_cache,
            v_cache,
            self._plan,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            # Some families only mention the window on the module and rely on the mask.
            sliding_window=options.get("sliding_window", getattr(module, "sliding_window", None)),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        return out.unsqueeze(0)


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
