"""Train the embedded demo from nothing: a tiny Llama that repeats its input, and LoRA adapters that do other things.

The backbone is pre-trained on several skills, each announced by a token of its own, with repeating as the default;
then each adapter learns by gradient descent on the frozen backbone to do its task unasked. What is printed is measured
on the saved files, loaded again through transformers and peft.
"""

import argparse
import json
import math
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict

import peft
import torch
import transformers
from demo_corpus import BOS, EOS, IGNORED, MAX_CHARS, PAD, PRETRAINING_MIX, VOCAB_SIZE, Example, examples
from demo_evaluation import evaluate, load_backbone
from demo_tokenizer import build_tokenizer
from tqdm import tqdm  # type: ignore[import-untyped]

from serverlesslora.demo import ASSETS, BASE

REQUIRED_ACCURACY: Final = 0.95
BASE_STEPS: Final = 3000
BATCH_TOKENS: Final = 2048
BACKBONE_NAME: Final = "serverlesslora-demo"
ATTENTION: Final = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP: Final = ["gate_proj", "up_proj", "down_proj"]


class Batch(NamedTuple):
    ids: torch.Tensor  # [num_sequences, num_tokens]
    labels: torch.Tensor  # [num_sequences, num_tokens]


class Stage(TypedDict):
    steps: int
    loss: float  # mean of the last tenth
    seconds: float


class AdapterPlan(NamedTuple):
    """How one adapter is shaped and for how long it is trained; together they cover what users bring."""

    config: dict[str, Any]
    steps: int
    peak_rate: float


ADAPTERS: Final = {
    "upper": AdapterPlan({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, 150, 1e-2),
    "swapcase": AdapterPlan({"r": 2, "lora_alpha": 4, "target_modules": MLP}, 150, 1e-2),
    "rot13": AdapterPlan({"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}, 150, 5e-3),
    "leet": AdapterPlan({"r": 1, "lora_alpha": 1, "target_modules": [*ATTENTION, "down_proj"]}, 150, 1e-2),
    "reverse": AdapterPlan(
        {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION + MLP, "rank_pattern": {"down_proj": 6}}, 150, 3e-3
    ),
    "mask": AdapterPlan(
        {"r": 32, "lora_alpha": 16, "use_rslora": True, "target_modules": [*ATTENTION, "up_proj"]}, 150, 3e-3
    ),
}


def build_backbone() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        # Short texts: a small base makes neighbouring positions easier to tell apart.
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def batches(source: Iterator[Example], rng: random.Random) -> Iterator[Batch]:
    """Padded batches of at most `BATCH_TOKENS`, of examples of similar length."""
    while True:
        pool = sorted((next(source) for _ in range(512)), key=lambda example: len(example.ids))
        chunks: list[list[Example]] = [[]]
        for example in pool:
            if (len(chunks[-1]) + 1) * len(example.ids) > BATCH_TOKENS:
                chunks.append([])
            chunks[-1].append(example)
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(example.ids) for example in chunk)
            ids = [example.ids + [PAD] * (width - len(example.ids)) for example in chunk]
            labels = [example.labels + [IGNORED] * (width - len(example.labels)) for example in chunk]
            yield Batch(torch.tensor(ids), torch.tensor(labels))


def train(
    model: Any, stream: Iterator[Batch], optimizers: list[torch.optim.Optimizer], *, name: str, steps: int
) -> Stage:
    """Follow a cosine schedule over the parameters of `optimizers`."""
    warmup = max(1, min(30, steps // 10))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
        )
        for optimizer in optimizers
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    with tqdm(range(steps), desc=f"{name:>9}", unit="step", mininterval=1.0) as bar:
        for step in bar:
            ids, labels = next(stream)
            # Padding is on the right, where causal attention never looks; so no mask is needed.
            hidden = model.model(ids, use_cache=False).last_hidden_state
            learned = labels[:, 1:] != IGNORED
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][learned]), labels[:, 1:][learned])
            model.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
            if step % 20 == 19:
                bar.set_postfix(loss=f"{sum(losses[-20:]) / 20:.4f}", refresh=False)
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return Stage(steps=steps, loss=round(sum(tail) / len(tail), 5), seconds=round(time.perf_counter() - started, 1))


