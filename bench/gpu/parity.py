"""The engine gives what PEFT gives, and what happens around a request does not change its tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from bench.gpu.models import RandomBackbone, published
from bench.gpu.record import Recorder
from bench.gpu.serving import Answer, Serving, prompt, random_adapters, reference_model, serving
from serverlesslora.backbone.device_map import map_backbone
from serverlesslora_ipc.cuda.driver import Driver, open_driver

# Largest difference of a log-probability. bf16 rounds each of some hundred operations on both sides, differently.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}
RANKS = (4, 8, 16, 16, 32, 64, 5, 8)
NEAR_TIE = 1e-3  # two tokens this close in log-probability may change places with the order of a float32 sum


def run(recorder: Recorder) -> None:
    setting = recorder.setting
    driver = open_driver(setting.kind)
    driver.start()
    proof = Proof(recorder, driver)
    if setting.is_dry:
        recorder.part("tiny float32", lambda: proof.model("tiny", torch.float32, requests=4, tokens=2))
        return
    recorder.part("small float32", lambda: proof.model("small", torch.float32, requests=64, tokens=24))
    recorder.part("small bfloat16", lambda: proof.model("small", torch.bfloat16, requests=0, tokens=24))
    recorder.part("1b float32", lambda: proof.model("1b", torch.float32, requests=16, tokens=12), needs_s=15)
    recorder.part("1b bfloat16", lambda: proof.model("1b", torch.bfloat16, requests=0, tokens=12), needs_s=8)


class Proof:
    def __init__(self, recorder: Recorder, driver: Driver) -> None:
        self._recorder = recorder
        self._driver = driver
        self._setting = recorder.setting

    def model(self, shape: str, dtype: torch.dtype, *, requests: int, tokens: int) -> None:
        name = f"{shape} {str(dtype).removeprefix('torch.')}"
        place = self._setting.scratch / name.replace(" ", "-")
        device = self._setting.torch_device
        with published(self._driver, shape, dtype, device, place / "tokenizer") as backbone:
            ranks = RANKS if not self._setting.is_dry else (2, 3)
            paths = random_adapters(place, backbone, ranks)
            limits: dict[str, Any] = {
                "kv_bytes": (2 << 30) if not self._setting.is_dry else (1 << 20),
                "max_running": 64 if not self._setting.is_dry else 2,
                "max_step_tokens": 512 if not self._setting.is_dry else 16,
            }
            solo: list[list[int]] | None = None
            for graphs in (False, True):
                with serving(self._driver, self._setting, backbone, graphs=graphs, **limits) as ours:
                    for index, path in enumerate(paths):
                        ours.load(f"d{index}", path)
                    label = f"{name}, graphs {'on' if graphs else 'off'}"
                    if graphs:
                        state = ours.engine.graphs_state
                        self._recorder.check(f"{label}: captured", state.startswith("on"), state)
                    self._against_peft(label, ours, backbone, paths, ranks, dtype, tokens)
                    # In the interpreter a step takes seconds, and the steps with graphs contain all others.
                    if requests and (graphs or not self._setting.is_dry):
                        solo = self._interleaved(label, ours, len(paths), requests, tokens, solo)

    def _against_peft(
        self,
        label: str,
        ours: Serving,
        backbone: RandomBackbone,
        paths: Sequence[Path],
        ranks: Sequence[int],
        dtype: torch.dtype,
        tokens: int,
    ) -> None:
        """Log-probabilities of the prompt's tokens and of the chosen ones, on the tokens that we chose."""
        vocab = ours.model.config.vocab_size
        ids = prompt(40 if not self._setting.is_dry else 6, vocab, seed=1)
        worst: dict[str, float] = {}
        prompts: list[Tensor] = []
        for adapter in (None, len(paths) - 1) if self._setting.is_dry else (None, 0, len(paths) - 1):
            digest = None if adapter is None else f"d{adapter}"
            answer = ours.complete(ids, digest, tokens=tokens, echo=True, logprobs=0, prompt_logprobs=0)
            whole = ids + answer.tokens
            with self._theirs(backbone, None if adapter is None else paths[adapter]) as model:
                scores = model(input_ids=torch.tensor([whole], device=self._setting.torch_device)).logits[0]
            wanted = scores.float().log_softmax(-1)[torch.arange(len(whole) - 1), whole[1:]].cpu()
            found = _logprobs(answer, len(ids))
            prompts.append(found[: len(ids) - 1])
            worst["bare" if adapter is None else f"rank {ranks[adapter]}"] = float((found - wanted).abs().max())
        for which, error in worst.items():
            self._recorder.within(f"{label}, {which}: log-probabilities as in PEFT", error, TOLERANCE[dtype])
        moved = min(float((prompts[0] - other).abs().max()) for other in prompts[1:])
        self._recorder.check(f"{label}: adapters change what the model says", moved > 0.02, f"by {moved:.3g}")

    def _theirs(self, backbone: RandomBackbone, path: Path | None) -> _Reference:
        return _Reference(self._driver, self._setting.torch_device, backbone, path)

    def _interleaved(
        self, label: str, ours: Serving, num_adapters: int, requests: int, tokens: int, solo: list[list[int]] | None
    ) -> list[list[int]]:
        """Requests of all adapters arrive while others run; each must get what it gets alone."""
        rng = random.Random(0)
        vocab = ours.model.config.vocab_size
        longest = 120 if not self._setting.is_dry else 7
        asked = [
            (prompt(rng.randint(1, longest), vocab, seed=10 + i), f"d{i % num_adapters}", rng.randint(1, tokens))
            for i in range(requests)
        ]
        if solo is None:
            solo = [ours.complete(ids, digest, tokens=count).tokens for ids, digest, count in asked]
        answers: list[Answer] = []
        waiting = list(asked)
        while waiting or ours.engine.has_work:
            for _ in range(rng.randint(0, 4)):
                if waiting:
                    ids, digest, count = waiting.pop(0)
                    answers.append(ours.ask(ids, digest, tokens=count))
            ours.step()
        different = [i for i, answer in enumerate(answers) if answer.tokens != solo[i]]
        unexplained = [i for i in different if not self._is_near_tie(ours, asked[i], answers[i].tokens, solo[i])]
        detail = f"{len(different)} of {requests} differ, {len(different) - len(unexplained)} of them at a near tie"
        self._recorder.check(f"{label}: {requests} interleaved requests equal lonely ones", not unexplained, detail)
        self._recorder.check(f"{label}: near ties are rare", len(different) <= max(1, requests // 20), detail)
        return solo

    def _is_near_tie(self, ours: Serving, asked: tuple[list[int], str, int], got: list[int], wanted: list[int]) -> bool:
        at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
        answer = ours.complete(asked[0] + wanted[:at], asked[1], tokens=1, logprobs=2)
        first, second = answer.logprobs[0].top[:2]
        return {first.token_id, second.token_id} == {got[at], wanted[at]} and first.logprob - second.logprob < NEAR_TIE


class _Reference:
    """transformers' model over the same memory, wrapped by PEFT where an adapter is wanted."""

    def __init__(self, driver: Driver, device: torch.device, backbone: RandomBackbone, path: Path | None) -> None:
        self._device = device
        published, manifest = backbone.published, backbone.manifest
        self._mapped = map_backbone(driver, published.sharing, published.fd, published.handle, manifest, device)
        self._model: Any = reference_model(backbone, self._mapped.region, "sdpa")
        if path is not None:
            self._model = PeftModel.from_pretrained(self._model, str(path), autocast_adapter_dtype=False)
            dtype = getattr(torch, manifest.dtype)
            for key, parameter in self._model.named_parameters():
                if "lora_" in key:  # as the engine keeps them
                    parameter.data = parameter.data.to(device=device, dtype=dtype)
        self._model.eval()

    def __enter__(self) -> Any:
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # it may still be reading its weights
        self._mapped.close()


def _logprobs(answer: Answer, num_prompt: int) -> Tensor:
    prompt_part = [entry.logprob for entry in answer.prompt_logprobs[1:] if entry is not None]
    assert len(prompt_part) == num_prompt - 1
    return torch.tensor(prompt_part + [entry.logprob for entry in answer.logprobs])
