"""Fused kernels in the place of small operations of transformers' layers, only where they compute the same thing.

Between its matrix products a decoder layer runs some thirty small operations; for one token they cost more time than
their arithmetic. A module is given a shortcut if the code of its `forward` is, instruction by instruction, the code of
a reference this file names; anything else is left as it is. So a family nobody has thought of is slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

from serverlesslora.engine.device import Arithmetic, Device
from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.lora.projection import FusedGroup, Projection

ROPE = "apply_rotary_pos_emb"


def take_shortcuts(model: PreTrainedModel, device: Device = HOST) -> int:
    """Call after LoraModel has wrapped the model. Returns how many modules were given a shortcut."""
    taken = 0
    for module in model.modules():
        shortcut = _shortcut(module, device.arithmetic)
        if shortcut is None and device.accumulates:
            shortcut = _layer(module)
        if shortcut is not None:
            module.__dict__["forward"] = shortcut
            taken += 1
    return taken


def _shortcut(module: nn.Module, ops: Arithmetic) -> Callable[..., Any] | None:
    forward = type(module).forward
    if "forward" in module.__dict__ or not isinstance(forward, FunctionType):
        return None
    if _same(forward, modeling_llama.LlamaRMSNorm.forward):
        return _plain_norm(module, ops)
    if _same(forward, modeling_gemma.GemmaRMSNorm.forward) and _same(
        getattr(type(module), "_norm", None), modeling_gemma.GemmaRMSNorm._norm
    ):
        return _offset_norm(module, ops)
    if _same(forward, modeling_llama.LlamaMLP.forward):
        return _gated_mlp(module, ops)
    if ROPE in forward.__code__.co_names and _is_llama_rope(forward.__globals__):
        return _with_fused_rope(module, forward, ops)
    return None


def _plain_norm(norm: Any, ops: Arithmetic) -> Callable[[Tensor], Tensor]:
    weight, eps = norm.weight.detach(), norm.variance_epsilon
    return lambda x: ops.rms_norm(x, weight, eps)


def _offset_norm(norm: Any, ops: Arithmetic) -> Callable[[Tensor], Tensor]:
    weight, eps = norm.weight.detach(), norm.eps
    return lambda x: ops.rms_norm(x, weight, eps, offset=True)


def _layer(layer: Any) -> Callable[..., Tensor] | None:
    """A pre-norm layer whose two projections back into the residual stream add to it in place.

    Two kernels less per layer, and one rounding less per sum. The stream is the layer's own input, which nobody else
    holds: the embedding made it or the layer before did.
    """
    if not _same(type(layer).forward, modeling_llama.LlamaDecoderLayer.forward) or "forward" in layer.__dict__:
        return None
    from_attention = _single(getattr(layer.self_attn, "o_proj", None))
    from_mlp = _single(getattr(layer.mlp, "down_proj", None))
    if from_attention is None or from_mlp is None:
        return None

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        stream = _sum(hidden_states, from_attention, lambda: layer.self_attn(hidden_states=normed, **kwargs)[0])
        return _sum(stream, from_mlp, lambda: layer.mlp(layer.post_attention_layernorm(stream)))

    return forward


def _sum(stream: Tensor, last: Projection, compute: Callable[[], Tensor]) -> Tensor:
    """stream + compute(), whether `last` adds to the stream itself (and returns that very tensor) or is passed by."""
    last.into = stream
    try:
        result = compute()
    finally:
        last.into = None
    return stream if result is stream else stream + result


def _single(module: nn.Module | None) -> Projection | None:
    owner = None if module is None else getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, Projection) and len(owner.columns) == 1 else None


def _gated_mlp(mlp: Any, ops: Arithmetic) -> Callable[[Tensor], Tensor] | None:
    """down(act(gate(x)) · up(x)) where gate and up are one matrix product already."""
    group = getattr(mlp.gate_proj.__dict__.get("forward"), "__self__", None)
    gate = _gate_of(mlp.act_fn, ops)
    if not isinstance(group, FusedGroup) or len(group.sizes) != 2 or gate is None:
        return None
    joint, down = group.joint, mlp.down_proj.forward
    return lambda x: down(gate(joint(x)))


def _gate_of(activation: Callable[[Tensor], Tensor], ops: Arithmetic) -> Callable[[Tensor], Tensor] | None:
    probe = torch.linspace(-8, 8, 64)
    if torch.equal(activation(probe), F.silu(probe)):
        return ops.silu_mul
    if torch.equal(activation(probe), F.gelu(probe, approximate="tanh")):
        return ops.gelu_tanh_mul
    return None


def _with_fused_rope(attention: nn.Module, forward: FunctionType, ops: Arithmetic) -> Callable[..., Any]:
    """The same code with another function under the name of the rotary embedding: for this module, not the library."""
    names = {**forward.__globals__, ROPE: _rope_for(forward.__globals__[ROPE], ops)}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(own, attention)


def _rope_for(original: Callable[..., tuple[Tensor, Tensor]], ops: Arithmetic) -> Callable[..., tuple[Tensor, Tensor]]:
    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if q.shape[0] != 1 or unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1]:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        q, k = ops.rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0)

    return rope


def _is_llama_rope(names: dict[str, Any]) -> bool:
    return _same(names.get(ROPE), modeling_llama.apply_rotary_pos_emb) and _same(
        names.get("rotate_half"), modeling_llama.rotate_half
    )


def _same(one: Any, other: Any) -> bool:
    """The two functions do the same: equal instructions on equal names and constants."""
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    return one is other or (
        _essence(one.__code__) == _essence(other.__code__)
        and one.__defaults__ == other.__defaults__
        and one.__closure__ is None
        and other.__closure__ is None
    )


def _essence(code: CodeType) -> tuple[object, ...]:
    # The first constant is the docstring, which may differ and does nothing.
    return code.co_code, code.co_names, code.co_consts[1:], code.co_argcount, code.co_flags
