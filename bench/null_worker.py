"""A gateway whose workers compute nothing: the real server, with processes that answer by the clock behind it.

    python bench/null_worker.py serve --functions 8 --tokens-per-s 10     (prints its address, serves until a signal)

A worker speaks the real channel: what it says to all its requests in one tick travels in one frame, as after one step
of an engine. Token number n of a request is due n / rate seconds after its first, which comes at once.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serverlesslora.config import BackboneConfig, FunctionConfig, ServerConfig
from serverlesslora.gateway.backbone_facts import BackboneFacts
from serverlesslora.gateway.backbone_service import BackboneStatus
from serverlesslora.gateway.fleet import Fleet
from serverlesslora.gateway.server import Server
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora_ipc.channel import AsyncChannel, Channel, ChannelClosed
from serverlesslora_ipc.messages import (
    Abort,
    Aborted,
    Delta,
    Finished,
    GatewayToWorker,
    Generate,
    LoadAdapter,
    Loaded,
    Message,
    Ready,
    Shutdown,
    Started,
    WorkerToGateway,
)

BACKBONE = "null"
WORD = " token"
PROMPT_TOKENS = 8
TICK_S = 0.002  # what falls due within it is said together


class NullWorker:
    """Answers every request with `max_tokens` words."""

    def __init__(self, channel: Channel[GatewayToWorker], tokens_per_s: float) -> None:
        self._channel = channel
        self._interval_s = 1 / tokens_per_s
        self._due: list[tuple[float, str, int]] = []  # a heap of (when, request, number of the token)
        self._left: dict[str, int] = {}  # tokens

    def main_loop(self) -> None:
        self._channel.send([Ready(pid=os.getpid(), attach_s=0.0)])
        while True:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            if wait_s is None or self._channel.poll(wait_s + TICK_S):
                for message in self._channel.receive().messages:
                    self._hear(message)
            if said := self._say():
                self._channel.send(said)

    def _hear(self, message: GatewayToWorker) -> None:
        match message:
            case Generate():
                self._left[message.request_id] = message.sampling.max_tokens or 16
                heapq.heappush(self._due, (time.monotonic(), message.request_id, 0))
            case Abort() if self._left.pop(message.request_id, None) is not None:
                self._channel.send([Aborted(message.request_id)])
            case LoadAdapter():
                self._channel.send([Loaded(message.digest, 0.0, 1 << 20)])
            case Shutdown():
                raise ChannelClosed

    def _say(self) -> list[Message]:
        said: list[Message] = []
        horizon = time.monotonic()
        while self._due and self._due[0][0] <= horizon:
            due, request_id, number = heapq.heappop(self._due)
            if request_id not in self._left:
                continue
            if number == 0:
                said.append(Started(request_id, PROMPT_TOKENS))
            self._left[request_id] -= 1
            is_last = not self._left[request_id]
            said.append(Delta(request_id, 0, WORD, (1,), finish_reason="length" if is_last else None))
            if is_last:
                del self._left[request_id]
                said.append(Finished(request_id, PROMPT_TOKENS, number + 1, device_s=1e-6))
            else:
                heapq.heappush(self._due, (due + self._interval_s, request_id, number + 1))
        return said


class NullService:
    """Stands where the processes of a backbone would be."""

    name = BACKBONE
    context_length = 1 << 20
    takes_requests = True
    is_ready = True
    identity = None
    size_bytes = 1 << 20

    def __init__(self, tokens_per_s: float) -> None:
        self.facts = BackboneFacts()
        self._tokens_per_s = tokens_per_s
        self._processes: list[subprocess.Popen[bytes]] = []

    def startup(self) -> None: ...

    async def shutdown(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    async def wait_ready(self, timeout_s: float | None = None) -> None: ...

    def rest(self, unused_for_s: float = 0.0) -> bool:
        return False

    def status(self) -> BackboneStatus:
        return BackboneStatus(BACKBONE, "ready", "memfd", self.size_bytes, None, None, None, self.context_length, 0)

    def fork(self, domain: str, *, may_be_spare: bool = True) -> WorkerLink:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, __file__, "work", "--fd", str(fd), "--tokens-per-s", str(self._tokens_per_s)]
            self._processes.append(subprocess.Popen(command, pass_fds=[fd]))
        channel: AsyncChannel[WorkerToGateway] = AsyncChannel(ours, WorkerToGateway)
        return WorkerLink(f"null-{len(self._processes)}", domain, channel, adapter_bytes=1 << 40)


async def serve(functions: Sequence[str], tokens_per_s: float, state_dir: str) -> None:
    adapter = Path(state_dir) / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (adapter / "adapter_model.safetensors").write_bytes(b"nobody reads this")
    config = ServerConfig(
        backbones=(BackboneConfig(BACKBONE),),
        functions=tuple(FunctionConfig(name, str(adapter)) for name in functions),
        state_dir=state_dir,
        port=0,
        admin_port=-1,
        max_running=1024,
        max_queue=4096,
        keep_alive_min_s=3600,
        keep_alive_max_s=7200,
        slo_ttft_s=60,
    )
    fleet = Fleet(config)
    service: Any = NullService(tokens_per_s)
    fleet._services[BACKBONE] = service
    server = Server(config, fleet)
    await server.run(lambda ready: print(ready.api.address, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["serve", "work"])
    parser.add_argument("--functions", type=int, default=8, help="each with a worker of its own [8]")
    parser.add_argument("--tokens-per-s", type=float, default=10.0, help="of every request [10]")
    parser.add_argument("--fd", type=int, help="of the channel, for a worker")
    arguments = parser.parse_args()
    if arguments.role == "work":
        try:
            NullWorker(Channel.inherited(arguments.fd, GatewayToWorker), arguments.tokens_per_s).main_loop()
        except ChannelClosed:
            return
    else:
        import uvloop

        with tempfile.TemporaryDirectory() as state_dir:
            names = [f"f{number}" for number in range(arguments.functions)]
            uvloop.run(serve(names, arguments.tokens_per_s, state_dir))


if __name__ == "__main__":
    main()
