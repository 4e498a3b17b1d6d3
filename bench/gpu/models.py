"""Random models written straight into shared device memory, with the manifest a backbone host would have made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from bench.make_models import write_tokenizer
from serverlesslora.backbone import layout
from serverlesslora.backbone.layout import TensorShape
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc.cuda.driver import Driver
from serverlesslora_ipc.cuda.region import Publication, RegionDraft
from serverlesslora_ipc.manifest import Manifest, TensorSpec
from serverlesslora_kernels.cuda.memory import bytes_at

IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # for machines without a GPU
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 256,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
    },
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "8b": {  # Llama 3.1 8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
    },
}


class RandomBackbone(NamedTuple):
    published: Publication
    manifest: Manifest

    @property
    def weight_bytes(self) -> int:
        """What one decode step must read: everything but an input embedding that is not the head as well."""
        unread = {"model.embed_tokens.weight"} if "lm_head.weight" not in self.manifest.aliases else set()
        return sum(spec.size for spec in self.manifest.tensors if spec.name not in unread)

    @property
    def matrix_parameters(self) -> int:
        """Of the layers: each costs two operations per token; the head is computed for one row only."""
        return sum(
            spec.shape[0] * spec.shape[1]
            for spec in self.manifest.tensors
            if len(spec.shape) == 2 and ".layers." in spec.name
        )


def config_of(shape: str, layers: int | None = None) -> LlamaConfig:
    changes = {} if layers is None else {"num_hidden_layers": layers}
    return LlamaConfig(**({"tie_word_embeddings": False} | SHAPES[shape] | IDS | changes))


def module_of(shape: str, dtype: torch.dtype, layers: int | None = None) -> LlamaForCausalLM:
    """On the CPU: buffers hold their values, parameters are memory that nobody has touched, so it costs nothing."""
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config_of(shape, layers), dtype=dtype)
    assert isinstance(model, LlamaForCausalLM)
    return model


@contextlib.contextmanager
def published(
    driver: Driver,
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Path,
    *,
    seed: int = 0,
    layers: int | None = None,
) -> Iterator[RandomBackbone]:
    """`tokenizer` is a directory that is made for it; `layers` where fewer than the shape has will do."""
    module = module_of(shape, dtype, layers)
    tied = bool(module.config.tie_word_embeddings)
    parameters = {
        name: parameter.detach()
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not (tied and name == "lm_head.weight")
    }
    buffers = dict(module.named_buffers())
    shapes = {name: _shape(tensor) for name, tensor in (parameters | buffers).items()}
    sizes = {name: each.size for name, each in shapes.items()}
    offsets, end = layout.offsets(layout.runs({name: shapes[name] for name in parameters}), sizes)
    buffer_offsets, end = layout.offsets([(name,) for name in buffers], sizes, end)
    write_tokenizer(tokenizer, module.config.vocab_size)
    manifest = Manifest(
        model=f"random {shape}",
        architecture="LlamaForCausalLM",
        config=json.dumps(module.config.to_dict(), default=str),
        generation_config="{}",
        dtype=str(dtype).removeprefix("torch."),
        tensors=_specs(offsets, shapes),
        buffers=_specs(buffer_offsets, shapes),
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        total_bytes=end,
        content_digest="",
        tokenizer=str(tokenizer),
    )
    with RegionDraft(driver, end) as draft:
        region = bytes_at(draft.address, end, device)
        region.zero_()
        generator = torch.Generator(device).manual_seed(seed)
        for spec in manifest.tensors:
            values = view(region, spec)
            if values.ndim == 1:
                values.fill_(1.0)
            else:  # large enough that logits differ, small enough that activations stay finite in bf16
                values.normal_(0.0, 0.7 / values.shape[1] ** 0.5, generator=generator)
        for spec in manifest.buffers:
            view(region, spec).copy_(buffers[spec.name])
        if device.type == "cuda":
            torch.cuda.synchronize()
        del region, values
        publication = draft.publish()
    with publication:
        yield RandomBackbone(publication, manifest)


def view(region: Tensor, spec: TensorSpec) -> Tensor:
    return region[spec.offset : spec.offset + spec.size].view(getattr(torch, spec.dtype)).view(spec.shape)


def seal_manifest(manifest: Manifest) -> int:
    """A descriptor, the caller's."""
    return manifests.seal(manifest)


def _specs(offsets: dict[str, int], shapes: dict[str, TensorShape]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, shapes[name].shape, shapes[name].dtype, offset, shapes[name].size)
        for name, offset in offsets.items()
    )


def _shape(tensor: Tensor) -> TensorShape:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorShape(tuple(tensor.shape), dtype, tensor.numel() * tensor.element_size())
