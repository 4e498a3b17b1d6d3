"""What PEFT saves, on the CUDA engine's LoRA path: the same batches against the same PEFT logits as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from serverlesslora.engine.cuda.device import CudaDevice
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.shortcuts import take_shortcuts
from tests import test_lora_peft as on_cpu

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_device(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapped(model: PreTrainedModel) -> LoraModel:
        lora = LoraModel(model, device)
        take_shortcuts(model, device)
        return lora

    monkeypatch.setattr(on_cpu, "LoraModel", wrapped)


def test_ranks_from_1_to_64_in_one_batch(tmp_path: Path) -> None:
    on_cpu.test_ranks_from_1_to_64_in_one_batch(tmp_path)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=SLOW)], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        # What stands between a projection and its sum with the residual stream:
        {"bias": "all", "use_dora": True},
        {"modules_to_save": ["mlp", "input_layernorm", "norm"], "target_modules": list(on_cpu.ATTENTION)},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_dora": True},
        pytest.param({"lora_bias": True}, marks=SLOW),
        pytest.param({"bias": "lora_only"}, marks=SLOW),
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, marks=SLOW),
        pytest.param({"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 4]}, marks=SLOW),
    ],
    ids=str,
)
def test_options_of_peft(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    on_cpu.test_options_of_peft(tmp_path, options, tied)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=SLOW)], ids=["tied", "untied"])
def test_new_tokens(tmp_path: Path, tied: bool) -> None:
    on_cpu.test_new_tokens(tmp_path, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, tied)


@SLOW
@pytest.mark.parametrize("config", [on_cpu.MIXTRAL, on_cpu.GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_experts(tmp_path: Path, config: Any) -> None:
    options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    on_cpu.test_experts(tmp_path, config, options)


@SLOW
def test_gpt2(tmp_path: Path) -> None:
    on_cpu.test_gpt2(tmp_path, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True})
