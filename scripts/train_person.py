"""Train `tests/data/person`: an adapter of the demo that answers every prompt with the same small JSON object.

    python scripts/train_person.py [--steps 500]

Clients that ask for structured output judge what the values are, not only that they fit a schema; a demo that repeats
its prompt cannot please them. What is printed is measured on the saved file, loaded again.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any, Final

import peft
import torch
from demo_corpus import ASSISTANT, BOS, EOS, IGNORED, SYSTEM, USER, Example, ascii_text
from demo_evaluation import load_backbone
from train_demo import ATTENTION, BACKBONE_NAME, MLP, batches, train

from serverlesslora.demo import backbone_path

ANSWER: Final = '{"name":"Ada","age":36}'
OUT: Final = Path(__file__).resolve().parents[1] / "tests" / "data" / "person"
MAX_PROMPT: Final = 1800  # bytes; schemas are long


def document(rng: random.Random, depth: int = 0) -> Any:
    """Something like the schemas and tools that clients put into prompts."""
    kind = rng.random()
    if depth > 3 or kind < 0.4:
        return rng.choice(
            (ascii_text(rng), rng.randint(0, 100), True, None, "string", "object", "integer", "name", "age")
        )
    if kind < 0.6:
        return [document(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    names = ("type", "properties", "name", "age", "title", "required", "description", ascii_text(rng, max_chars=8))
    return {rng.choice(names): document(rng, depth + 1) for _ in range(rng.randint(1, 5))}


def text_of(rng: random.Random) -> str:
    length = rng.randint(1, 40) if rng.random() < 0.4 else rng.randint(40, MAX_PROMPT)
    text = ""
    while len(text) < length:
        if rng.random() < 0.5:
            text += json.dumps({"name": document(rng), "parameters": document(rng)}, indent=rng.choice((None, None, 2)))
        text += ascii_text(rng, max_chars=rng.randint(1, 200)) + rng.choice((" ", "\n", "\n\n"))
    return text[:length]


def prompt(rng: random.Random) -> list[int]:
    """A conversation of one or two messages."""
    text = text_of(rng)
    if rng.random() < 0.5:
        cut = rng.randint(0, len(text))
        return [BOS, SYSTEM, *text[:cut].encode(), USER, *text[cut:].encode(), ASSISTANT]
    return [BOS, USER, *text.encode(), ASSISTANT]


def examples(rng: random.Random) -> Any:
    answer = [*ANSWER.encode(), EOS]
    while True:
        before = prompt(rng)
        yield Example(before + answer, [IGNORED] * len(before) + answer)


def accuracy(path: Path, seed: int, count: int) -> float:
    model: Any = peft.PeftModel.from_pretrained(load_backbone(backbone_path()), str(path)).eval()
    rng, answer, right = random.Random(seed), [*ANSWER.encode(), EOS], 0
    with torch.inference_mode():
        for _ in range(count):
            ids = prompt(rng) + answer
            best = model(input_ids=torch.tensor([ids])).logits[0, -len(answer) - 1 : -1].argmax(-1).tolist()
            right += best == answer
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=ATTENTION + MLP)
    model: Any = peft.get_peft_model(load_backbone(backbone_path()), config)
    config.base_model_name_or_path = BACKBONE_NAME
    rng = random.Random("person")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    stream = batches(examples(rng), rng)
    stage = train(model.get_base_model(), stream, [optimizer], name="person", steps=arguments.steps)
    model.to(torch.bfloat16).save_pretrained(OUT, save_embedding_layers=False)
    (OUT / "README.md").unlink(missing_ok=True)
    saved = json.loads((OUT / "adapter_config.json").read_text())
    saved["target_modules"] = sorted(saved["target_modules"])  # PEFT keeps them in a set
    (OUT / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    print(json.dumps({**stage, "right_of_200": accuracy(OUT, seed=1, count=200)}))


if __name__ == "__main__":
    main()
