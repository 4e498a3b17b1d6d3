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

from serverlesslora.engine.lora.projection import FusedGroup
from serverlesslora_kernels import fused

ROPE = "apply_rotary_pos_emb"


def take_shortcuts(model: PreTrainedModel) -> int:
    """Call after LoraModel has wrapped the model. Returns how many modules were given a shortcut."""
    taken = 0
    for module in model.modules():
        shortcut = _shortcut(module)
        if shortcut is not None:
            module.__dict__["forward"] = shortcut
            taken += 1
    return taken


def _shortcut(module: nn.Module) -> Callable[..., Any] | None:
    forward = type(module).forward
    if "forward" in module.__dict__ or not isinstance(forward, FunctionType):
        return None
    if _same(forward, modeling_llama.LlamaRMSNorm.forward):
        return _plain_norm(module)
    if _same(forward, modeling_gemma.GemmaRMSNorm.forward) and _same(
        getattr(type(module), "_norm", None), modeling_gemma.GemmaRMSNorm._norm
    ):
        return _offset_norm(module)
    if _same(forward, modeling_llama.LlamaMLP.forward):
        return _gated_mlp(module)
    if ROPE in forward.__code__.co_names and _is_llama_rope(forward.__globals__):
        return _with_fused_rope(module, forward)
    return None


def _plain_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    weight, eps = norm.weight.detach(), norm.variance_epsilon
    return lambda x: fused.rms_norm(x, weight, eps)


def _offset_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    weight, eps = norm.weight.detach(), norm.eps
    return lambda x: fused.rms_norm(x, weight, eps, offset=True)


def _gated_mlp(mlp: Any) -> Callable[[Tensor], Tensor] | None:
    """down(act(gate(x)) · up(x)) where gate and up are one matrix product already."""
    group = getattr(mlp.gate_proj.__dict__.get("forward"), "__self__", None)
    gate = _gate_of(mlp.act_fn)
    if not isinstance(group, FusedGroup) or len(group.sizes) != 2 or gate is None:
        return None
    joint, down = group.joint, mlp.down_proj.forward
    return lambda x: down(gate(joint(x)))


def _gate_of(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    probe = torch.linspace(-8, 8, 64)
    if torch.equal(activation(probe), F.silu(probe)):
        return fused.silu_mul
    if torch.equal(activation(probe), F.gelu(probe, approximate="tanh")):
        return fused.gelu_tanh_mul
    return None


def _with_fused_rope(attention: nn.Module, forward: FunctionType) -> Callable[..., Any]:
    """The same code with another function under the name of the rotary embedding: for this module, not the library."""
    names = {**forward.__globals__, ROPE: _rope_for(forward.__globals__[ROPE])}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(own, attention)


def _rope_for(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if q.shape[0] != 1 or unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1]:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        q, k = fused.rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
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
