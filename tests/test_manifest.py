"""Manifests: through memory and back, and refused when they do not hold together."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import sealed
from serverlesslora_ipc.manifest import Manifest, ManifestInvalid, TensorSpec

MANIFEST = Manifest(
    model="some/model",
    architecture="LlamaForCausalLM",
    config='{"hidden_size": 8}',
    generation_config="{}",
    dtype="bfloat16",
    tensors=(TensorSpec("a.weight", (2, 8), "bfloat16", 0, 32), TensorSpec("b.weight", (2, 8), "bfloat16", 32, 32)),
    buffers=(TensorSpec("inv_freq", (4,), "float32", 64, 16),),
    aliases={"lm_head.weight": "a.weight"},
    total_bytes=80,
    content_digest="0" * 32,
)


def through_memory(manifest: Manifest) -> Manifest:
    fd = manifests.seal(manifest)
    try:
        sealed.check_sealed(fd)
        return manifests.read(fd)
    finally:
        os.close(fd)


def test_through_memory_and_back() -> None:
    assert through_memory(MANIFEST) == MANIFEST


def test_layout_digest_is_about_layout_only() -> None:
    other_weights = msgspec.structs.replace(MANIFEST, content_digest="1" * 32, model="elsewhere", tokenizer="x")
    assert other_weights.layout_digest == MANIFEST.layout_digest
    changes: tuple[dict[str, Any], ...] = (
        {"config": "{}"},
        {"tensors": MANIFEST.tensors[:1]},
        {"aliases": {}},
        {"dtype": "float32"},
    )
    for change in changes:
        assert msgspec.structs.replace(MANIFEST, **change).layout_digest != MANIFEST.layout_digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"total_bytes": 79}, "tensors end at 80"),
        ({"buffers": (TensorSpec("inv_freq", (4,), "float32", 63, 16),)}, "inv_freq overlaps"),
        ({"tensors": (TensorSpec("a", (1,), "float32", -4, 4),)}, "a overlaps"),
    ],
)
def test_overlaps_and_overruns_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ManifestInvalid, match=reason):
        through_memory(msgspec.structs.replace(MANIFEST, **change))


def test_something_else_is_refused() -> None:
    fd = sealed.seal_bytes("test", b"\x93\x01\x02\x03")
    with pytest.raises(ManifestInvalid, match="not a manifest"):
        manifests.read(fd)
    os.close(fd)
