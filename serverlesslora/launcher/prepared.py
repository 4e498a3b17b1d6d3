"""Everything a worker needs that can be made before its process exists."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedModel

from serverlesslora.backbone.attach import attach
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import sealed
from serverlesslora_ipc.manifest import Manifest

# Where a config may say how many positions a model can tell apart.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNBOUNDED_CONTEXT = 1 << 20


class PrepareError(Exception):
    """The backbone is mapped but cannot be served; the message says why."""


@dataclass(frozen=True)
class PreparedBackbone:
    """Made once in the launcher; each worker gets it by being forked. `weights` is mapped read-only."""

    backbone: str
    manifest: Manifest
    weights: mmap.mmap
    model: PreTrainedModel
    lora: LoraModel
    text: TextCodec

    @property
    def context_length(self) -> int:
        config = self.model.config.get_text_config()
        found = [getattr(config, field, None) for field in _CONTEXT_FIELDS]
        return next((length for length in found if isinstance(length, int) and length > 0), _UNBOUNDED_CONTEXT)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def prepare(backbone: str, weights_fd: int, manifest_fd: int) -> PreparedBackbone:
    """Takes over both descriptors. Starts no thread, so that the process can be forked afterwards."""
    torch.set_num_threads(1)  # a parallel region before the fork would start a pool that workers only seem to have
    try:
        sealed.check_sealed(weights_fd)
        manifest = manifests.read(manifest_fd)
        weights = sealed.map_readonly(weights_fd, manifest.total_bytes)
    finally:
        os.close(weights_fd)
        os.close(manifest_fd)
    if manifest.tokenizer is None:
        raise PrepareError(f"{manifest.model} has no tokenizer files beside its weights")
    model = attach(weights, manifest, attention="eager")  # each worker's engine puts its own in its place
    return PreparedBackbone(
        backbone=backbone,
        manifest=manifest,
        weights=weights,
        model=model,
        lora=LoraModel(model),
        text=TextCodec(AutoTokenizer.from_pretrained(manifest.tokenizer)),
    )
