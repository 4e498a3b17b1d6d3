"""A broken, foreign or unsupported adapter is refused at load, naming the tensor or field at fault."""

from __future__ import annotations

import gc
import json
import re
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from serverlesslora.engine.host_device import HostLora
from serverlesslora.engine.lora import LoraModel, Segment
from serverlesslora.engine.lora.patterns import PatternTable
from serverlesslora.errors import AdapterInvalid

torch.set_num_threads(1)
Tensors = dict[str, Tensor]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
LAYER = "base_model.model.model.layers.0.self_attn."
Q_A, Q_B = LAYER + "q_proj.lora_A.weight", LAYER + "q_proj.lora_B.weight"
V_A, V_B = LAYER + "v_proj.lora_A.weight", LAYER + "v_proj.lora_B.weight"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lora(model: PreTrainedModel) -> LoraModel:
    return LoraModel(model)


def tensors() -> Tensors:
    torch.manual_seed(1)
    return {Q_A: torch.randn(4, 32), Q_B: torch.randn(32, 4), V_A: torch.randn(4, 32), V_B: torch.randn(16, 4)}


def write(path: Path, found: Tensors, config: dict[str, Any] | str = CONFIG) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path / "adapter_model.safetensors")
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "adapter_config.json").write_text(text)
    return path


