"""Small honest stand-ins: tiny random models of many families, a byte tokenizer, a clock that moves when told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCAB = 260  # 256 bytes and four specials
BOS, EOS, PAD, UNUSED = 256, 257, 258, 259

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}

# model_type and what differs from the base; a suffix after ":" makes a second variant of a family
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama:tied_bias": {"tie_word_embeddings": True, "attention_bias": True},
    "llama:dynamic_rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 7},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 7},
    "phi": {},
    "phi3": {"sliding_window": 9},
    "mixtral": _MOE | {"sliding_window": 8},
    "qwen2_moe": _MOE
    | {"shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3_moe": _MOE | {"head_dim": 8},
    "olmoe": _MOE,
    "gpt_oss": _MOE | {"head_dim": 8, "sliding_window": 6},
    "granite": {
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
    },
    "granitemoe": _MOE | {"logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6, "num_hidden_layers": 5},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "num_hidden_layers": 5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": _GPT2,
    "gpt2:inverse_layer": _GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "stablelm": {"use_qkv_bias": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "starcoder2": {"sliding_window": 6},
    "nemotron": {},
    "glm4": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    "ernie4_5": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model, the same one for the same arguments; weights are large enough to make logits differ."""
    config = AutoConfig.for_model(family.split(":")[0], **(_BASE | FAMILIES[family] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.requires_grad_(False)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value; four specials behind them. One character of two bytes is thus two tokens."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<unused>"]})
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id, len(fast)) == (BOS, EOS, PAD, VOCAB)
    return fast


ATTENTION_AND_HEAD = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")


def write_adapter(
    directory: Path,
    model: PreTrainedModel,
    *,
    rank: int = 4,
    seed: int = 0,
    scale: float = 1.0,
    targets: Sequence[str] = ATTENTION_AND_HEAD,
) -> Path:
    """A random PEFT adapter on these linears of a Llama-like model."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in targets:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * scale
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * scale
    assert tensors
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merge_adapter(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The oracle for `write_adapter`: the same weights added to the backbone's."""
    tensors = load_file(directory / "adapter_model.safetensors")
    for name, module in model.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" in tensors:
            module.weight.data += tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    return model


@dataclass
class ManualClock:
    now: float = 0.0
    tick: float = 0.0  # how far each reading moves it

    def __call__(self) -> float:
        self.now += self.tick
        return self.now
