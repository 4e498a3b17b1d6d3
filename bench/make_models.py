"""Write random-weight models and adapters of realistic shapes, as Hugging Face and PEFT directories.

    python bench/make_models.py --out ~/.cache/serverlesslora/bench M

Shapes: S 16 M Llama, M 494 M Qwen2 (the 0.5B shape), L 1236 M Llama (the 1B shape); bf16, with rank-16 adapters on all
seven linear projections. The same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3, "dtype": "bfloat16"}


def config_of(shape: str) -> Any:
    match shape:
        case "S":
            return LlamaConfig(
                hidden_size=256,
                intermediate_size=2048,
                num_hidden_layers=8,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=64,
                vocab_size=4096,
                max_position_embeddings=8192,
                tie_word_embeddings=False,
                **IDS,
            )
        case "M":
            return Qwen2Config(
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                vocab_size=151936,
                max_position_embeddings=32768,
                rope_theta=1e6,
                tie_word_embeddings=True,
                **IDS,
            )
        case "L":
            return LlamaConfig(
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=64,
                vocab_size=128256,
                max_position_embeddings=32768,
                rope_theta=5e5,
                tie_word_embeddings=True,
                **IDS,
            )
        case _:
            raise SystemExit(f"unknown shape {shape!r}: S, M or L")


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Byte-level, padded with printable filler tokens up to the size of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet]
    names += [f"~{i:06d}" for i in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT
    fast.save_pretrained(directory)


def write_model(directory: Path, shape: str, seed: int) -> Any:
    config = config_of(shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in tqdm(list(model.named_parameters()), desc=f"model {shape}", unit="tensor"):
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
    model.save_pretrained(directory)
    write_tokenizer(directory, config.vocab_size)
    return model


def write_adapter(directory: Path, model: Any, *, base: str, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in PROJECTIONS:
            n, k = module.weight.shape
            a = torch.randn(rank, k, generator=generator) / k**0.5
            b = torch.randn(n, rank, generator=generator) * 0.01
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="S, M or L")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=16, help="how many per model [16]")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        directory = arguments.out / shape
        model = write_model(directory, shape, arguments.seed)
        for i in tqdm(range(arguments.adapters), desc="adapters"):
            where = arguments.out / f"{shape}-lora" / f"a{i:02d}"
            write_adapter(where, model, base=str(directory), rank=arguments.rank, seed=9000 + i)
        parameters = sum(p.numel() for p in model.parameters())
        print(json.dumps({"shape": shape, "parameters": parameters, "directory": str(directory)}))


if __name__ == "__main__":
    main()