def refused(lora: LoraModel, path: Path, *words: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        lora.load(path, "digest")
    for word in words:
        assert word in caught.value.message
    assert str(path) not in caught.value.message, "the message is for the tenant: no paths of ours"


def test_a_good_adapter(tmp_path: Path, lora: LoraModel) -> None:
    adapter = lora.load(write(tmp_path, tensors()), "digest")
    assert (adapter.digest, adapter.rank, adapter.modules, adapter.kinds) == ("digest", 4, 2, ())
    assert adapter.size_bytes == sum(tensor.nbytes for tensor in tensors().values())
    assert adapter.vocab_size == 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_cast(tmp_path: Path, lora: LoraModel, dtype: torch.dtype) -> None:
    mixed = tensors() | {Q_A: tensors()[Q_A].to(dtype)}
    for found in (mixed, {name: tensor.to(dtype) for name, tensor in tensors().items()}):
        assert lora.load(write(tmp_path, found), "digest").modules == 2


def _replace(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda found: found | {name: tensor}


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {name: tensor for name, tensor in found.items() if name not in names}


WEIGHT = "base_model.model.model.layers.0.mlp.up_proj.weight"
MLP_A = "base_model.model.model.layers.0.feed_forward.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without(Q_B), (Q_A, "lora_B.weight is missing")),
        (_without(V_A), (V_B, "lora_A.weight is missing")),
        (_without(V_A, V_B), (V_A, "missing", "target_modules")),
        (_replace(Q_A, torch.randn(4, 64)), (Q_A, "[4, 64]", "[4, 32]", "base model")),
        (_replace(Q_B, torch.randn(64, 4)), (Q_B, "[64, 4]", "[32, 4]")),
        (_replace(Q_A, torch.randn(8, 32)), (Q_A, "[8, 32]", "rank")),
        (_replace(Q_A, torch.randn(4)), (Q_A, "[4]")),
        (lambda found: found | {V_A: found[V_A].t(), V_B: found[V_B].t()}, (V_A, "transposed")),
        (lambda found: found | {V_A: found[V_B], V_B: found[V_A]}, (V_A, "[16, 4]", "[4, 32]")),
        (_replace(Q_A, torch.full((4, 32), float("nan"))), (Q_A, "NaN")),
        (lambda found: found | {V_B: found[V_B].index_fill(0, torch.tensor(3), float("inf"))}, (V_B, "Inf")),
        (_replace(V_B, torch.full((16, 4), 1e300, dtype=torch.float64)), (V_B, "Inf")),  # in the backbone's dtype
        (_replace(MLP_A, torch.randn(4, 32)), (MLP_A, "feed_forward.up_proj", "LlamaForCausalLM", "mlp.up_proj")),
        (_replace(LAYER + "q_proj.lora_C.weight", torch.randn(4, 4)), ("lora_C", "does not have")),
        (_replace(LAYER + "q_proj.lora_A.default.weight", torch.randn(4, 32)), ("lora_A.default",)),
        (_replace(LAYER + "q_proj.lora_magnitude_vector", torch.randn(32)), ("magnitude", "use_dora is false")),
        (_replace(LAYER + "q_proj.lora_B.bias", torch.randn(32)), ("lora_B.bias", "lora_bias is false")),
        (_replace(LAYER + "q_proj.base_layer.bias", torch.randn(32)), ("base_layer.bias", "modules_to_save")),
        (_replace(LAYER + "o_proj.lora_magnitude_vector", torch.randn(32)), ("o_proj.lora_magnitude_vector",)),
        (_replace(WEIGHT, torch.randn(48, 32)), (WEIGHT, "modules_to_save")),
        (_replace("base_model.model.model.embed_tokens.weight", torch.randn(49, 32)), ("[49, 32]", "[50, 32]")),
        (_replace("base_model.model.model.embed_tokens.lora_embedding_A", torch.randn(4, 50)), ("no partner",)),
        (_replace("base_model.model.model.rotary_emb.lora_A.weight", torch.randn(4, 4)), ("rotary_emb",)),
        (_replace("base_model.model.model.norm.lora_A.weight", torch.randn(4, 32)), ("norm.lora_A", "parameters")),
        (_replace(LAYER + "lora_A.weight", torch.randn(4, 32)), ("self_attn", "not served")),
        (_replace(Q_A.removeprefix("base_model.model."), torch.randn(4, 32)), (Q_A, "the same place")),
        (_replace("y" * 600, torch.randn(1)), ("too long",)),
        (
            _replace(LAYER + "q_proj.base_layer.lora_A.weight", torch.randn(4, 32)),
            ("base_layer.lora_A", "means nothing"),
        ),
        (_replace(LAYER + "q_proj.lora_embedding_A", torch.randn(4, 32)), ("lora_embedding_A", "means nothing")),
        (_replace("base_model.model.model.embed_tokens.lora_A.weight", torch.randn(4, 32)), ("embed_tokens.lora_A",)),
        (_replace("x", torch.randn(1)), ("'x'",)),
        (_replace("", torch.randn(1)), ("''",)),
        (lambda found: {}, ("no tensors",)),
        (_replace(Q_A, torch.zeros(0, 32)), (Q_A, "empty")),
        (_replace(Q_A, torch.zeros(4, 32, dtype=torch.int8)), (Q_A, "I8")),
    ],
    ids=lambda value: str(value[-1])[:40] if isinstance(value, tuple) else "",
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, lora: LoraModel, change: Callable[[Tensors], Tensors], words: tuple[str, ...]
) -> None:
    refused(lora, write(tmp_path, change(tensors())), *words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("peft_type", "IA3", ("IA3",)),
        ("peft_type", None, ("peft_type",)),
        ("r", 0, ("r is 0", "1024")),
        ("r", 1025, ("1025",)),
        ("r", "4", ("'4'",)),
        ("r", True, ("True",)),
        ("lora_alpha", float("nan"), ("lora_alpha",)),
        ("lora_alpha", float("inf"), ("lora_alpha",)),
        ("lora_alpha", "8", ("lora_alpha",)),
        ("rank_pattern", {"q_proj": 8}, (Q_A, "rank")),
        ("rank_pattern", {"q_proj": -1}, ("rank_pattern", "q_proj")),
        ("rank_pattern", [], None),
        ("rank_pattern", ["q_proj"], ("rank_pattern",)),
        ("alpha_pattern", {"(a+)+$": 1}, ("alpha_pattern", "nested")),
        ("alpha_pattern", {"(": 1}, ("not a regular expression",)),
        ("alpha_pattern", {r"(q)\1": 1}, ("back-references",)),
        ("alpha_pattern", {".*.*.*": 1}, ("repeats",)),
        ("use_dora", "yes", ("use_dora",)),
        ("use_dora", True, ("lora_magnitude_vector", "missing")),
        ("lora_bias", True, ("lora_B.bias", "missing")),
        ("bias", "some", ("bias",)),
        ("modules_to_save", ["lm_head"], ("lm_head.weight", "missing")),
        ("modules_to_save", "lm_head", ("modules_to_save",)),
        ("target_parameters", ["o_proj.weight"], ("o_proj.weight", "missing")),
        ("trainable_token_indices", [-1], ("trainable_token_indices",)),
        ("trainable_token_indices", [1, 1], ("trainable_token_indices",)),
        ("init_lora_weights", "pissa_niter_16", ("pissa", "path_initial_model_for_weight_conversion")),
        ("init_lora_weights", "olora", ("olora",)),
        ("init_lora_weights", "loftq", ("loftq",)),
        ("init_lora_weights", "gaussian", None),
        ("layer_replication", [[0, 1], [0, 1]], ("layer_replication",)),
        ("megatron_config", {"x": 1}, ("megatron_config",)),
        ("use_qalora", True, ("use_qalora",)),
        ("alora_invocation_tokens", [1], ("alora_invocation_tokens",)),
        ("some_new_option", 1, ("some_new_option",)),
        ("some_new_option", None, None),
    ],
)
def test_configurations(tmp_path: Path, lora: LoraModel, field: str, value: Any, words: tuple[str, ...] | None) -> None:
    path = write(tmp_path, tensors(), CONFIG | {field: value})
    if words is None:
        assert lora.load(path, "digest").modules == 2
    else:
        refused(lora, path, *words)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"peft_type": ' + "[" * 100_000])
