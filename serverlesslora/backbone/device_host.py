"""The backbone host on a device: load into device memory, publish it, hold it, hand it out and verify it.

Run as `python -m serverlesslora.backbone.device_host --fd N --device cuda|emulated [--model PATH]`; without a model it
waits for an Adopt message. It speaks as `host` and `hold` do, in one life: where memory is shared by handle, it would
not survive another program in its place.

Where the device guards the memory, the host keeps only the descriptor, which holds it: no mapping, and no context but
while it verifies. Where workers could write, it watches. It does so by copying slices back and digesting them here,
not by a reduction on the device: the copy engine disturbs no kernel, nothing has to be compiled or loaded, and what is
compared is the very digest that was published.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import xxhash

from serverlesslora import logs
from serverlesslora.backbone import hold
from serverlesslora.backbone.host import failure_reason, progress_reporter
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import process, sealed
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.cuda import region
from serverlesslora_ipc.cuda.driver import Driver, DriverError, Pinned, open_driver
from serverlesslora_ipc.cuda.region import Publication
from serverlesslora_ipc.manifest import Manifest, ManifestInvalid
from serverlesslora_ipc.messages import BackboneFailed, GatewayToHost, Published, Sharing, Verified
from serverlesslora_ipc.sealed import NotSealed

log = logging.getLogger("serverlesslora.backbone")

_SLICE_BYTES = 32 << 20  # read between two looks at the channel
_NUM_BUFFERS = 2  # one is digested while the other is filled


class HeldDevice:
    """Owns the publication and the manifest's descriptor, and the driver's context."""

    def __init__(
        self, driver: Driver, publication: Publication, manifest_fd: int, manifest: Manifest, seconds: float
    ) -> None:
        self.manifest = manifest
        self._driver = driver
        self._sharing: Sharing = publication.sharing
        self._handle = publication.handle
        self._manifest_fd = manifest_fd
        self._seconds = seconds
        self._publication: Publication | None = publication
        self._weights_fd = None if publication.fd is None else os.dup(publication.fd)
        if not self.must_be_watched:
            publication.close()
            self._publication = None
            driver.stop()

    @property
    def published(self) -> Published:
        return Published(
            size_bytes=self.manifest.total_bytes,
            layout_digest=self.manifest.layout_digest,
            content_digest=self.manifest.content_digest,
            seconds=self._seconds,
            sharing=self._sharing,
            handle=self._handle,
        )

    @property
    def fds(self) -> Sequence[int]:
        return [self._manifest_fd] if self._weights_fd is None else [self._weights_fd, self._manifest_fd]

    @property
    def must_be_watched(self) -> bool:
        return self._sharing != "vmm"

    def begin_verification(self) -> hold.Verification:
        with ExitStack() as undo:
            publication = self._publication
            if publication is None:
                assert self._weights_fd is not None
                self._driver.start()
                undo.callback(self._driver.stop)
                publication = undo.enter_context(
                    region.adopt(self._driver, self._weights_fd, self.manifest.total_bytes)
                )
            return _DeviceVerification(self._driver, publication, self.manifest, undo)


class _DeviceVerification:
    def __init__(self, driver: Driver, publication: Publication, manifest: Manifest, undo: ExitStack) -> None:
        self._driver = driver
        self._address = publication.address
        self._manifest = manifest
        self._digest = xxhash.xxh3_128()
        self._asked = 0  # bytes whose copy was started
        self._under_way: deque[tuple[Pinned, int, int]] = deque()  # buffer, stream, bytes
        self._undo = ExitStack()
        size = min(_SLICE_BYTES, manifest.total_bytes)
        for _ in range(_NUM_BUFFERS):
            stream = driver.create_stream()
            undo.callback(driver.destroy_stream, stream)
            self._copy(undo.enter_context(driver.pinned(size)), stream)
        self._undo = undo.pop_all()

    def step(self) -> Verified | None:
        if self._under_way:
            buffer, stream, size = self._under_way.popleft()
            self._driver.synchronize(stream)
            self._digest.update(buffer.view[:size])
            self._copy(buffer, stream)
        if self._under_way:
            return None
        return hold.verdict(self._digest.hexdigest(), self._manifest)

    def close(self) -> None:
        for _, stream, _ in self._under_way:
            self._driver.synchronize(stream)
        self._under_way.clear()
        self._undo.close()

    def _copy(self, buffer: Pinned, stream: int) -> None:
        size = min(buffer.size, self._manifest.total_bytes - self._asked)
        if size > 0:
            self._driver.copy_out(buffer.address, self._address + self._asked, size, stream)
            self._under_way.append((buffer, stream, size))
            self._asked += size


def adopter(driver: Driver) -> Callable[[Sequence[int]], HeldDevice]:
    def adopt(fds: Sequence[int]) -> HeldDevice:
        """The memory is mapped once, which proves that it is device memory of the right size."""
        started = time.monotonic()
        weights_fd, manifest_fd = fds
        sealed.check_sealed(manifest_fd)
        manifest = manifests.read(manifest_fd)
        driver.start()
        publication = region.adopt(driver, weights_fd, manifest.total_bytes)
        os.close(weights_fd)
        return HeldDevice(driver, publication, manifest_fd, manifest, time.monotonic() - started)

    return adopt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serverlesslora.backbone.device_host")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--device", required=True, choices=["cuda", "emulated"])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--revision")
    parser.add_argument("--allow-pickle", action="store_true")
    options = parser.parse_args(argv)
    process.die_with_parent()
    process.leave_signals_to_the_gateway()
    process.set_name("slora-backbone")
    logs.set_up_child()
    channel: Channel[GatewayToHost] = Channel.inherited(options.fd, GatewayToHost)
    process.exit_on_hangup(options.fd)
    try:
        driver = open_driver(options.device)
        held = None
        if options.model is not None:
            held = _load(channel, driver, options)
            channel.send([held.published], fds=held.fds)
        process.set_oom_score(-500)
        hold.main_loop(channel, held, adopter(driver))
    except ChannelClosed:
        return 0
    except DriverError as error:
        channel.send([BackboneFailed(reason=f"the device refuses: {error}")])
        return 1
    except (NotSealed, ManifestInvalid) as error:
        channel.send([BackboneFailed(reason=f"the memory cannot be held: {error}")])
        return 1
    except BaseException as error:
        channel.send([BackboneFailed(reason=failure_reason(error))])
        return 1
    return 0


def _load(channel: Channel[GatewayToHost], driver: Driver, options: argparse.Namespace) -> HeldDevice:
    from serverlesslora.backbone import loader  # imports torch, which adopting can do without

    driver.start()
    loaded = loader.load_to_device(
        options.model,
        driver,
        dtype=options.dtype,
        revision=options.revision,
        allow_pickle=options.allow_pickle,
        progress=progress_reporter(channel),
    )
    if loaded.publication.reason:
        log.warning("sharing by %s: %s", loaded.publication.sharing, loaded.publication.reason)
    log.info("%s: %s", options.model, loaded.report)
    held = HeldDevice(driver, loaded.publication, loaded.manifest_fd, loaded.manifest, loaded.report.seconds)
    gc.collect()  # the module tree refers to itself
    return held


if __name__ == "__main__":
    sys.exit(main())
