"""Every kind of adapter PEFT saves gives PEFT's logits, with others and the bare base in the same packed batch."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT looks for the base model's config when it saves

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from serverlesslora.engine.lora import Adapter, LoraModel, Segment

torch.set_num_threads(1)
TOLERANCE = 1e-4
VOCAB = 61
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make(config: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: a zero would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def llama(**options: Any) -> PreTrainedModel:
    return make(LlamaConfig(**(SMALL | {"tie_word_embeddings": False, "attention_bias": True} | options)))


def adjacent(model: PreTrainedModel) -> PreTrainedModel:
    """Lay q/k/v and gate/up side by side, as the shared backbone does, so that they are fused."""
    for parent in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            children = [child for name in names if isinstance(child := getattr(parent, name, None), nn.Linear)]
            if len(children) == len(names):
                joined = torch.cat([child.weight for child in children])
                pieces = joined.split_with_sizes([child.out_features for child in children])
                for child, weight in zip(children, pieces, strict=True):
                    child.weight = nn.Parameter(weight, requires_grad=False)
    return model


class Saved(NamedTuple):
    path: Path
    logits: Callable[[Tensor], Tensor]


def save(base: PreTrainedModel, path: Path, config: LoraConfig, *, seed: int = 1, resize: int = 0) -> Saved:
    """Train (at random) and save an adapter with PEFT; `logits` is PEFT's own answer."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        peft = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad:
                    small = "lora_" in name and "magnitude" not in name
                    parameter.add_(torch.randn_like(parameter) * (0.1 if small else 0.05))
        peft.eval().save_pretrained(str(path), save_embedding_layers=bool(resize) or "auto")

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            answer: Tensor = peft(input_ids=ids[None], use_cache=False).logits[0]
            return answer

    return Saved(path, logits)


def run(model: PreTrainedModel, lora: LoraModel, parts: Sequence[tuple[Adapter | None, Tensor]]) -> list[Tensor]:
    """One forward over packed sequences; the head sees them in reverse order, with segments of its own."""
    segments, position = [], 0
    for adapter, ids in parts:
        segments.append(Segment(position, position + len(ids), adapter))
        position += len(ids)
    lora.set_segments(segments)
    ids = torch.cat([ids for _, ids in parts])
    positions = torch.cat([torch.arange(len(ids)) for _, ids in parts])
    owner = torch.cat([torch.full((len(ids),), index) for index, (_, ids) in enumerate(parts)])
    visible = (owner[:, None] == owner) & (positions[:, None] >= positions)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        body = model.base_model(input_ids=ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
        hidden = body.last_hidden_state[0]
        rows = [hidden[start:end] for start, end, _ in segments]
        heads, position = [], 0
        for (adapter, _), own in reversed(list(zip(parts, rows, strict=True))):
            heads.append(Segment(position, position + len(own), adapter))
            position += len(own)
        lora.set_segments(heads)
        logits = model.get_output_embeddings()(torch.cat(rows[::-1]))
    return [logits[start:end] for start, end, _ in heads][::-1]


def prompts(count: int, high: int = VOCAB) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    for index in range(count):
        yield torch.randint(2, high, (3 + index % 4,), generator=generator)


def check(base: PreTrainedModel, saved: Sequence[Saved], *, extra_ids: Sequence[int] = ()) -> list[Adapter]:
    """All adapters, twice each, with the base between them, in one batch, against PEFT one by one."""
    expected_base = copy.deepcopy(base)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    lora = LoraModel(base)
    adapters = [lora.load(one.path, f"digest{index}") for index, one in enumerate(saved)]
    order: list[int | None] = [None, *range(len(saved)), None, *range(len(saved))]
    ids = list(prompts(len(order)))
    for index, adapter_index in enumerate(order):
        if adapter_index is not None and adapters[adapter_index].vocab_size > VOCAB:
            ids[index] = torch.cat([ids[index], torch.tensor(extra_ids)])
    for _ in range(2):  # the second time plans come from memory
        parts = [(None if one is None else adapters[one], own) for one, own in zip(order, ids, strict=True)]
        for one, own, logits in zip(order, ids, run(base, lora, parts), strict=True):
            if one is None:
                with torch.no_grad():
                    expected = expected_base(input_ids=own[None], use_cache=False).logits[0]
            else:
                expected = saved[one].logits(own)
            known = logits[:, : expected.shape[1]]
            finite = torch.isfinite(known)
            assert finite[:, :VOCAB].all()
            assert (known - expected)[finite].abs().max() < TOLERANCE
            assert torch.isneginf(logits[:, expected.shape[1] :]).all()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} of the backbone was written"
    return adapters


