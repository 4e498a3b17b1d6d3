"""How often the saved demo answers right, measured through transformers and peft."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from demo_corpus import EOS, MAX_COPY_CHARS, ascii_text, held_out_texts, unicode_text

from serverlesslora.demo import BASE, TASKS, completion_prompt


def load_backbone(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str | None]:
    """What the model says to each prompt, or None where it did not end by itself."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=not prompt.startswith(tokenizer.bos_token))["input_ids"]
        by_length[len(ids)].append((index, ids))
    answers: list[str | None] = [None] * len(prompts)
    for length, group in by_length.items():  # equal lengths need no padding
        ids = torch.tensor([row for _, row in group])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
        for (index, _), row in zip(group, output[:, length:].tolist(), strict=True):
            if EOS in row:
                answers[index] = tokenizer.decode(row[: row.index(EOS)], skip_special_tokens=False)
    return answers


def accuracy(model: Any, tokenizer: Any, task: str, texts: list[str], *, chat: bool = True, system: str = "") -> float:
    """The share of texts whose greedy answer is exactly right and ends."""
    head = [{"role": "system", "content": system}] if system else []
    prompts = [
        tokenizer.apply_chat_template(
            [*head, {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        if chat
        else completion_prompt(text)
        for text in texts
    ]
    answers = greedy_answers(model, tokenizer, prompts, max(len(text.encode()) for text in texts) + 4)
    return sum(answer == TASKS[task](text) for answer, text in zip(answers, texts, strict=True)) / len(texts)


def evaluate(out: Path, *, seed: int, num_texts: int) -> dict[str, dict[str, float]]:
    """Accuracy of the saved files per task and way of asking; prints a line for each task."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "backbone", local_files_only=True)
    texts = held_out_texts(seed, num_texts)
    few = texts[: max(1, num_texts // 5)]
    wide = held_out_texts(seed, len(few), unicode_text)
    long = held_out_texts(seed, len(few), lambda rng: ascii_text(rng, MAX_COPY_CHARS))
    results: dict[str, dict[str, float]] = {}
    for task in TASKS:
        models = [load_backbone(out / "backbone", dtype) for dtype in (torch.float32, torch.bfloat16)]
        if task != BASE:
            models = [peft.PeftModel.from_pretrained(model, str(out / "adapters" / task)).eval() for model in models]
        full, half = models
        results[task] = {
            "chat": accuracy(full, tokenizer, task, texts),
            "completion": accuracy(full, tokenizer, task, few, chat=False),
            "chat_with_system": accuracy(full, tokenizer, task, few, system="You are a helpful assistant."),
            "chat_bfloat16": accuracy(half, tokenizer, task, few),
        }
        if task == BASE:
            results[task]["chat_unicode"] = accuracy(full, tokenizer, task, wide)
            results[task]["chat_long"] = accuracy(full, tokenizer, task, long)
        print(f"{task:>9}  " + "  ".join(f"{kind} {share:.1%}" for kind, share in results[task].items()), flush=True)
    return results