def test_configuration_that_is_no_object(tmp_path: Path, lora: LoraModel, text: str) -> None:
    refused(lora, write(tmp_path, tensors(), text), "adapter_config.json")


def test_files_that_are_missing(tmp_path: Path, lora: LoraModel) -> None:
    refused(lora, tmp_path, "adapter_config.json")
    write(tmp_path, tensors())
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(lora, tmp_path, "adapter_model.safetensors is missing")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    refused(lora, tmp_path, "pickle")


def _header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_damaged_files(tmp_path: Path, lora: LoraModel) -> None:
    path = write(tmp_path, tensors()) / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(lora, tmp_path, "adapter_model.safetensors")
    for data in (whole + b"x", b"\xff" * 8 + whole[8:], b"\x80\x02}q\x00." * 20, whole[:8] + b"[" + whole[9:]):
        path.write_bytes(data)
        refused(lora, tmp_path, "adapter_model.safetensors")
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda header: header[Q_A].update(shape=[4, 33]),
        lambda header: header[Q_A].update(shape=[-4, -32]),
        lambda header: header[Q_A].update(shape=[1 << 60, 1 << 60]),
        lambda header: header[Q_A].update(shape="4"),
        lambda header: header[Q_A].update(data_offsets=[0, 1 << 40]),
        lambda header: header[Q_A].update(data_offsets=header[Q_B]["data_offsets"]),
        lambda header: header[Q_A].update(data_offsets=[0]),
        lambda header: header[Q_A].update(dtype=["F32"]),
        lambda header: header.update({Q_A: None}),
        lambda header: header.pop(Q_A),
    ]
    for change in changes:
        path.write_bytes(whole)
        _header(path, change)
        refused(lora, tmp_path)


def test_a_truncated_file_does_not_kill_a_running_adapter(tmp_path: Path, lora: LoraModel) -> None:
    adapter = lora.load(write(tmp_path, tensors()), "digest")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    lora.set_segments([Segment(0, 3, adapter)])
    y = lora._sites.modules["model.layers.0.self_attn.q_proj"](torch.randn(1, 3, 32))
    assert torch.isfinite(y).all()


