"""What a user has today on the same GPU: transformers' `generate`, with PEFT where an adapter is wanted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bench.gpu.models import RandomBackbone
from bench.gpu.record import Recorder
from bench.gpu.serving import prompt, reference_model
from serverlesslora.backbone.device_map import map_backbone
from serverlesslora_ipc.cuda.driver import Driver

PROMPT = 512
FEW, MANY = 4, 20  # tokens: the difference is decode alone


def measure(recorder: Recorder, driver: Driver, backbone: RandomBackbone, adapter: Path) -> None:
    """Over the same shared memory, so it costs no second copy; `generate` as the documentation shows it."""
    setting, published, manifest = recorder.setting, backbone.published, backbone.manifest
    device = setting.torch_device
    mapped = map_backbone(driver, published.sharing, published.fd, published.handle, manifest, device)
    model: Any = reference_model(backbone, mapped.region, "sdpa").eval()
    batches = (1, 32) if not setting.is_dry else (2,)
    for rows in batches:
        _report(recorder, model, rows, f"transformers generate, {rows} rows, base")
    with torch.inference_mode(False):
        wrapped = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(device=device, dtype=torch.bfloat16)
    for rows in batches:
        _report(recorder, wrapped.eval(), rows, f"transformers + PEFT generate, {rows} rows, 1 adapter")
    del model, wrapped
    mapped.close()


def _report(recorder: Recorder, model: Any, rows: int, name: str) -> None:
    setting = recorder.setting
    length = PROMPT if not setting.is_dry else 6
    few, many = (FEW, MANY) if not setting.is_dry else (1, 2)
    vocab = model.config.vocab_size
    ids = torch.tensor([prompt(length, vocab, seed=row) for row in range(rows)], device=setting.torch_device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 3,
    }

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        if setting.kind == "cuda":
            torch.cuda.synchronize()
        recorder.check(f"{name}: {tokens} tokens", out.shape[1] == length + tokens)
        return time.perf_counter() - began

    seconds(few)
    per_token = (min(seconds(many) for _ in range(2)) - min(seconds(few) for _ in range(2))) / (many - few)
    recorder.number(f"{name}: per step", per_token * 1e6, "us")
