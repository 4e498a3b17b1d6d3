"""A checkpoint streamed to the device by the backbone host, mapped by another process, verified, and adopted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.gpu.children import settled, steady
from bench.gpu.models import config_of, module_of, view
from bench.gpu.processes import Peer
from bench.gpu.record import Recorder
from bench.make_models import write_tokenizer
from serverlesslora.backbone.attach import assign, build_tree
from serverlesslora.backbone.device_map import map_backbone
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc.cuda.driver import Driver, open_driver
from serverlesslora_ipc.messages import Adopt, HostToGateway, Published, Shutdown, Verified, Verify

LEAK_TOLERANCE = 32 << 20  # this process's own context may have grown meanwhile
HOST = "serverlesslora.backbone.device_host"


def run(recorder: Recorder) -> None:
    setting = recorder.setting
    driver = open_driver(setting.kind)
    driver.start()
    torch.zeros(1, device=setting.torch_device)
    shape = "tiny" if setting.is_dry else "1b"
    checkpoint = setting.scratch / "checkpoint"
    size = write_checkpoint(checkpoint, shape)
    print(f"a checkpoint of {size / 1e9:.2f} GB is written", flush=True)
    recorder.part("load, attach, verify, adopt", lambda: _Proof(recorder, driver, checkpoint, size).run())
    driver.stop()


def write_checkpoint(directory: Path, shape: str) -> int:
    """Bytes of weights. Written by many at once it would be quicker; this is not what is measured."""
    module = module_of(shape, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(1 << 20, generator=generator).mul_(0.02).bfloat16()  # random enough, and soon made
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        if name == "lm_head.weight" and module.config.tie_word_embeddings:
            continue
        repeats = -(-parameter.numel() // pattern.numel())
        values = pattern.repeat(repeats)[: parameter.numel()].view(parameter.shape)
        tensors[name] = values.roll(len(tensors) + 1, 0).contiguous()  # no two tensors begin alike
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = config_of(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    write_tokenizer(directory, config.vocab_size)
    return sum(tensor.nbytes for tensor in tensors.values())


class _Proof:
    def __init__(self, recorder: Recorder, driver: Driver, checkpoint: Path, size: int) -> None:
        self._recorder = recorder
        self._driver = driver
        self._checkpoint = checkpoint
        self._size = size
        self._setting = recorder.setting

    def run(self) -> None:
        before = steady(lambda: self._driver.memory().free_bytes)
        arguments = ["--device", self._setting.kind]
        began = time.perf_counter()
        with Peer(HOST, [*arguments, "--model", str(self._checkpoint)], HostToGateway) as host:
            published, fds = host.wait_for(Published)
            elapsed = time.perf_counter() - began
            *weights, manifest_fd = fds
            weights_fd = weights[0] if weights else None
            limit = self._setting.limits.get("h2d_gb_s")
            rate = self._size / published.seconds / 1e9
            self._recorder.number("load: from files to device memory", rate, "GB/s", floor=limit, higher_is_better=True)
            self._recorder.number("load: from process start to published", elapsed, "s")
            self._verify(host)
            self._attach(published, weights_fd, manifest_fd, host)
        for fd in fds:
            os.close(fd)
        if not self._setting.is_dry:
            torch.cuda.empty_cache()
        tolerance = 0 if self._setting.is_dry else LEAK_TOLERANCE
        lost = before - settled(lambda: self._driver.memory().free_bytes, before, tolerance)
        self._recorder.check("hosts gone: nothing leaked", abs(lost) <= tolerance, f"{lost / 1e6:.1f} MB")

    def _verify(self, host: Peer) -> None:
        began = time.perf_counter()
        host.send(Verify())
        verified, _ = host.wait_for(Verified)
        self._recorder.check("the digest of the device's bytes is that of the loaded ones", verified.intact)
        rate = self._size / (time.perf_counter() - began) / 1e9
        self._recorder.number(
            "verification of the whole region", rate, "GB/s", floor=self._setting.limits.get("d2h_gb_s")
        )

    def _attach(self, published: Published, weights_fd: int | None, manifest_fd: int, host: Peer) -> None:
        manifest = manifests.read(manifest_fd)
        device = self._setting.torch_device
        model = build_tree(manifest, attention="sdpa")
        began = time.perf_counter()
        mapped = map_backbone(self._driver, published.sharing, weights_fd, published.handle, manifest, device)
        assign(model, mapped.region, manifest)
        self._recorder.number("attach: descriptor to usable model", (time.perf_counter() - began) * 1e3, "ms")
        self._right("the device holds what the files hold", mapped.region, manifest)
        if published.sharing != "cuda-ipc":
            assert weights_fd is not None
            host.kill()
            self._right("still, when the host was killed", mapped.region, manifest)
            began = time.perf_counter()
            with Peer(HOST, ["--device", self._setting.kind], HostToGateway) as successor:
                successor.send(Adopt(), [weights_fd, manifest_fd])
                again, fds = successor.wait_for(Published)
                for fd in fds:
                    os.close(fd)
                same = (again.content_digest, again.sharing) == (published.content_digest, published.sharing)
                self._recorder.check("a new host adopts the memory", same, f"{time.perf_counter() - began:.2f} s")
                self._verify(successor)
                successor.send(Shutdown())
        del model
        mapped.close()

    def _right(self, name: str, region: torch.Tensor, manifest: manifests.Manifest) -> None:
        tensors = load_file(self._checkpoint / "model.safetensors")
        wrong = [
            spec.name for spec in manifest.tensors if not torch.equal(view(region, spec).cpu(), tensors[spec.name])
        ]
        self._recorder.check(name, not wrong, f"{len(wrong)} of {len(manifest.tensors)} tensors differ: {wrong[:3]}")
