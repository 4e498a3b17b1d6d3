"""The real server as a process, with its admin API: what tests of processes, faults and scale-to-zero stand on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.server import ROOT, free_port, is_healthy, wait_until


@dataclass(frozen=True)
class Live:
    url: str
    admin: str
    process: subprocess.Popen[bytes]
    log: Path

    def state(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.admin}/admin/state", timeout=10).json()
        return answer

    def workers(self) -> dict[str, dict[str, Any]]:
        """By domain, without the backbone's name."""
        return {worker["domain"].partition("/")[2]: worker for worker in self.state()["workers"]}

    def backbone(self) -> dict[str, Any]:
        found: dict[str, Any] = self.state()["backbones"][0]
        return found

    def deploy(self, name: str, adapter: Path, *, replace: bool = False, **more: Any) -> httpx.Response:
        body = {"function": {"name": name, "adapter": str(adapter), **more}, "replace": replace}
        return httpx.post(f"{self.admin}/admin/functions", json=body, timeout=60)

    def chat(self, model: str, text: str, **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def answer(self, model: str, text: str) -> str:
        response = self.chat(model, text)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    def pids(self) -> set[int]:
        """Every live process of the server's group, also what was re-parented."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = entry.read_text().rpartition(") ")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.add(int(entry.parent.name))
        return found


@contextlib.contextmanager
def live(
    *arguments: str, deadline_s: float = 120.0, through: Sequence[str] = (), state_dir: Path | None = None
) -> Iterator[Live]:
    """`serverlesslora serve` in a process group of its own; every process of it is gone when the block ends.

    `through`: a command that runs the one which follows it. `state_dir`: one that outlives the server.
    """
    port, admin_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        argv = [*through, sys.executable, "-m", "serverlesslora", "serve", *arguments, "--port", str(port)]
        argv += ["--admin-port", str(admin_port), "--state-dir", str(state_dir or f"{scratch}/state")]
        roots = os.pathsep.join(str(ROOT / each) for each in (".", "ipc", "kernels", "loadgen"))
        with log.open("wb") as out:
            process = subprocess.Popen(
                argv,
                env=os.environ | {"PYTHONPATH": roots, "TMPDIR": scratch},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Live(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}", process, log)
        try:
            wait_until(lambda: process.poll() is not None or is_healthy(server.url), deadline_s)
            assert process.poll() is None, log.read_text()
            yield server
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-10_000:])  # it is about to be deleted
            raise
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
