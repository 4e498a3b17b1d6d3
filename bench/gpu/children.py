"""Processes that do as they are told over a socket, descriptors included: the other side of the sharing protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from bench.gpu.record import DeviceKind

_MAX_BYTES = 1 << 20


class ChildDied(Exception):
    """The child ended instead of answering."""


class Child:
    def __init__(self, kind: DeviceKind) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "bench.gpu.driver_child", kind, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._socket = ours

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, verb: str, fds: Sequence[int] = (), **arguments: Any) -> None:
        socket.send_fds(self._socket, [json.dumps([verb, arguments]).encode()], fds)

    def ask(self, verb: str, fds: Sequence[int] = (), *, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """The child's answer; what it raises is raised here."""
        self.tell(verb, fds, **arguments)
        return self.answer(timeout_s)[0]

    def answer(self, timeout_s: float = 60.0) -> tuple[Any, list[int]]:
        self._socket.settimeout(timeout_s)
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _MAX_BYTES, 4)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            raise ChildDied(f"exit status {self.process.wait(timeout_s)}")
        answer = json.loads(data)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"], fds

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """The child leaves when its socket ends; one that does not is ended."""
        self._socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def serve(connection: socket.socket, verbs: Any) -> int:
    """The child's loop: `verbs` has a method per verb, which takes descriptors and arguments."""
    while True:
        data, fds, _, _ = socket.recv_fds(connection, _MAX_BYTES, 4)
        if not data:
            return 0
        verb, arguments = json.loads(data)
        out: list[int] = []
        try:
            answer = {"value": getattr(verbs, verb)(fds, out, **arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        socket.send_fds(connection, [json.dumps(answer).encode()], out)
        for fd in fds:
            os.close(fd)


def settled(measure: Any, wanted: float, tolerance: float, timeout_s: float = 15.0) -> float:
    """`measure()` until it is within `tolerance` of `wanted`: what a dead process held comes back a moment later."""
    end = time.monotonic() + timeout_s
    while abs((value := float(measure())) - wanted) > tolerance and time.monotonic() < end:
        time.sleep(0.02)
    return value


def steady(measure: Any, quiet_s: float = 0.3, timeout_s: float = 5.0) -> int:
    """`measure()` once it stays as it is: what comes back from the dead must not be counted as given by the living."""
    value, since, end = int(measure()), time.monotonic(), time.monotonic() + timeout_s
    while time.monotonic() < min(since + quiet_s, end):
        time.sleep(0.02)
        if (now := int(measure())) != value:
            value, since = now, time.monotonic()
    return value