def test_ranks_from_1_to_64_in_one_batch(tmp_path: Path) -> None:
    base = adjacent(llama())
    saved = [
        save(
            base, tmp_path / str(rank), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)), seed=rank
        )
        for rank, targets in [
            (1, ALL),
            (3, ("q_proj", "v_proj")),
            (8, ATTENTION),
            (16, ("k_proj", "up_proj")),
            (64, ALL),
        ]
    ]
    adapters = check(base, saved)
    assert [adapter.rank for adapter in adapters] == [1, 3, 8, 16, 64]
    assert adapters[0].modules == 14
    assert adapters[0].kinds == ()


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"layers.0.self_attn.q_proj": 7, "v_proj": 2}, "alpha_pattern": {"v_proj": 3, "k_proj": 40}},
        {"rank_pattern": {r".*\.[01]\.mlp\.(up|gate)_proj": 9}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 1}},
        {"use_rslora": True, "alpha_pattern": {"o_proj": 5}},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": "all", "use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian", "layers_to_transform": [1]},
        {"modules_to_save": ["gate_proj"], "target_modules": ["q_proj", "up_proj"]},
        {"modules_to_save": ["mlp", "input_layernorm", "norm"], "target_modules": list(ATTENTION)},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 4]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7, 3]}},
        {"target_modules": "all-linear"},
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items())[:70],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_options_of_peft(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    base = adjacent(llama(tie_word_embeddings=tied))
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": list(ALL)} | options))
    plain = LoraConfig(r=2, target_modules=list(ALL))
    check(base, [save(base, tmp_path / "tried", config), save(base, tmp_path / "plain", plain, seed=7)])


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_tied_adapters(tmp_path: Path, options: dict[str, Any]) -> None:
    base = llama(tie_word_embeddings=True)
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "ensure_weight_tying": True} | options))
    check(base, [save(base, tmp_path / "tied", config)])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_new_tokens(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options))
    saved = save(base, tmp_path / "new", config, resize=VOCAB + 3)
    plain = save(base, tmp_path / "plain", LoraConfig(r=2, target_modules=["v_proj"]))
    adapters = check(base, [saved, plain], extra_ids=[VOCAB, VOCAB + 2])
    assert [adapter.vocab_size for adapter in adapters] == [VOCAB + 3, VOCAB]
    assert "vocabulary" in adapters[0].kinds


def test_retrained_new_tokens(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[VOCAB + 1, VOCAB, 5])
    path = tmp_path / "tokens"
    torch.manual_seed(0)
    saved = save(base, path, config, resize=VOCAB + 2)
    adapters = check(base, [saved], extra_ids=[VOCAB, VOCAB + 1])
    assert adapters[0].vocab_size == VOCAB + 2


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "wte", "wpe"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["c_fc", "ln_f"]},
    ],
    ids=str,
)
def test_gpt2(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1))
    check(base, [save(base, tmp_path / "a", LoraConfig(r=4, lora_alpha=8, **options))])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "q_norm"]},
    ],
    ids=str,
)
def test_scaled_embeddings(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16))
    check(base, [save(base, tmp_path / "a", LoraConfig(r=4, lora_alpha=8, **options))])


MIXTRAL = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
QWEN = Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT_OSS = GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (MIXTRAL, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        (MIXTRAL, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
        (MIXTRAL, {"target_modules": "all-linear"}),
        (MIXTRAL, {"target_modules": ["w1", "w2", "w3"]}),
        (MIXTRAL, {"target_modules": ["v_proj"], "modules_to_save": ["experts", "gate"]}),
        (QWEN, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        (QWEN, {"target_parameters": ["experts.gate_up_proj", "gate.weight"], "rank_pattern": {"gate_up_proj": 3}}),
        (GPT_OSS, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}),
    ],
    ids=str,
)
def test_experts(tmp_path: Path, config: Any, options: dict[str, Any]) -> None:
    base = make(config)
    tried = save(base, tmp_path / "a", LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": []} | options)))
    plain = save(base, tmp_path / "b", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    check(base, [tried, plain])
