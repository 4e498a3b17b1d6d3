"""Workers that do not share: forked as others are, each first copies the weights into memory of its own.

A spare copies while nobody waits for it; the worker it becomes has its copy already.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Collection

from serverlesslora.backbone.private import make_private
from serverlesslora.launcher import prepared as shared
from serverlesslora.launcher.prepared import PreparedBackbone
from serverlesslora.worker import main as worker
from serverlesslora_ipc.messages import Fork, Sharing, WorkerLimits


def prepare(
    backbone: str, weights_fd: int | None, manifest_fd: int, sharing: Sharing = "memfd", handle: bytes = b""
) -> PreparedBackbone:
    """As for workers that share; the memory's descriptor stays open for those who will copy it."""
    assert weights_fd is not None
    kept_fd = os.dup(weights_fd)
    try:
        prepared = shared.prepare(backbone, weights_fd, manifest_fd, sharing, handle)
    except BaseException:
        os.close(kept_fd)
        raise
    return dataclasses.replace(prepared, weights_fd=kept_fd)


def rehearse(
    prepared: PreparedBackbone, limits: WorkerLimits, *, lease_fd: int | None = None, cores: Collection[int] = ()
) -> PreparedBackbone:
    """What a spare does: nobody waits for its copy, so it is not counted as anybody's start."""
    copied = _with_own_copy(prepared, limits, lease_fd, cores)
    return worker.rehearse(dataclasses.replace(copied, copy_s=0.0), limits, lease_fd=lease_fd)


def run(
    connection: socket.socket,
    prepared: PreparedBackbone,
    fork: Fork,
    *,
    lease_fd: int | None = None,
    cores: Collection[int] = (),
) -> int:
    """Returns the exit code of the process."""
    if not prepared.is_rehearsed:
        prepared = _with_own_copy(prepared, fork.limits, lease_fd, cores)
    return worker.run(connection, prepared, fork, lease_fd=lease_fd, cores=cores)


def _with_own_copy(
    prepared: PreparedBackbone, limits: WorkerLimits, lease_fd: int | None, cores: Collection[int]
) -> PreparedBackbone:
    started = time.monotonic()
    assert prepared.weights is not None
    assert prepared.weights_fd is not None
    lease = worker.open_lease(lease_fd)
    make_private(prepared.weights, prepared.weights_fd, threads=limits.threads, cores=cores, turn=lease.turn)
    lease.close()
    os.close(prepared.weights_fd)  # the launcher's stays
    return dataclasses.replace(prepared, weights_fd=None, copy_s=time.monotonic() - started)
