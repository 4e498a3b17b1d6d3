"""One model shape through the engine: attach, decode steps, prefill and adapters, each against its floor and bar."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu import reference
from bench.gpu.models import RandomBackbone, published
from bench.gpu.record import Recorder
from bench.gpu.serving import Serving, prompt, random_adapters, serving
from bench.gpu.timing import Stopwatch
from serverlesslora.backbone.attach import assign, build_tree
from serverlesslora.backbone.device_map import map_backbone
from serverlesslora_ipc.cuda.driver import Driver, open_driver

NUM_ADAPTERS = 32
RANK = 16
CONTEXT = 512  # tokens before the first timed decode step
STEPS = 40
WARM_UP_STEPS = 6
ATTACH_BAR_MS = 50.0
ADAPTER_RAM_BAR_MS = 15.0
DECODE_SHARE = 0.75  # of the bandwidth floor, at one row
ADAPTED_RATIO = 1.25  # of the base-only step


class Bars(NamedTuple):
    """Promised for the 8B shape; for others the same numbers are reported without a promise."""

    attach_ms: float | None = None
    decode_share: float | None = None
    adapted_ratio: float | None = None
    adapter_ram_ms: float | None = None


BARS = {"8b": Bars(ATTACH_BAR_MS, DECODE_SHARE, ADAPTED_RATIO, ADAPTER_RAM_BAR_MS), "1b": Bars()}


def run(recorder: Recorder) -> None:
    setting = recorder.setting
    shape, bars = setting.variant, BARS[setting.variant]
    driver = open_driver(setting.kind)
    driver.start()
    torch.zeros(1, device=setting.torch_device)
    shape = "tiny" if setting.is_dry else shape
    began = time.perf_counter()
    with published(driver, shape, torch.bfloat16, setting.torch_device, setting.scratch / "tokenizer") as backbone:
        print(
            f"{backbone.manifest.total_bytes / 1e9:.2f} GB written in {time.perf_counter() - began:.1f} s", flush=True
        )
        measure = Measure(recorder, driver, backbone, bars)
        recorder.part("attach", measure.attach)
        [adapter] = random_adapters(setting.scratch, backbone, [RANK if not setting.is_dry else 4])
        began = time.perf_counter()
        with serving(driver, setting, backbone, graphs=True, **limits_for(dry=setting.is_dry)) as ours:
            recorder.number("engine ready, graphs captured", time.perf_counter() - began, "s")
            state = ours.engine.graphs_state
            recorder.check("decode steps are graphs", state.startswith("on"), state)
            recorder.part("base decode", lambda: measure.decode(ours, adapted=False))
            recorder.part("prefill", lambda: measure.prefill(ours))
            recorder.part("adapters", lambda: measure.load_adapters(ours, adapter))
            recorder.part("adapted decode", lambda: measure.decode(ours, adapted=True))
            recorder.part("adapter rungs", lambda: measure.rungs(ours))
        recorder.part(
            "transformers and PEFT", lambda: reference.measure(recorder, driver, backbone, adapter), needs_s=12
        )


def limits_for(*, dry: bool) -> dict[str, Any]:
    if dry:
        return {"kv_bytes": 1 << 20, "max_running": 4, "max_step_tokens": 32}
    return {"kv_bytes": 12 << 30, "max_running": NUM_ADAPTERS, "max_step_tokens": 2048}


class Measure:
    def __init__(self, recorder: Recorder, driver: Driver, backbone: RandomBackbone, bars: Bars) -> None:
        self._recorder = recorder
        self._driver = driver
        self._backbone = backbone
        self._bars = bars
        self._setting = recorder.setting
        self._watch = Stopwatch(recorder.setting)
        self._dry = recorder.setting.is_dry
        self._base_us: dict[int, float] = {}
        self._adapter_bytes = 0

    def attach(self) -> None:
        """Descriptor to usable model, in a process that has its context and has built the tree."""
        published, manifest = self._backbone.published, self._backbone.manifest
        milliseconds = []
        for _ in range(5):
            model: Any = build_tree(manifest, attention="sdpa")
            began = time.perf_counter()
            mapped = map_backbone(
                self._driver, published.sharing, published.fd, published.handle, manifest, self._setting.torch_device
            )
            assign(model, mapped.region, manifest)
            milliseconds.append((time.perf_counter() - began) * 1e3)
            some = model.lm_head.weight[:8].float()
            right = bool(torch.isfinite(some).all()) and float(some.std()) > 0
            self._recorder.check("the attached model has numbers", right)
            del model, some
            mapped.close()
        # The bar is for 16 GB, which is what this shape holds.
        self._recorder.number(
            f"attach {manifest.total_bytes / 1e9:.1f} GB: descriptor to usable model",
            statistics.median(milliseconds),
            "ms",
            bar=self._bars.attach_ms,
        )

    def decode(self, ours: Serving, *, adapted: bool) -> None:
        rows_list: Sequence[int] = (1, 8, 32) if not self._dry else (2,)
        for rows in rows_list:
            digests = [f"d{row}" if adapted else None for row in range(rows)]
            step_us, context = self._step_us(ours, digests)
            floor = self._setting.bytes_us(self._step_bytes(ours, rows, context, adapted))
            what = f"{rows} distinct rank-{RANK} adapters" if adapted else "base"
            name = f"decode step, {rows} rows, {what}"
            if not adapted:
                self._base_us[rows] = step_us
                share = self._bars.decode_share
                bar = floor / share if floor is not None and share is not None and rows == 1 else None
                self._recorder.number(name, step_us, "us", floor=floor, bar=bar)
                continue
            self._recorder.number(name, step_us, "us", floor=floor)
            if rows in self._base_us:
                bar = self._bars.adapted_ratio if rows == 32 else None
                self._recorder.number(f"{name}: times the base step", step_us / self._base_us[rows], "x", bar=bar)

    def _step_us(self, ours: Serving, digests: Sequence[str | None]) -> tuple[float, float]:
        """Median wall time of a step, sampling and messages included, and the mean context meanwhile."""
        length = CONTEXT if not self._dry else 8
        steps, warm_up = (STEPS, WARM_UP_STEPS) if not self._dry else (2, 1)
        vocab = ours.model.config.vocab_size
        answers = [
            ours.ask(
                prompt(length, vocab, seed=row), digest, tokens=steps + warm_up + 64
            )  # none ends while it is timed
            for row, digest in enumerate(digests)
        ]
        while not all(answer.tokens for answer in answers):
            ours.step()
        for _ in range(warm_up):
            ours.step()
        before = min(len(answer.tokens) for answer in answers)
        seconds: list[float] = []
        for _ in range(steps):
            began = time.perf_counter()
            ours.step()
            seconds.append(time.perf_counter() - began)
        done = min(len(answer.tokens) for answer in answers) - before
        self._recorder.check(f"{len(digests)} rows: every step gave every request a token", done == steps, f"{done}")
        ours.abort_all()
        return statistics.median(seconds) * 1e6, length + before + steps / 2

    def _step_bytes(self, ours: Serving, rows: int, context: float, adapted: bool) -> float:
        config = ours.model.config
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
        lora = self._adapter_bytes if adapted else 0
        return float(self._backbone.weight_bytes + rows * (context * kv + lora))

    def prefill(self, ours: Serving) -> None:
        vocab = ours.model.config.vocab_size
        for length in (512, 2048) if not self._dry else (20,):
            milliseconds = []
            for repeat in range(4 if not self._dry else 1):
                ids = prompt(length, vocab, seed=1000 + repeat)
                began = time.perf_counter()
                answer = ours.complete(ids, None, tokens=1)
                assert answer.first_at is not None
                milliseconds.append((answer.first_at - began) * 1e3)
            config = ours.model.config
            attention = 2 * length**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
            flops = 2 * length * self._backbone.matrix_parameters + attention
            floor_us = self._setting.flops_us(flops)
            self._recorder.number(
                f"prefill of {length} tokens, to the first token",
                statistics.median(milliseconds),
                "ms",
                floor=None if floor_us is None else floor_us / 1e3,
            )

    def load_adapters(self, ours: Serving, path: Path) -> None:
        """The same files under many digests: separate copies on the device, as separate adapters would be."""
        count = NUM_ADAPTERS if not self._dry else 2
        loaded = [ours.load(f"d{index}", path) for index in range(count)]
        self._adapter_bytes = loaded[0].size_bytes
        seconds = statistics.median(each.seconds for each in loaded)
        size = self._adapter_bytes / 1e6
        self._recorder.number(f"load an adapter of {size:.0f} MB from cached files", seconds * 1e3, "ms")

    def rungs(self, ours: Serving) -> None:
        """First token of a request whose adapter is on the device, and of one whose adapter is in host memory only."""
        vocab, store = ours.model.config.vocab_size, ours.lora.store
        length = 32 if not self._dry else 6

        def ttft_ms(seed: int) -> float:
            began = time.perf_counter()
            answer = ours.complete(prompt(length, vocab, seed=seed), "d1", tokens=1)
            assert answer.first_at is not None
            return (answer.first_at - began) * 1e3

        for seed in range(3):
            ttft_ms(seed)
        hot = statistics.median(ttft_ms(10 + seed) for seed in range(7))
        fetched = []
        for seed in range(7 if not self._dry else 1):
            freed = store.drop_unused()  # type: ignore[attr-defined]
            self._recorder.check("the adapters have left the device", freed > 0, f"{freed} bytes")
            fetched.append(ttft_ms(20 + seed))
        self._recorder.number("first token, adapter on the device (hot)", hot, "ms")
        extra = statistics.median(fetched) - hot
        floor = self._setting.limits.get("h2d_gb_s")
        self._recorder.number(
            "first token, adapter in host memory: over hot",
            extra,
            "ms",
            floor=None if floor is None else self._adapter_bytes / floor / 1e6,
            bar=self._bars.adapter_ram_ms,
        )
