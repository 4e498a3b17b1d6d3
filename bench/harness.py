"""What every benchmark needs: a server process, timed streaming requests, and the setup printed beside the number."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

MODELS = Path(os.environ.get("SERVERLESSLORA_BENCH_MODELS", Path.home() / ".cache" / "serverlesslora" / "bench"))


def lines_of(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def setup() -> dict[str, Any]:
    """The machine and the versions, so that a number can be read a year later."""
    from importlib.metadata import version

    cpu = next(line.split(":", 1)[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "serverlesslora")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }


def report(name: str, **numbers: Any) -> None:
    print(json.dumps({"bench": name, **numbers, "setup": setup()}), flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1], "n": len(ordered)}


def require_models(shape: str) -> Path:
    if not (MODELS / shape).is_dir():
        raise SystemExit(
            f"no model at {MODELS / shape}; write it with: python bench/make_models.py --out {MODELS} {shape}"
        )
    return MODELS / shape


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass(frozen=True)
class Running:
    url: str
    admin: str
    pid: int  # also the number of its process group
    started_at: float


@contextlib.contextmanager
def server(
    *arguments: str, command: Sequence[str] | None = None, wait: bool = True, nice: int = 0
) -> Iterator[Running]:
    """A server of ours on free ports, healthy when the block begins, gone with all of its process group when it ends.

    `nice` > 0 lets a client on the same cores keep its times while the server has more to do than it can.
    """
    if threading.current_thread() is threading.main_thread():  # told to end, a bench still ends what it started
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    port, admin_port = free_port(), free_port()
    state = tempfile.TemporaryDirectory(prefix="serverlesslora-bench-")
    argv = command or [
        *(sys.executable, "-m", "serverlesslora", "serve", *arguments),
        *("--port", str(port), "--admin-port", str(admin_port), "--state-dir", state.name),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*(("nice", "-n", str(nice)) if nice else ()), *(part.format(port=port) for part in argv)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    running = Running(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}", process.pid, began)
    try:
        if wait:
            wait_healthy(running, process)
        yield running
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # whatever did not leave by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        state.cleanup()


def wait_healthy(running: Running, process: subprocess.Popen[bytes], deadline_s: float = 300.0) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{running.url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.02)
    raise SystemExit("the server did not become healthy")


def admin_get(running: Running, path: str) -> Any:
    with urllib.request.urlopen(running.admin + path, timeout=10) as answer:
        return json.load(answer)


@dataclass(frozen=True)
class Timed:
    """One streamed request, as its client saw it; seconds."""

    ttft: float
    total: float
    gaps: tuple[float, ...]
    tokens: int
    text: str
    token_ids: tuple[int, ...]
    cold: str

    @property
    def tpot(self) -> float:
        return (self.total - self.ttft) / max(1, self.tokens - 1)


class Client:
    """Streaming completions with prompts of random token ids, never repeated, so that no cache helps."""

    def __init__(self, url: str, *, seed: int = 0, low: int = 300, high: int = 4000) -> None:
        self._url = url
        self._random = random.Random(seed)
        self._range = (low, high)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=900), connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(*self._range) for _ in range(length)]

    async def complete(self, model: str, prompt: list[int] | str, *, tokens: int, **more: Any) -> Timed:
        assert self._session is not None
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        body = {key: value for key, value in body.items() if value is not None}
        began = time.perf_counter()
        stamps: list[float] = []
        text: list[str] = []
        ids: list[int] = []
        used = 0
        async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {(await answer.text())[:300]}")
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if event.get("usage"):
                    used = event["usage"]["completion_tokens"]
                for choice in event["choices"][:1]:
                    ids += choice.get("token_ids") or ()
                    if choice.get("text"):
                        stamps.append(time.perf_counter())
                        text.append(choice["text"])
            cold = answer.headers.get("x-serverlesslora-cold", "")
        end = time.perf_counter()
        stamps = stamps or [end]
        gaps = tuple(after - before for before, after in itertools.pairwise(stamps))
        return Timed(stamps[0] - began, stamps[-1] - began, gaps, used, "".join(text), tuple(ids), cold)

    def text(self, length: int) -> str:
        """As many tokens as characters, for the byte-level tokenizer that `make_models.py` writes."""
        return "".join(self._random.choices(string.ascii_lowercase, k=length))

    async def burst(
        self, models: Sequence[str], *, prompt: int, tokens: int, as_text: bool = False, **more: Any
    ) -> tuple[float, list[Timed]]:
        """All at once; output tokens per second of wall time, and every request."""
        prompts = [self.text(prompt) if as_text else self.prompt(prompt) for _ in models]
        began = time.perf_counter()
        done = await asyncio.gather(
            *(self.complete(model, p, tokens=tokens, **more) for model, p in zip(models, prompts, strict=True))
        )
        return sum(one.tokens for one in done) / (time.perf_counter() - began), list(done)


def pss_mb(pid: int) -> float:
    """Proportional set size of a process and all its descendants, MiB."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(OSError):
            for line in lines_of(f"/proc/{process.pid}/smaps_rollup"):
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024
