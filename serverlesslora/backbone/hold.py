"""The backbone host's second life: a process without torch that holds the memory, hands it out and verifies it.

Run as `python -m serverlesslora.backbone.hold --fd N`; the memory comes with an Adopt message, or with the process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

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

_SLICE_BYTES = 4 << 20  # read between two looks at the channel; also what verification adds to this process


class Held(NamedTuple):
    weights_fd: int
    manifest_fd: int
    manifest: Manifest
    seconds: float  # what loading (or adopting) took

    @property
    def published(self) -> Published:
        return Published(
            size_bytes=self.manifest.total_bytes,
            layout_digest=self.manifest.layout_digest,
            content_digest=self.manifest.content_digest,
            seconds=self.seconds,
        )


def hold(weights_fd: int, manifest_fd: int, seconds: float) -> Held:
    """Checks what it takes; raises NotSealed or ManifestInvalid."""
    for fd in (weights_fd, manifest_fd):
        sealed.check_sealed(fd)
    manifest = manifests.read(manifest_fd)
    if os.fstat(weights_fd).st_size != manifest.total_bytes:
        raise ManifestInvalid("the manifest belongs to other weights")
    return Held(weights_fd, manifest_fd, manifest, seconds)


class Verification:
    """Recomputes the content digest slice by slice, so that the channel is never left waiting.

    It reads through the descriptor instead of a map: no page tables grow, and the process stays as small as it is.
    """

    def __init__(self, held: Held) -> None:
        self._held = held
        self._digest = xxhash.xxh3_128()
        self._buffer = bytearray(min(_SLICE_BYTES, held.manifest.total_bytes))
        self._done = 0

    def step(self) -> Verified | None:
        with memoryview(self._buffer) as view:
            size = os.preadv(self._held.weights_fd, [view], self._done)
            self._digest.update(view[:size])
        self._done += size
        if size and self._done < self._held.manifest.total_bytes:
            return None
        digest = self._digest.hexdigest()
        return Verified(content_digest=digest, intact=digest == self._held.manifest.content_digest)


def main_loop(channel: Channel[GatewayToHost], held: Held | None) -> None:
    """Returns on Shutdown; raises ChannelClosed when the gateway is gone."""
    verification: Verification | None = None
    while True:
        if verification is not None and not channel.poll():
            verified = verification.step()
            if verified is not None:
                verification = None
                channel.send([verified])
            continue
        messages, fds = channel.receive()
        for message in messages:
            match message:
                case Shutdown():
                    return
                case Adopt() if held is None and len(fds) == 2:
                    started = time.monotonic()
                    held = hold(fds[0], fds[1], seconds=0.0)
                    held = held._replace(seconds=time.monotonic() - started)
                    fds = []
                    _answer(channel, held)
                case Attach() if held is not None:
                    _answer(channel, held)
                case Verify() if held is not None:
                    verification = verification or Verification(held)
                case _:
                    _refuse(channel, f"{type(message).__name__} does not fit here: {_state(held)}")
        close_fds(fds)


def _answer(channel: Channel[GatewayToHost], held: Held) -> None:
    channel.send([held.published], fds=[held.weights_fd, held.manifest_fd])


def _refuse(channel: Channel[GatewayToHost], reason: str) -> None:
    answer: HostToGateway = BackboneFailed(reason=reason)
    channel.send([answer])


def _state(held: Held | None) -> str:
    return "no backbone is held yet" if held is None else f"{held.manifest.model} is held already"


def main(argv: Sequence[str]) -> int:
    options = {"--seconds": "0"}
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
    process.set_oom_score(-500)
    channel: Channel[GatewayToHost] = Channel.inherited(int(options["--fd"]), GatewayToHost)
    for fd in held_fds:
        os.set_inheritable(fd, False)
    try:
        held = hold(held_fds[0], held_fds[1], seconds=float(options["--seconds"])) if held_fds else None
        main_loop(channel, held)
    except ChannelClosed:
        return 0
    except (NotSealed, ManifestInvalid) as error:
        _refuse(channel, f"the memory cannot be held: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
