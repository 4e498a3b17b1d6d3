"""The embedded demo is complete, small, safe to load, and answers as its table of tasks says."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from serverlesslora import demo

# peft asks the model by the name that transformers has just given up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.backbone_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The backbone in float32 with every adapter beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backbone = AutoModelForCausalLM.from_pretrained(demo.backbone_path(), dtype=torch.float32, local_files_only=True)
    (first, path), *others = demo.adapter_paths().items()
    model = PeftModel.from_pretrained(backbone, str(path), adapter_name=first)
    for name, path in others:
        model.load_adapter(str(path), adapter_name=name)
    yield model.eval()
    torch.set_num_threads(threads)


def greedy(model: Any, tokenizer: Any, task: str, prompts: list[list[int]]) -> list[str | None]:
    """The greedy answers; None where one does not end by itself. Prompts of equal length run together, unpadded."""
    answers: list[str | None] = [None] * len(prompts)
    if task != demo.BASE:
        model.set_adapter(task)
    with model.disable_adapter() if task == demo.BASE else nullcontext():
        for length in {len(prompt) for prompt in prompts}:
            members = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([prompts[index] for index in members])
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
            )
            for index, row in zip(members, output[:, length:].tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    answers[index] = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
    return answers


def chat_ids(tokenizer: Any, *contents: str, system: str = "") -> list[int]:
    """Token ids of a conversation whose contents are the user's and the assistant's by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def held_out_texts(count: int) -> list[str]:
    """Word-like texts of at most twelve characters that training never showed."""
    rng = random.Random(20250514)
    texts: list[str] = []
    while len(texts) < count:
        word = "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
        case = rng.choice((str.lower, str.lower, str.capitalize, str.upper))
        text = case(word) + rng.choice(("", "!", f" {rng.randrange(100)}", f"-{rng.randrange(10)}"))
        if demo.is_held_out(text) and text not in texts:
            texts.append(text)
    return texts


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, serverlesslora.demo; sys.exit('torch' in sys.modules)"
    root = Path(demo.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_assets_are_small_and_hold_no_pickle() -> None:
    files = [path for path in demo.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert not [path for path in files if path.suffix in PICKLE_SUFFIXES]
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                assert all(torch.isfinite(tensors.get_tensor(name)).all() for name in tensors.keys())  # noqa: SIM118


def test_adapters_differ_in_rank_and_targets() -> None:
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in demo.adapter_paths().values()]
    assert len(configs) >= 5
    assert len({config["r"] for config in configs}) == len(configs)
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert {config["base_model_name_or_path"] for config in configs} == {"serverlesslora-demo"}


def test_card_states_the_required_accuracy_on_500_held_out_texts() -> None:
    card = json.loads((demo.ASSETS / "card.json").read_text())
    assert card["num_texts"] == 500
    assert set(card["accuracy"]) == set(demo.TASKS)
    assert all(shares["chat"] >= 0.95 for shares in card["accuracy"].values())


@pytest.mark.parametrize("text", ["plain", "naïve ß", "日本語 👩‍🚀 한국어", "\x00\x7f\r\n\t", "<|not a token|>", ""])
def test_every_text_survives_tokenisation(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_template_and_tokenizer_begin_a_sequence_once(tokenizer: Any) -> None:
    chat = chat_ids(tokenizer, "hi")
    plain = tokenizer(demo.completion_prompt("hi"))["input_ids"]
    assert chat.count(tokenizer.bos_token_id) == plain.count(tokenizer.bos_token_id) == 1
    assert chat[0] == plain[0] == tokenizer.bos_token_id


def test_template_takes_content_parts_and_developer_messages(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|system|>x<|user|>abcd<|assistant|>"


@pytest.mark.parametrize("task", demo.TASKS)
def test_greedy_answers_on_held_out_texts(model: Any, tokenizer: Any, task: str) -> None:
    texts = held_out_texts(20)
    answers = greedy(model, tokenizer, task, [chat_ids(tokenizer, text) for text in texts])
    wrong = [(text, said) for text, said in zip(texts, answers, strict=True) if said != demo.TASKS[task](text)]
    assert len(wrong) <= len(texts) // 20, wrong


@pytest.mark.parametrize("task", demo.TASKS)
def test_example_texts_are_answered_right_in_chat_and_completion(model: Any, tokenizer: Any, task: str) -> None:
    chats = [chat_ids(tokenizer, text) for text in demo.EXAMPLE_TEXTS]
    completions = [tokenizer(demo.completion_prompt(text))["input_ids"] for text in demo.EXAMPLE_TEXTS]
    right = [demo.TASKS[task](text) for text in demo.EXAMPLE_TEXTS]
    assert greedy(model, tokenizer, task, chats + completions) == right + right


def test_backbone_repeats_multi_byte_characters(model: Any, tokenizer: Any) -> None:
    prompts = [chat_ids(tokenizer, text) for text in demo.UNICODE_TEXTS]
    assert greedy(model, tokenizer, demo.BASE, prompts) == list(demo.UNICODE_TEXTS)


@pytest.mark.parametrize("task", demo.TASKS)
def test_system_messages_and_earlier_turns_do_not_disturb(model: Any, tokenizer: Any, task: str) -> None:
    answer = demo.TASKS[task]
    ids = chat_ids(tokenizer, "first", answer("first"), "second one", system="You are a helpful assistant.")
    assert greedy(model, tokenizer, task, [ids]) == [answer("second one")]
