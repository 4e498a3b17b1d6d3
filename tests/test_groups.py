"""Fused projections equal separate ones bit for bit in meaning, whatever the order and the inputs of the calls."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from serverlesslora.engine.lora import Adapter, LoraModel, Segment, join_adjacent
from serverlesslora.engine.lora.groups import find_groups

torch.set_num_threads(1)
NAMES = ("q_proj", "k_proj", "v_proj")


def llama(*, adjacent: bool, bias: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attention_bias=bias,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    if adjacent:
        for parent, names in ((attention(model), NAMES), (mlp(model), ("gate_proj", "up_proj"))):
            children = [parent.get_submodule(name) for name in names]
            for field in ("weight", "bias") if bias and names is NAMES else ("weight",):
                parts = [child.get_parameter(field) for child in children]
                pieces = torch.cat(list(parts)).split_with_sizes([part.shape[0] for part in parts])
                for child, piece in zip(children, pieces, strict=True):
                    setattr(child, field, nn.Parameter(piece, requires_grad=False))
    return model


def attention(model: PreTrainedModel) -> Any:
    return model.get_submodule("model.layers.0.self_attn")


def mlp(model: PreTrainedModel) -> Any:
    return model.get_submodule("model.layers.0.mlp")


def adapter_directory(path: Path, model: PreTrainedModel, rank: int, targets: tuple[str, ...] = NAMES) -> Path:
    path.mkdir()
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(targets) and isinstance(module, nn.Linear):
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, module.in_features) * 0.2
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.2
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_join_adjacent() -> None:
    whole = torch.arange(60.0).view(10, 6)
    parts = list(whole.split_with_sizes([4, 1, 5]))
    joined = join_adjacent(parts)
    assert joined is not None
    assert torch.equal(joined, whole)
    assert joined.data_ptr() == whole.data_ptr()
    assert join_adjacent(parts[1:]) is not None
    assert join_adjacent(parts[:1]) is not None
    assert join_adjacent([parts[0], parts[2]]) is None  # a gap
    assert join_adjacent([parts[1], parts[0]]) is None  # the wrong order
    assert join_adjacent([parts[0], parts[1].clone()]) is None  # another storage
    assert join_adjacent([whole[:4, :3], whole[:4, 3:]]) is None  # not contiguous
    assert join_adjacent([parts[0], parts[1].view(torch.int32)]) is None  # another dtype
    assert join_adjacent([whole[:2], whole[2:].reshape(-1, 3)]) is None  # another width


def test_only_adjacent_siblings_are_grouped() -> None:
    assert list(find_groups(llama(adjacent=False))) == []
    groups = [[name.rpartition(".")[2] for name, _ in members] for members in find_groups(llama(adjacent=True))]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    uneven = llama(adjacent=True)
    attention(uneven).k_proj.bias = nn.Parameter(torch.zeros(16))
    assert [members[0][0].rpartition(".")[2] for members in find_groups(uneven)] == ["gate_proj"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)) + [NAMES + NAMES, ("v_proj",) * 2 + NAMES])
def test_any_order_of_calls(tmp_path: Path, order: tuple[str, ...], bias: bool) -> None:
    plain, fused = llama(adjacent=False, bias=bias), llama(adjacent=True, bias=bias)
    lora, oracle = LoraModel(fused), LoraModel(plain)
    path = adapter_directory(tmp_path / "a", plain, 4)
    segments = [(0, 2, None), (2, 5, "a")]
    for model in (lora, oracle):
        adapter = model.load(path, "a")
        model.set_segments([Segment(start, end, adapter if name else None) for start, end, name in segments])
    x, other = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    for inputs in ([x] * len(order), [x, other] * len(order)):
        for name, value in zip(order, inputs, strict=False):
            expected = getattr(attention(plain), name)(value)
            torch.testing.assert_close(getattr(attention(fused), name)(value), expected, rtol=1e-5, atol=1e-5)


def test_stale_results_are_never_handed_out(tmp_path: Path) -> None:
    plain, fused = llama(adjacent=False), llama(adjacent=True)
    lora, oracle = LoraModel(fused), LoraModel(plain)
    path = adapter_directory(tmp_path / "a", plain, 4)
    adapters: dict[int, Adapter] = {id(model): model.load(path, "a") for model in (lora, oracle)}
    x = torch.randn(1, 3, 32)

    def both(adapted: bool) -> None:
        for model in (lora, oracle):
            model.set_segments([Segment(0, 3, adapters[id(model)] if adapted else None)])

    def assert_same(name: str) -> None:
        actual, expected = (getattr(attention(model), name)(x) for model in (fused, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    both(False)
    assert_same("q_proj")
    both(True)  # the same tensor, another batch
    assert_same("k_proj")
    assert_same("q_proj")
    x.mul_(2)  # the same tensor, other values
    assert_same("k_proj")
    assert_same("v_proj")
    assert_same("q_proj")
    assert_same("k_proj")
    attention(fused).v_proj(x).zero_()  # the caller may write into what it got
    assert_same("v_proj")


def test_activations_are_released() -> None:
    fused = llama(adjacent=True)
    lora = LoraModel(fused)
    group = lora._sites.groups[0]
    x = torch.randn(1, 3, 32)
    for name in NAMES:
        getattr(attention(fused), name)(x)
    assert group._input is None
    assert all(output is None for output in group._outputs)


def test_bfloat16_mixed_batch(tmp_path: Path) -> None:
    """The native kernels, fused, with ranks that differ: within bf16's rounding of float32."""
    exact, fused = llama(adjacent=False), llama(adjacent=True, dtype=torch.bfloat16)
    exact.load_state_dict(fused.state_dict())
    oracle, lora = LoraModel(exact), LoraModel(fused)
    paths = [adapter_directory(tmp_path / str(rank), exact, rank) for rank in (1, 7, 33)]
    paths.append(adapter_directory(tmp_path / "v", exact, 5, ("v_proj",)))
    x = torch.randn(1, 9, 32).bfloat16()
    outputs: list[list[Tensor]] = []
    for model, whole, value in ((oracle, exact, x.float()), (lora, fused, x)):
        adapters = [model.load(path, path.name) for path in paths]
        rows = [(0, 1, None), (1, 4, adapters[0]), (4, 5, adapters[1]), (5, 7, adapters[2]), (7, 9, adapters[3])]
        model.set_segments([Segment(*row) for row in rows])
        outputs.append([getattr(attention(whole), name)(value).float() for name in NAMES])
    for expected, actual in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)


def test_wrapped_modules_keep_their_attributes() -> None:
    model = llama(adjacent=True)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    LoraModel(model)
    linear = attention(model).k_proj
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features, linear.weight.shape) == (32, 16, (16, 32))
    assert linear.bias is None
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_a_forward_with_other_rows_than_announced_is_refused(tmp_path: Path) -> None:
    model = llama(adjacent=True)
    lora = LoraModel(model)
    adapter = lora.load(adapter_directory(tmp_path / "a", model, 4), "a")
    lora.set_segments([Segment(0, 2, None), Segment(2, 3, adapter)])
    with pytest.raises(RuntimeError, match=r"4 rows, the batch has 3"):
        attention(model).q_proj(torch.randn(1, 4, 32))