def test_unloading_frees_the_memory(tmp_path: Path, model: PreTrainedModel, lora: LoraModel) -> None:
    norm = model.get_submodule("model.norm")
    found = tensors() | {"base_model.model.model.norm.weight": torch.randn(32)}
    adapter = lora.load(write(tmp_path, found, CONFIG | {"modules_to_save": ["model.norm"]}), "digest")
    assert adapter.kinds == ("modules_to_save",)
    assert adapter.size_bytes == sum(tensor.nbytes for tensor in found.values())
    assert isinstance(adapter.lora, HostLora)
    weights = [weakref.ref(weights.a) for weights in adapter.lora.weights.values()]
    assert len(weights) == 2
    lora.set_segments([Segment(0, 3, adapter)])
    model.get_submodule("model.layers.0.self_attn.q_proj")(torch.randn(1, 3, 32))
    assert "forward" in norm.__dict__
    lora.set_segments([Segment(0, 3, None)])
    lora.unload(adapter)
    gc.collect()
    assert all(weight() is None for weight in weights)
    assert "forward" not in norm.__dict__, "an idle norm must cost nothing"


def test_a_refused_adapter_leaves_nothing_behind(tmp_path: Path, model: PreTrainedModel, lora: LoraModel) -> None:
    norm = model.get_submodule("model.norm")
    found = tensors() | {"base_model.model.model.norm.weight": torch.randn(32), "x": torch.randn(1)}
    refused(lora, write(tmp_path, found, CONFIG | {"modules_to_save": ["model.norm"]}), "'x'")
    assert "forward" not in norm.__dict__


def test_embeddings_that_nobody_trained_cost_nothing(tmp_path: Path, model: PreTrainedModel, lora: LoraModel) -> None:
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    found = tensors() | {"base_model.model.model.embed_tokens.weight": embeddings.weight.clone()}
    adapter = lora.load(write(tmp_path, found), "digest")
    assert adapter.size_bytes == sum(tensor.nbytes for tensor in tensors().values())


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1, "layers.0.self_attn.q_proj": 2},
        {"layers.0.self_attn.q_proj": 2, "q_proj": 1},
        {"^model.layers.0.self_attn.q_proj": 3, "proj": 4},
        {"^layers.0": 3, r"layers\.0\.self_attn\.q_proj": 4},
        {r".*\.[01]\.self_attn\.(q|v)_proj": 5, "q_proj": 6},
        {r"layers\.\d+\.mlp\.up_proj$": 7, "self_attn": 8},
        {"_proj": 1, "attn.q_proj": 2, "": 3},
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(patterns: dict[str, int]) -> None:
    table = PatternTable("alpha_pattern", patterns)
    names = [f"model.layers.{layer}.{end}" for layer in range(12) for end in ("self_attn.q_proj", "mlp.up_proj")]
    for name in [*names, "q_proj", "lm_head", "xq_proj"]:
        keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))
        assert table.get(name, 0) == patterns.get(next(keys, "\0"), 0), name


def test_hostile_patterns() -> None:
    with pytest.raises(AdapterInvalid, match="at most 16"):
        PatternTable("alpha_pattern", {f".*{index}": index for index in range(17)})
    with pytest.raises(AdapterInvalid, match="longer than"):
        PatternTable("alpha_pattern", {"(" + "a" * 1000 + ")": 1})
    with pytest.raises(AdapterInvalid, match="at most 4096"):
        PatternTable("alpha_pattern", {f"layer{index}": index for index in range(5000)})
    slowest = PatternTable("alpha_pattern", {r".*.*\d": 1})
    assert slowest.get("x." * 100, 0) == 0


def test_a_device_without_room_refuses_the_adapter(
    lora: LoraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole parameters go to the device while they are read; that must not end the worker and its requests."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("serverlesslora.engine.lora.strict.build_adapter", full)
    with pytest.raises(AdapterInvalid, match="no room"):
        lora.load(write(tmp_path, tensors()), "digest")
