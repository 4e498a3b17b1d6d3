"""An engine on the device as a worker has it, driven step by step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.gpu.models import RandomBackbone
from bench.gpu.record import Setting
from bench.make_models import write_adapter
from serverlesslora.backbone.attach import assign, build_tree
from serverlesslora.backbone.device_map import map_backbone
from serverlesslora.engine.device import Device, open_device
from serverlesslora.engine.engine import Engine
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.shortcuts import take_shortcuts
from serverlesslora_ipc.cuda.driver import Driver
from serverlesslora_ipc.messages import (
    Delta,
    Failed,
    Finished,
    Generate,
    LoadAdapter,
    Loaded,
    PromptEcho,
    SamplingParams,
    TokenLogprob,
    TokensPrompt,
    WorkerLimits,
)


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.first_at: float | None = None
        self.ended = False


class Serving:
    def __init__(self, model: PreTrainedModel, lora: LoraModel, engine: Engine, device: Device) -> None:
        self.model = model
        self.lora = lora
        self.engine = engine
        self.device = device
        self.answers: dict[str, Answer] = {}
        self._count = 0

    def load(self, digest: str, path: Path) -> Loaded:
        loaded = self.engine.load_adapter(LoadAdapter(digest, str(path)))
        if not isinstance(loaded, Loaded):
            raise RuntimeError(f"adapter refused: {loaded.reason}")
        return loaded

    def ask(
        self, prompt: Sequence[int], adapter: str | None, *, tokens: int, echo: bool = False, **more: Any
    ) -> Answer:
        """Greedy and without an end of its own."""
        self._count += 1
        name = str(self._count)
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, **more)
        answer = self.answers[name] = Answer()
        self.engine.submit(Generate(name, adapter, TokensPrompt(tuple(prompt)), sampling, echo=echo))
        return answer

    def step(self) -> None:
        for message in self.engine.step():
            now = time.perf_counter()
            match message:
                case Delta():
                    answer = self.answers[message.request_id]
                    answer.first_at = answer.first_at or now
                    answer.tokens += message.token_ids
                    answer.logprobs += message.logprobs or ()
                case PromptEcho():
                    self.answers[message.request_id].prompt_logprobs = list(message.logprobs or ())
                case Finished():
                    self.answers.pop(message.request_id).ended = True
                case Failed():
                    self.answers.pop(message.request_id).ended = True
                    raise RuntimeError(f"a request failed: {message.error.message}")

    def run(self) -> None:
        with torch.inference_mode():
            while self.engine.has_work:
                self.step()

    def abort_all(self) -> None:
        for name in list(self.answers):
            self.engine.abort(name)
        self.answers.clear()
        self.run()

    def complete(self, prompt: Sequence[int], adapter: str | None, *, tokens: int, **more: Any) -> Answer:
        """Alone, to its end."""
        answer = self.ask(prompt, adapter, tokens=tokens, **more)
        self.run()
        return answer


@contextlib.contextmanager
def serving(
    driver: Driver, setting: Setting, backbone: RandomBackbone, *, graphs: bool, **limits: Any
) -> Iterator[Serving]:
    """Attached as a worker attaches: by descriptor, read-only where the device can."""
    device = open_device(setting.kind, driver)
    published, manifest = backbone.published, backbone.manifest
    mapped = map_backbone(driver, published.sharing, published.fd, published.handle, manifest, device.torch_device)
    model = build_tree(manifest, attention="eager")
    assign(model, mapped.region, manifest)
    lora = LoraModel(model, device)
    take_shortcuts(model, device)
    assert manifest.tokenizer is not None
    text = TextCodec.from_directory(
        Path(manifest.tokenizer),
        context_length=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
    )
    engine = Engine(
        model, lora, text, WorkerLimits(**({"threads": 1, "prefix_cache": False} | limits)), time.monotonic, device
    )
    try:
        with torch.inference_mode():
            if graphs:
                engine.capture()
            ours = Serving(model, lora, engine, device)
            try:
                yield ours
            finally:
                ours.abort_all()  # where a measurement failed half-way
    finally:
        engine.close()
        del engine, model, lora
        if setting.kind == "cuda":
            torch.cuda.synchronize()  # nothing may use memory while it is unmapped
        mapped.close()


def reference_model(backbone: RandomBackbone, mapped_region: torch.Tensor, attention: str) -> PreTrainedModel:
    """transformers' own model over the same memory."""
    model = build_tree(backbone.manifest, attention=attention)
    assign(model, mapped_region, backbone.manifest)
    return model


def random_adapters(directory: Path, backbone: RandomBackbone, ranks: Sequence[int]) -> list[Path]:
    """PEFT directories on all linear layers of the decoder."""
    tree = build_tree(backbone.manifest, attention="eager")
    paths = []
    for index, rank in enumerate(ranks):
        path = directory / f"adapter-{index}"
        write_adapter(path, tree, base=backbone.manifest.model, rank=rank, seed=100 + index)
        paths.append(path)
    return paths


def prompt(length: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab, (length,), generator=generator).tolist()
