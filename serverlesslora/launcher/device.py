"""The launcher's work for a GPU, divided at the fork: what is made before it, and what each process must do itself.

`prepare` runs in the launcher: it imports, builds the module tree on the meta device and reads the tokenizer.
`rehearse` runs in a spare: it starts the driver, maps the backbone, loads and compiles kernels, answers once and
captures graphs. `run` is a worker's life; it does what no spare has done for it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from serverlesslora.backbone.attach import assign, build_tree
from serverlesslora.backbone.device_map import map_backbone
from serverlesslora.engine.cuda import device as _  # noqa: F401  (imported before the fork, not by each worker)
from serverlesslora.engine.device import open_device
from serverlesslora.engine.engine import FORGET_AFTER_S, Engine
from serverlesslora.engine.lora import LoraModel
from serverlesslora.engine.shortcuts import take_shortcuts
from serverlesslora.launcher.prepared import BuiltBackbone, PreparedBackbone, answer_once, text_codec
from serverlesslora.worker import main as worker
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc.cuda.driver import DeviceKind, open_driver
from serverlesslora_ipc.messages import Fork, Sharing, WorkerLimits

# More rows than decode ever has: so prefill's kernels are loaded too.
WARM_UP_TOKENS = 80
EMULATED_WARM_UP_TOKENS = 4  # the interpreter takes its time for every row


@dataclass(frozen=True)
class DevicePrepared(BuiltBackbone):
    """Made once in the launcher; `model` is on the meta device until a process of its own has mapped the backbone."""

    kind: DeviceKind
    weights_fd: int | None  # kept open for the processes that import it
    sharing: Sharing
    handle: bytes


def prepare(
    backbone: str,
    weights_fd: int | None,
    manifest_fd: int,
    sharing: Sharing,
    handle: bytes = b"",
    *,
    kind: DeviceKind = "cuda",
) -> DevicePrepared:
    """Takes over the descriptors. Touches no driver and starts no thread, so that the process can be forked."""
    torch.set_num_threads(1)
    try:
        manifest = manifests.read(manifest_fd)
    finally:
        os.close(manifest_fd)
    model = build_tree(manifest, attention="eager")  # each worker's engine puts its own in its place
    return DevicePrepared(
        backbone=backbone,
        manifest=manifest,
        model=model,
        text=text_codec(manifest, model),
        kind=kind,
        weights_fd=weights_fd,
        sharing=sharing,
        handle=handle,
    )


def rehearse(prepared: DevicePrepared, limits: WorkerLimits, lease_fd: int | None = None) -> PreparedBackbone:
    """Everything a worker with these limits needs. There is no lease on a device: it shares its time by itself."""
    return _make_ready(prepared, limits, warms_up=True)


def run(
    connection: socket.socket,
    prepared: DevicePrepared | PreparedBackbone,
    fork: Fork,
    *,
    lease_fd: int | None = None,
    cores: Collection[int] = (),
) -> int:
    """Returns the exit code of the process."""
    started = time.monotonic()
    if isinstance(prepared, DevicePrepared):
        # Who wants no spare only looks at an adapter: nobody waits for what a warm-up would make faster.
        prepared = _make_ready(prepared, fork.limits, warms_up=fork.may_be_spare)
    return worker.run(connection, prepared, fork, cores=cores, started=started)


def _make_ready(prepared: DevicePrepared, limits: WorkerLimits, *, warms_up: bool) -> PreparedBackbone:
    torch.set_num_threads(limits.threads)
    driver = open_driver(prepared.kind)
    driver.start()
    device = open_device(prepared.kind, driver)
    mapped = map_backbone(
        driver, prepared.sharing, prepared.weights_fd, prepared.handle, prepared.manifest, device.torch_device
    )
    if prepared.weights_fd is not None:
        os.close(prepared.weights_fd)  # this process's copy; what is mapped stays
    model = prepared.model
    assign(model, mapped.region, prepared.manifest)
    lora = LoraModel(model, device)
    take_shortcuts(model, device)
    engine = Engine(model, lora, prepared.text, limits, time.monotonic, device)
    if warms_up:
        wanted = EMULATED_WARM_UP_TOKENS if prepared.kind == "emulated" else WARM_UP_TOKENS
        answer_once(engine, min(wanted, prepared.context_length - 2), prepared.vocab_size)
        engine.capture()
        _let_go(engine, prepared.kind)
    return PreparedBackbone(
        backbone=prepared.backbone,
        manifest=prepared.manifest,
        model=model,
        text=prepared.text,
        lora=lora,
        device=device,
        device_name=f"{prepared.kind} ({driver.device_name()})",
        mapped=mapped,
        engine=engine,
        is_rehearsed=warms_up,
    )


def _let_go(engine: Engine, kind: DeviceKind) -> None:
    """A spare is idle until somebody takes it: its KV blocks and what prefill used go back to the device."""
    engine.rest(FORGET_AFTER_S)
    if kind == "cuda":
        torch.cuda.empty_cache()
