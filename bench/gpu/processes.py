"""Our own processes (backbone host, launcher) as the gateway starts them, and their answers with a deadline."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from serverlesslora_ipc.channel import Channel
from serverlesslora_ipc.messages import BackboneFailed, LauncherFailed, Message

Wanted = TypeVar("Wanted", bound=Message)


class Peer:
    def __init__(self, module: str, arguments: Sequence[str], receives: Any) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", module, "--fd", str(theirs.fileno()), *arguments]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.channel: Channel[Any] = Channel(ours, receives)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        self.channel.send([message], fds)

    def wait_for(self, kind: type[Wanted], timeout_s: float = 120.0) -> tuple[Wanted, list[int]]:
        return wait_for(self.channel, kind, timeout_s)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.channel.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_for(channel: Channel[Any], kind: type[Wanted], timeout_s: float = 120.0) -> tuple[Wanted, list[int]]:
    """The next message of this kind and the descriptors of its frame; others are dropped, a failure is raised."""
    while channel.poll(timeout_s):
        messages, fds = channel.receive()
        for message in messages:
            if isinstance(message, kind):
                return message, list(fds)
            if isinstance(message, BackboneFailed | LauncherFailed):
                raise RuntimeError(message.reason)
        for fd in fds:
            os.close(fd)
    raise TimeoutError(f"no {kind.__name__} within {timeout_s:.0f} s")
