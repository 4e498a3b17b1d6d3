"""Streaming a checkpoint gives the bytes that transformers would, or it declines by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from serverlesslora.backbone import destination, loader, stream
from serverlesslora.backbone.destination import DeviceDestination, HostDestination, Piece, fill
from serverlesslora.backbone.loader import BackboneInvalid, LoadReport
from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.cuda.emulated import DEVICE_VARIABLE
from serverlesslora_ipc.cuda.region import RegionDraft
from serverlesslora_ipc.manifest import Manifest
from serverlesslora_ipc.sealed import Draft
from tests.fakes import FAMILIES, tiny_model

CONVERTED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"}  # one tensor per expert in the files


class Loaded(NamedTuple):
    manifest: Manifest
    content: bytes
    report: LoadReport


def read(directory: Path, dtype: str = "bfloat16", *, streams: bool = True) -> Loaded:
    found = loader.contents(str(directory), dtype=dtype, streams=streams)
    with Draft("slora-test", found.manifest.total_bytes) as draft:
        manifest, report = found.place(HostDestination(draft))
        return Loaded(manifest, draft.map[:], report)


def check_equal(directory: Path, dtype: str = "bfloat16") -> LoadReport:
    """How it was loaded; what was loaded is what transformers gives."""
    streamed, plain = read(directory, dtype), read(directory, dtype, streams=False)
    assert plain.report.path == "transformers"
    assert streamed.manifest == plain.manifest
    assert streamed.content == plain.content
    return streamed.report


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        report = check_equal(tmp_path, dtype)
        assert report.path == ("transformers" if family in CONVERTED else "stream"), report.declined
        assert ("transformers converts" in report.declined) == (family in CONVERTED)


def test_a_parameter_of_another_type_than_the_model_is_left_to_transformers(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    report = check_equal(tmp_path, "float16")
    assert report.path == "transformers"
    assert report.declined.endswith("is converted")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Tensors added, replaced or (None) left out; names with `/` for `.`"""
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("/", "."), None)
        if value is not None:
            tensors[name.replace("/", ".")] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_shards(tmp_path: Path) -> None:
    tiny_model("llama:tied_bias").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert check_equal(tmp_path).path == "stream"


