"""Shortcuts change speed, not numbers, and are taken only by code that is known instruction by instruction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.lora import LoraModel, Segment
from serverlesslora.engine.shortcuts import _same, take_shortcuts
from tests.fakes import tiny_model
from tests.test_lora_peft import adjacent

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS, use_cache=False).logits
        return result


@pytest.mark.parametrize(
    ("family", "at_least"),
    # Norms, attention and (where gate and up are separate) the MLP of every layer, and the last norm.
    [("llama", 9), ("qwen2", 9), ("qwen3", 9), ("mistral", 9), ("gemma2", 9), ("granite", 9), ("gpt2", 0), ("phi3", 5)],
)
def test_same_logits_with_shortcuts(family: str, at_least: int) -> None:
    model = adjacent(tiny_model(family))
    expected = logits(model)
    quick = copy.deepcopy(model)
    lora = LoraModel(adjacent(quick))
    assert take_shortcuts(quick) >= at_least
    lora.set_segments([Segment(0, IDS.shape[1], None)])
    torch.testing.assert_close(logits(quick), expected, rtol=0, atol=1e-5)


def test_code_that_differs_is_left_alone() -> None:
    class Doubled(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            result: Tensor = 2 * super().forward(hidden_states)
            return result

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    tree = nn.ModuleList([Doubled(8), Other()])
    assert take_shortcuts(tree) == 0
    assert not _same(Doubled.forward, modeling_llama.LlamaRMSNorm.forward)


def test_the_library_itself_is_not_touched() -> None:
    before = modeling_llama.apply_rotary_pos_emb
    model = adjacent(tiny_model("llama"))
    LoraModel(model)
    take_shortcuts(model)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert "forward" not in tiny_model("llama").model.norm.__dict__


def test_a_broken_kernel_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOST.arithmetic, "rms_norm", lambda x, weight, eps, offset=False: x)
    model = adjacent(tiny_model("llama"))
    expected = logits(model)
    lora = LoraModel(model)
    take_shortcuts(model)
    lora.set_segments([Segment(0, IDS.shape[1], None)])
    assert not torch.allclose(logits(model), expected, atol=1e-3)
