"""The backbone host's second life: a process without torch that holds the memory, hands it out and verifies it.

Run as `python -m serverlesslora.backbone.hold --fd N`; the memory comes with an Adopt message, or with the process.
What is held is behind a protocol: `device_host` lives by the same loop with memory on a device.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import xxhash

from serverlesslora import logs
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import process, sealed
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.frames import close_fds
from serverlesslora_ipc.manifest import Manifest, ManifestInvalid
from serverlesslora_ipc.messages import (
    Adopt,
    Attach,
    BackboneFailed,
    GatewayToHost,
    HostToGateway,
    Published,
    Shutdown,
    Verified,
    Verify,
)
from serverlesslora_ipc.sealed import NotSealed

_WATCHED_SHARE = 0.008  # of the time
_SLICE_BYTES = 4 << 20  # read between two looks at the channel; also what verification adds to this process


class Verification(Protocol):
    """The content digest recomputed slice by slice, so that the channel is never left waiting."""

    def step(self) -> Verified | None:
        """Reads one slice; the answer after the last."""

    def close(self) -> None:
        """Gives back what reading took."""


class Held(Protocol):
    @property
    def manifest(self) -> Manifest: ...

    @property
    def published(self) -> Published: ...

    @property
    def fds(self) -> Sequence[int]:
        """What travels with `published`."""

    @property
    def must_be_watched(self) -> bool:
        """Others could write this memory: it is verified while nothing else is to be done."""

    def begin_verification(self) -> Verification: ...


class HeldHost(NamedTuple):
    """Sealed memory: nobody can write it."""

    weights_fd: int
    manifest_fd: int
    manifest: Manifest
    seconds: float  # what loading (or adopting) took
    libraries_s: float = 0.0  # of `seconds`: importing what loads

    @property
    def published(self) -> Published:
        return Published(
            size_bytes=self.manifest.total_bytes,
            layout_digest=self.manifest.layout_digest,
            content_digest=self.manifest.content_digest,
            seconds=self.seconds,
            libraries_s=self.libraries_s,
        )

    @property
    def fds(self) -> Sequence[int]:
        return self.weights_fd, self.manifest_fd

    @property
    def must_be_watched(self) -> bool:
        return False

    def begin_verification(self) -> Verification:
        return _HostVerification(self.weights_fd, self.manifest)


def hold(weights_fd: int, manifest_fd: int, seconds: float) -> HeldHost:
    """Checks what it takes; raises NotSealed or ManifestInvalid."""
    for fd in (weights_fd, manifest_fd):
        sealed.check_sealed(fd)
    manifest = manifests.read(manifest_fd)
    if os.fstat(weights_fd).st_size != manifest.total_bytes:
        raise ManifestInvalid("the manifest belongs to other weights")
    return HeldHost(weights_fd, manifest_fd, manifest, seconds)


def adopt(fds: Sequence[int]) -> HeldHost:
    started = time.monotonic()
    weights_fd, manifest_fd = fds
    held = hold(weights_fd, manifest_fd, seconds=0.0)
    return held._replace(seconds=time.monotonic() - started)


class _HostVerification:
    """Reads through the descriptor instead of a map: no page tables grow, and the process stays as small as it is."""

    def __init__(self, weights_fd: int, manifest: Manifest) -> None:
        self._weights_fd = weights_fd
        self._manifest = manifest
        self._digest = xxhash.xxh3_128()
        self._buffer = bytearray(min(_SLICE_BYTES, manifest.total_bytes))
        self._done = 0

    def step(self) -> Verified | None:
        with memoryview(self._buffer) as view:
            size = os.preadv(self._weights_fd, [view], self._done)
            self._digest.update(view[:size])
        self._done += size
        if size and self._done < self._manifest.total_bytes:
            return None
        return verdict(self._digest.hexdigest(), self._manifest)

    def close(self) -> None:
        self._buffer = bytearray()


def verdict(digest: str, manifest: Manifest) -> Verified:
    return Verified(content_digest=digest, intact=digest == manifest.content_digest)


class Watch:
    """Goes round and round memory that others could write, with a pause after each slice that is as much longer than
    the slice took as _WATCHED_SHARE is small. It ends with the first alteration it finds."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._round = held.begin_verification()
        self.pause_s = 0.0

    def step(self) -> Verified | None:
        """The alteration, once it is found."""
        started = time.monotonic()
        verified = self._round.step()
        if verified is not None:
            self._round.close()
            if not verified.intact:
                return verified
            self._round = self._held.begin_verification()
        self.pause_s = (time.monotonic() - started) / _WATCHED_SHARE
        return None

    def close(self) -> None:
        self._round.close()


def main_loop(
    channel: Channel[GatewayToHost], held: Held | None, adopt: Callable[[Sequence[int]], Held] = adopt
) -> None:
    """Returns on Shutdown; raises ChannelClosed when the gateway is gone. `adopt` takes over the descriptors."""
    verification: Verification | None = None
    watch = Watch(held) if held is not None and held.must_be_watched else None
    while True:
        if verification is not None and not channel.poll():
            verified = verification.step()
            if verified is not None:
                verification.close()
                verification = None
                channel.send([verified])
            continue
        if watch is not None and not channel.poll(watch.pause_s):
            altered = watch.step()
            if altered is not None:
                watch = None
                channel.send([altered])
            continue
        messages, fds = channel.receive()
        for message in messages:
            match message:
                case Shutdown():
                    return
                case Adopt() if held is None and len(fds) == 2:
                    held, fds = adopt(fds), []
                    watch = Watch(held) if held.must_be_watched else None
                    _answer(channel, held)
                case Attach() if held is not None:
                    _answer(channel, held)
                case Verify() if held is not None:
                    verification = verification or held.begin_verification()
                case _:
                    refuse(channel, f"{type(message).__name__} does not fit here: {_state(held)}")
        close_fds(fds)


def _answer(channel: Channel[GatewayToHost], held: Held) -> None:
    channel.send([held.published], fds=held.fds)


def refuse(channel: Channel[GatewayToHost], reason: str) -> None:
    answer: HostToGateway = BackboneFailed(reason=reason)
    channel.send([answer])


def _state(held: Held | None) -> str:
    return "no backbone is held yet" if held is None else f"{held.manifest.model} is held already"


def main(argv: Sequence[str]) -> int:
    options = {"--seconds": "0", "--libraries-seconds": "0"}
    held_fds: list[int] = []
    arguments = list(argv)
    while arguments:  # argparse would cost a tenth of this process's memory
        name = arguments.pop(0)
        if name == "--held":
            held_fds = [int(arguments.pop(0)), int(arguments.pop(0))]
        else:
            options[name] = arguments.pop(0)
    process.die_with_parent()
    process.leave_signals_to_the_gateway()
    process.set_name("slora-backbone")
    logs.set_up_child()
    process.set_oom_score(-500)
    channel: Channel[GatewayToHost] = Channel.inherited(int(options["--fd"]), GatewayToHost)
    for fd in held_fds:
        os.set_inheritable(fd, False)
    try:
        held = None
        if held_fds:
            held = hold(held_fds[0], held_fds[1], seconds=float(options["--seconds"]))
            held = held._replace(libraries_s=float(options["--libraries-seconds"]))
        main_loop(channel, held)
    except ChannelClosed:
        return 0
    except (NotSealed, ManifestInvalid) as error:
        refuse(channel, f"the memory cannot be held: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