def test_types_are_mixed_in_the_files(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    mixed = {
        name: value.to((torch.float64, torch.float16, torch.bfloat16)[i % 3])
        for i, (name, value) in enumerate(tensors.items())
    }
    save_file(mixed, llama / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "bfloat16", "float16"):
        assert check_equal(llama, dtype).path == "stream"


def test_names_without_the_prefix_of_the_model(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(renamed, llama / "model.safetensors", metadata={"format": "pt"})
    assert check_equal(llama).path == "stream"


def test_tensors_that_the_model_is_known_to_ignore(llama: Path) -> None:
    rewrite(llama, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert check_equal(llama).path == "stream"


def test_tensors_that_the_model_does_not_know(llama: Path) -> None:
    rewrite(llama, extra=torch.ones(4))
    report = check_equal(llama)
    assert (report.path, report.declined) == ("transformers", "unexpected keys: extra")


def test_weights_in_a_file_that_the_config_names(llama: Path) -> None:
    doubled = {name: 2 * value for name, value in load_file(llama / "model.safetensors").items()}
    save_file(doubled, llama / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert check_equal(llama).declined == "the config names other files"


def test_tied_parameters_that_are_both_in_the_files(tmp_path: Path) -> None:
    """Whether transformers ties them depends on what they contain, which streaming never sees."""
    tiny_model("llama:tied_bias").save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding + 1):
        rewrite(tmp_path, **{"lm_head.weight": head})
        assert check_equal(tmp_path).declined == "lm_head.weight is in the files and not used"


def test_without_a_generation_config(llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"temperature": 0.25}))
    assert check_equal(llama).path == "stream"


def test_what_is_wrong_is_said_by_transformers(llama: Path) -> None:
    rewrite(llama, **{"model.norm.weight": None})
    with pytest.raises(BackboneInvalid, match=r"lacks 1 weights .*model\.norm\.weight"):
        read(llama)
    rewrite(llama, **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(BackboneInvalid, match=r"model\.norm\.weight"):
        read(llama)


@pytest.mark.parametrize("bytes_kept", [0, 7, 100, 5000])
def test_a_truncated_file_is_refused(llama: Path, bytes_kept: int) -> None:
    os.truncate(llama / "model.safetensors", bytes_kept)
    with pytest.raises(BackboneInvalid, match="cannot be loaded"):
        read(llama)


def test_placeholders_take_no_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stored = {"huge": stream._Stored(torch.zeros(1), (1 << 20, 1 << 16))}
    before = resident()
    placeholders = stream._placeholders(stored, torch.bfloat16)
    assert placeholders["huge"].nbytes == 1 << 37
    assert resident() - before < 4 << 20


# --- destinations ------------------------------------------------------------------------------------------------


class Pattern:
    """Bytes that tell where they come from."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def read_into(self, target: torch.Tensor, start: int) -> None:
        target.copy_((torch.arange(start, start + len(target)) * 7 + self._seed) % 251 + 1)


def expected(pieces: list[Piece], size: int) -> bytes:
    region = bytearray(size)
    for seed, piece in enumerate(pieces):
        region[piece.offset : piece.end] = bytes((i * 7 + seed) % 251 + 1 for i in range(piece.size))
    return bytes(region)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setenv(DEVICE_VARIABLE, f"stream-{os.getpid()}")
    driver = open_driver("emulated")
    driver.start()
    yield driver
    assert driver.memory().free_bytes == driver.memory().total_bytes
    driver.stop()


@pytest.mark.parametrize("places", [[(0, 1000)], [(0, 10), (64, 300), (364, 20), (640, 128)], [(200, 1), (999, 1)], []])
@pytest.mark.parametrize("slice_bytes", [64, 256, 4096])
def test_slices_do_not_show(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, places: list[tuple[int, int]], slice_bytes: int
) -> None:
    monkeypatch.setattr(destination, "SLICE_BYTES", slice_bytes)
    size = 1000
    pieces = [Piece(offset, length, Pattern(seed)) for seed, (offset, length) in enumerate(places)]
    seen: list[tuple[int, int]] = []
    with Draft("slora-test", size) as draft:
        digest = fill(HostDestination(draft), list(pieces), lambda done, total: seen.append((done, total)))
        assert draft.map[:] == expected(pieces, size)
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    with RegionDraft(driver, size) as region:
        with DeviceDestination(driver, region.address, size) as on_device:
            assert fill(on_device, list(pieces), lambda done, total: None) == digest
        publication = region.publish()
    with publication, driver.pinned(size) as buffer:
        assert publication.read_into(0, buffer) == size
        assert bytes(buffer.view) == expected(pieces, size)


def test_a_failure_while_filling_gives_everything_back(driver: Driver) -> None:
    class Broken:
        def read_into(self, target: torch.Tensor, start: int) -> None:
            raise OSError("no more")

    with (
        RegionDraft(driver, 100) as region,
        pytest.raises(OSError, match="no more"),
        DeviceDestination(driver, region.address, 100) as on_device,
    ):
        fill(on_device, [Piece(0, 10, Broken())], lambda done, total: None)


def test_slices_are_cut_through_converted_tensors(llama: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(llama)
    monkeypatch.setattr(destination, "SLICE_BYTES", 192)
    assert read(llama).content == whole.content
    loaded = loader.load_to_device(str(llama), driver)
    assert loaded.manifest == whole.manifest
    assert loaded.report.path == "stream"
    assert "GB by stream: " in str(loaded.report)
    loaded.publication.close()
    os.close(loaded.manifest_fd)
