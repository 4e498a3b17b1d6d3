"""Prompts as vectors: those of transformers and peft, whatever shares the step, however the prompt is cut."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from serverlesslora.engine.cuda.device import CudaDevice
from serverlesslora_ipc.messages import Embedding, Failed, Finished, Generate, SamplingParams, Started, TokensPrompt
from tests.fakes import tiny_model, write_adapter
from tests.test_engine import Bench, prompt_of, solo

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


class Vectors(Bench):
    """A bench whose embeddings are kept apart from the answers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.vectors: dict[str, list[Any]] = {}

    def embed(self, name: str, prompt: list[int], pooling: Pooling, adapter: str | None = None, **more: Any) -> None:
        message = Generate(name, adapter, TokensPrompt(tuple(prompt)), SamplingParams(), pooling=pooling, **more)
        self.engine.submit(message)
        self.vectors[name] = []

    def take(self, messages: list[Any]) -> None:
        for message in messages:
            if message.request_id in self.vectors:
                self.vectors[message.request_id].append(message)
        super().take([message for message in messages if message.request_id not in self.vectors])

    def vector(self, name: str) -> NDArray[np.float32]:
        started, embedding, finished = self.vectors[name]
        assert isinstance(started, Started)
        assert isinstance(embedding, Embedding)
        assert isinstance(finished, Finished)
        assert finished.completion_tokens == 0
        assert finished.prompt_tokens == started.prompt_tokens
        return np.frombuffer(embedding.vector, "<f4")


@torch.inference_mode()
def expected(model: PreTrainedModel, prompt: list[int], pooling: Pooling) -> NDArray[np.float32]:
    states = model.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
    pooled = states[-1] if pooling == "last" else states.mean(0)
    unit: NDArray[np.float32] = (pooled / pooled.norm()).numpy()
    return unit


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = ("q_proj", "v_proj", "down_proj")
    return write_adapter(tmp_path_factory.mktemp("adapters") / "a", tiny_model(), scale=0.4, targets=targets)


@pytest.fixture(scope="module")
def oracles(adapter: Path) -> dict[str, PreTrainedModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers with an old name
        adapted = PeftModel.from_pretrained(tiny_model(), adapter).get_base_model()
    assert isinstance(adapted, PreTrainedModel)
    return {"": tiny_model(), "a": adapted}


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", ["", "a"])
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_running": 4, "max_step_tokens": 7}, {"max_running": 4, "max_step_tokens": 9, "prefix_cache": False}],
    ids=["whole", "chunks", "uncached"],
)
@pytest.mark.parametrize("preempted", [False, True])
def test_vectors_are_those_of_the_library_beside_others(
    pooling: Pooling,
    name: str,
    limits: dict[str, Any],
    preempted: bool,
    adapter: Path,
    oracles: dict[str, PreTrainedModel],
) -> None:
    rng = random.Random(7)
    bench = Vectors(**limits)
    bench.load(adapter, "a")
    # The same beginning, so that the prefix cache has something to offer.
    shared = prompt_of(rng, 24)
    prompts = [shared + prompt_of(rng) for _ in range(3)]
    for place, prompt in enumerate(prompts):
        bench.embed(f"e{place}", prompt, pooling, name or None)
        bench.ask(f"g{place}", prompt, name or None, max_tokens=3)
    for _ in range(12 if preempted else 0):
        bench.step()
        scheduler = bench.engine._scheduler
        if scheduler.running:
            scheduler._preempt(rng.choice(scheduler.running))
    bench.run()
    for place, prompt in enumerate(prompts):
        vector = bench.vector(f"e{place}")
        assert np.abs(vector - expected(oracles[name], prompt, pooling)).max() < 1e-4
        assert abs(float(np.linalg.norm(vector)) - 1) < 1e-5
        assert bench.answers[f"g{place}"].tokens() == solo(oracles[name], prompt, 3)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_emulated_device(
    device: CudaDevice, pooling: Pooling, adapter: Path, oracles: dict[str, PreTrainedModel]
) -> None:
    bench = Vectors(device=device, model=tiny_model().to(device.torch_device), max_step_tokens=8, max_running=4)
    bench.load(adapter, "a")
    prompt = prompt_of(random.Random(3), 20)
    bench.ask("g", prompt, "a", max_tokens=4)
    bench.embed("base", prompt, pooling)
    bench.embed("a", prompt, pooling, "a")
    bench.run()
    for name, adapted in (("base", ""), ("a", "a")):
        assert np.abs(bench.vector(name) - expected(oracles[adapted], prompt, pooling)).max() < 1e-4
    assert bench.answers["g"].tokens() == solo(oracles["a"], prompt, 4)


def test_a_prompt_of_one_token_and_one_that_fills_the_context() -> None:
    bench = Vectors()
    for length in (1, bench.engine.max_model_len):
        for pooling in POOLINGS:
            prompt = [(7 * i) % 256 for i in range(length)]
            bench.embed(f"{pooling}{length}", prompt, pooling)
            bench.run()
            assert np.abs(bench.vector(f"{pooling}{length}") - expected(tiny_model(), prompt, pooling)).max() < 1e-4
    bench.embed("long", [1] * (bench.engine.max_model_len + 1), "mean")
    bench.run()
    (failed,) = bench.vectors["long"]
    assert isinstance(failed, Failed)
    assert failed.error.code == "context_length_exceeded"


def test_the_mean_needs_every_token_and_the_last_takes_what_is_cached() -> None:
    bench = Vectors()
    prompt = [(5 * i) % 256 for i in range(33)]
    cached = {}
    asked: tuple[tuple[str, Pooling], ...] = (("first", "mean"), ("mean", "mean"), ("last", "last"))
    for name, pooling in asked:
        bench.embed(name, prompt, pooling)
        bench.run()
        cached[name] = bench.vectors[name][-1].cached_tokens
    assert cached == {"first": 0, "mean": 0, "last": 32}
    assert bytes(bench.vector("first")) == bytes(bench.vector("mean"))


def test_a_damaged_model_is_told_and_an_abort_frees_everything() -> None:
    bench = Vectors(max_step_tokens=8, max_running=4)
    bench.embed("aborted", list(range(60)), "mean")
    bench.step()
    bench.engine.abort("aborted")
    bench.run()
    assert [type(message).__name__ for message in bench.vectors["aborted"]] == ["Started", "Aborted"]
    with torch.no_grad():
        bench.model.base_model.norm.weight.fill_(torch.nan)
    bench.embed("nan", list(range(10)), "mean")
    bench.run()
    assert isinstance(failed := bench.vectors["nan"][-1], Failed)
    assert failed.error.code == "nan_logits"