def pretrain(out: Path, *, seed: int, steps: int) -> Stage:
    """Train the backbone from random weights, first on short texts, and save it as bf16."""
    torch.manual_seed(seed)
    model = build_backbone()
    rng = random.Random(f"backbone {seed}")
    lengths = [4, 6, 8, 10]
    growing = steps // 10

    def curriculum() -> Iterator[Batch]:
        for max_chars in lengths:
            yield from islice(
                batches(examples(rng, PRETRAINING_MIX, max_chars=max_chars, skill_tokens=True), rng), growing
            )
        yield from batches(examples(rng, PRETRAINING_MIX, max_chars=MAX_CHARS, skill_tokens=True), rng)

    # Muon reaches the same loss as AdamW in about half the steps here; it is made for hidden matrices only.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    stage = train(model, curriculum(), optimizers, name=BASE, steps=steps)
    model.to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    return stage


def train_adapter(name: str, backbone: Path, out: Path, *, seed: int, steps: int) -> Stage:
    """Train one adapter on the frozen, saved backbone and save it."""
    torch.manual_seed(seed)
    plan = ADAPTERS[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **plan.config)
    model: Any = peft.get_peft_model(load_backbone(backbone), config)
    config.base_model_name_or_path = BACKBONE_NAME
    rng = random.Random(f"{name} {seed}")
    stream = batches(examples(rng, {name: 1.0}, max_chars=MAX_CHARS, skill_tokens=False), rng)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=plan.peak_rate, betas=(0.9, 0.98), weight_decay=0.0)
    stage = train(model.get_base_model(), stream, [optimizer], name=name, steps=steps)
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    # PEFT keeps module names in a set, whose order changes from run to run.
    saved = json.loads((out / "adapter_config.json").read_text())
    saved["target_modules"] = sorted(saved["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    return stage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to (re)write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of what makes a run reproducible")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that the script works")
    parser.add_argument(
        "--keep-backbone", action="store_true", help="train only the adapters, on the backbone in --out"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    out: Path = arguments.out
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    base_steps, shrink, num_texts = (40, 20, 20) if arguments.quick else (BASE_STEPS, 1, 500)
    card_file = out / "card.json"
    stages: dict[str, Stage] = {}
    if arguments.keep_backbone:
        stages[BASE] = json.loads(card_file.read_text())["stages"][BASE]
    else:
        shutil.rmtree(out / "backbone", ignore_errors=True)
        stages[BASE] = pretrain(out / "backbone", seed=arguments.seed, steps=base_steps)
    shutil.rmtree(out / "adapters", ignore_errors=True)
    for name, plan in ADAPTERS.items():
        steps = max(1, plan.steps // shrink)
        stages[name] = train_adapter(name, out / "backbone", out / "adapters" / name, seed=arguments.seed, steps=steps)
    started = time.perf_counter()
    results = evaluate(out, seed=arguments.seed, num_texts=num_texts)
    evaluation_s = time.perf_counter() - started
    card = {
        "seed": arguments.seed,
        "threads": arguments.threads,
        "seconds": round(sum(stage["seconds"] for stage in stages.values()) + evaluation_s),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "stages": stages,
        "num_texts": num_texts,
        "accuracy": results,
    }
    card_file.write_text(json.dumps(card, indent=2) + "\n")
    files = [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes for the owner alone, but a package is read by everyone
    size_bytes = sum(path.stat().st_size for path in files)
    print(f"{size_bytes / 1e6:.2f} MB in {out}, {card['seconds']} s")
    failed = [task for task, shares in results.items() if shares["chat"] < REQUIRED_ACCURACY]
    if failed and not arguments.quick:
        print(f"below {REQUIRED_ACCURACY:.0%}: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
