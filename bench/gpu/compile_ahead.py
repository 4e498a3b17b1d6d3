"""Compiles, in processes side by side, what the timed sections launch: a compiler's minute is not theirs to spend."""

from __future__ import annotations

import time

import torch

from bench.gpu import linear, sgmv
from bench.gpu.engine import RANK, limits_for
from bench.gpu.models import published
from bench.gpu.record import Recorder
from bench.gpu.serving import prompt, random_adapters, serving
from serverlesslora_ipc.cuda.driver import open_driver


def run(recorder: Recorder) -> None:
    variant, began = recorder.setting.variant, time.perf_counter()
    if variant == "sgmv":
        sgmv.compile_all(recorder)
    elif variant == "linear":
        linear.compile_all(recorder)
    else:
        _engine(recorder, variant)
    recorder.number(f"first use of everything, compiling: {variant}", time.perf_counter() - began, "s")
    recorder.check("it runs", True)


def _engine(recorder: Recorder, shape: str) -> None:
    """A model of the same widths and one layer launches the same kernels."""
    setting = recorder.setting
    driver = open_driver(setting.kind)
    driver.start()
    torch.zeros(1, device=setting.torch_device)
    shape = "tiny" if setting.is_dry else shape
    tokenizer = setting.scratch / "tokenizer"
    with published(driver, shape, torch.bfloat16, setting.torch_device, tokenizer, layers=1) as backbone:
        [adapter] = random_adapters(setting.scratch, backbone, [RANK])
        limits = limits_for(dry=setting.is_dry)
        with serving(driver, setting, backbone, graphs=True, **limits | {"kv_bytes": limits["kv_bytes"] // 8}) as ours:
            ours.load("d0", adapter)
            vocab = ours.model.config.vocab_size
            for length in (2048, 512, 32, 1) if not setting.is_dry else (9, 1):
                for digest in (None, "d0"):
                    ours.ask(prompt(length, vocab, seed=length), digest, tokens=2)
                ours.run()
