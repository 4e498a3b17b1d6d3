"""Everything a worker needs that can be made before its process exists."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from serverlesslora.backbone.attach import attach
from serverlesslora.engine.attention import bytes_per_token
from serverlesslora.engine.device import Device
from serverlesslora.engine.engine import Engine
from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.engine.shortcuts import take_shortcuts
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import sealed
from serverlesslora_ipc.manifest import Manifest
from serverlesslora_ipc.messages import Failed, Generate, SamplingParams, Sharing, TokensPrompt, WorkerLimits
from serverlesslora_kernels.segments import sgmv_kernels

if TYPE_CHECKING:
    from serverlesslora.backbone.device_map import MappedBackbone

# Where a config may say how many positions a model can tell apart.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNBOUNDED_CONTEXT = 1 << 20

BLOCK_SIZE = 16
WARM_UP_TOKENS = 80  # more rows than the native kernels take, so that torch's own path is warm too


class PrepareError(Exception):
    """The backbone is mapped but cannot be served; the message says why."""


@dataclass(frozen=True)
class BuiltBackbone:
    """What the manifest alone makes: a module tree and a tokenizer."""

    backbone: str
    manifest: Manifest
    model: PreTrainedModel
    text: TextCodec

    @property
    def context_length(self) -> int:
        return context_length(self.model.config.get_text_config())

    @property
    def kv_bytes_per_token(self) -> int:
        return bytes_per_token(self.model.config.get_text_config(), self.model.dtype)

    @property
    def size_bytes(self) -> int:
        return self.manifest.total_bytes

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class PreparedBackbone(BuiltBackbone):
    """A backbone an engine can run on. On CPU it is made once in the launcher and each worker gets it by being forked;
    on a device each process makes its own."""

    lora: LoraModel
    device: Device = HOST
    device_name: str = "cpu"
    weights: mmap.mmap | None = field(default=None, kw_only=True)  # on CPU: read-only
    weights_fd: int | None = field(default=None, kw_only=True)  # kept open for who copies `weights`
    mapped: MappedBackbone | None = field(default=None, kw_only=True)  # on a device; what `model` is made of
    engine: Engine | None = None  # ready, and used for nothing but its rehearsal
    is_rehearsed: bool = False  # this process has filled its page tables and run a step
    # What a worker's start has taken so far, in seconds, as `Ready` says it.
    libraries_s: float = field(default=0.0, kw_only=True)
    load_s: float = field(default=0.0, kw_only=True)
    copy_s: float = field(default=0.0, kw_only=True)

    def engine_for(self, limits: WorkerLimits) -> Engine:
        """The rehearsed one, whose memory and graphs are there, if it has these limits."""
        if self.engine is not None:
            if self.engine.limits == limits:
                return self.engine
            self.engine.close()
        return Engine(self.model, self.lora, self.text, limits, time.monotonic, self.device)


def prepare(
    backbone: str, weights_fd: int | None, manifest_fd: int, sharing: Sharing = "memfd", handle: bytes = b""
) -> PreparedBackbone:
    """Takes over both descriptors. Starts no thread, so that the process can be forked afterwards."""
    torch.set_num_threads(1)  # a parallel region before the fork would start a pool that workers only seem to have
    assert sharing == "memfd"
    assert weights_fd is not None
    prepared = map_shared(backbone, weights_fd, manifest_fd)
    warm_up(prepared, threads=1)
    return prepared


def map_shared(backbone: str, weights_fd: int, manifest_fd: int) -> PreparedBackbone:
    """Takes over both descriptors. Nothing was computed yet."""
    try:
        sealed.check_sealed(weights_fd)
        manifest = manifests.read(manifest_fd)
        weights = sealed.map_readonly(weights_fd, manifest.total_bytes)
    finally:
        os.close(weights_fd)
        os.close(manifest_fd)
    return build(backbone, weights, manifest)


def build(backbone: str, weights: mmap.mmap, manifest: Manifest) -> PreparedBackbone:
    """Around weights that are in memory, shared or not."""
    model = attach(weights, manifest, attention="eager")  # each worker's engine puts its own in its place
    lora = LoraModel(model)
    take_shortcuts(model)
    return PreparedBackbone(
        backbone=backbone,
        manifest=manifest,
        weights=weights,
        model=model,
        lora=lora,
        text=text_codec(manifest, model),
    )


def text_codec(manifest: Manifest, model: PreTrainedModel) -> TextCodec:
    """Raises PrepareError for a model that came without a tokenizer."""
    if manifest.tokenizer is None:
        raise PrepareError(f"{manifest.model} has no tokenizer files beside its weights")
    config = model.config.get_text_config()
    return TextCodec.from_directory(
        Path(manifest.tokenizer), context_length=context_length(config), vocab_size=config.vocab_size
    )


def warm_up(prepared: PreparedBackbone, *, threads: int) -> None:
    """Answer one request, so that what happens only once happens now: late imports, caches of transformers, kernels
    loaded and primitives created. Before a fork it must be one thread: a pool must not start."""
    sgmv_kernels()
    num_tokens = min(WARM_UP_TOKENS, prepared.context_length - 2)
    kv_bytes = prepared.kv_bytes_per_token * (num_tokens + 2 + 2 * BLOCK_SIZE)
    limits = WorkerLimits(threads=threads, kv_bytes=kv_bytes, max_running=1, block_size=BLOCK_SIZE)
    engine = Engine(prepared.model, prepared.lora, prepared.text, limits, time.monotonic)
    answer_once(engine, num_tokens, prepared.vocab_size)
    engine.close()


def answer_once(engine: Engine, num_tokens: int, vocab_size: int) -> None:
    """A prompt of so many tokens and two more, said to nobody."""
    prompt = TokensPrompt(token_ids=tuple(i % vocab_size for i in range(num_tokens)))
    # Drawn from a nucleus, as most requests are: on a device that is a dozen kernels more than the largest logit.
    sampling = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9, ignore_eos=True)
    engine.submit(Generate(request_id="warm-up", adapter=None, prompt=prompt, sampling=sampling))
    while engine.has_work:
        for message in engine.step():
            if isinstance(message, Failed):
                raise PrepareError(f"the backbone cannot answer: {message.error.message}")


def context_length(config: PreTrainedConfig) -> int:
    """Positions the model can tell apart."""
    found = [getattr(config, field, None) for field in _CONTEXT_FIELDS]
    return next((length for length in found if isinstance(length, int) and length > 0), _UNBOUNDED_CONTEXT)
