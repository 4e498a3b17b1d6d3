"""Runs the sections in turn, each in a process group that can be ended, and keeps the result file current."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from bench.gpu import table
from bench.gpu.record import DeviceKind, SectionResult
from bench.gpu.sections import Section, deadline_s, find, turns
from serverlesslora.launcher.zygote import DEVICE_ENVIRONMENT

_TAIL_BYTES = 6000
_GRACE_S = 4.0  # a section that minds its deadline ends before it is ended
_SCRATCH_BYTES = 16 << 30  # checkpoints and adapters: in memory where there is so much, or a disk would be measured
_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.limit", "compute_mode", "ecc.mode.current"),
)
_PACKAGES = ("torch", "triton", "transformers", "peft", "cuda-bindings", "safetensors", "msgspec")


class Run:
    def __init__(self, root: Path, kind: DeviceKind, out: Path, *, budget_s: float) -> None:
        self._root = root
        self._kind = kind
        self._console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
        self._setup = _setup(root, kind)
        self._path = out.resolve() / f"gpu-{_slug(self._setup['device'])}.json"
        self._budget_s = budget_s
        self._results: list[SectionResult] = []
        self._limits: dict[str, float] = {}

    def main_loop(self, chosen: list[Section], *, strict: bool) -> int:
        began = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._kind == "cuda":
            self._read_libraries(began)
        shm = Path("/dev/shm")
        roomy = self._kind == "cuda" and shm.is_dir() and shutil.disk_usage(shm).free > _SCRATCH_BYTES
        with (
            tempfile.TemporaryDirectory(prefix="gpu-check-", dir=shm if roomy else None) as scratch,
            # Triton loads libraries from there, which /dev/shm often forbids.
            tempfile.TemporaryDirectory(prefix="gpu-check-triton-") as self._compiled,
        ):
            # Nothing is measured on emulated devices, and each section has one of its own: all at once.
            planned = turns(chosen) if self._kind == "cuda" else [chosen]
            for index, turn in enumerate(planned):
                left = self._budget_s - (time.monotonic() - began)
                allowed = deadline_s(turn, left, planned[index + 1 :]) if self._kind == "cuda" else left
                for section in turn:
                    self._console.print(f"[bold]{section.name}[/]: {section.proves} …")
                if allowed:
                    results = self._run(turn, allowed, Path(scratch))
                else:
                    results = [SectionResult(each.name, ok=None, reason=f"no time left: {left:.0f} s") for each in turn]
                for result in results:
                    self._results.append(result)
                    if result.name == "limits":
                        self._limits = {number.name: number.value for number in result.numbers}
                    table.print_section(self._console, result)
                self._save(time.monotonic() - began)
        table.print_summary(self._console, self._results, time.monotonic() - began, self._path)
        return self._exit_code(strict)

    def _read_libraries(self, began: float) -> None:
        """From a cold disk they take long to import: once, here, and in no section's time."""
        self._console.print("importing torch, transformers and peft for the first time …")
        code = "import triton, peft, torch, transformers; print(torch.zeros(1, device='cuda').item())"
        if _output(sys.executable, "-c", code, timeout_s=120) is None:
            self._console.print("  [yellow]that failed, or took over two minutes; the sections will say why[/]")
        self._setup["first_import_s"] = round(time.monotonic() - began, 1)

    def _exit_code(self, strict: bool) -> int:
        """What there was no time to prove is not proven; a number that is missing proves nothing anyway."""
        unproven = [
            result
            for result in self._results
            if result.ok is False or (find(result.name).is_correctness and (result.left_out or result.ok is None))
        ]
        missed = [number for result in self._results for number in result.numbers if number.met is False]
        return 1 if unproven or (strict and missed) else 0

    def _run(self, turn: Sequence[Section], allowed_s: float, scratch: Path) -> list[SectionResult]:
        running = [SectionProcess(section, self._command(section, allowed_s, scratch), scratch) for section in turn]
        deadline = time.monotonic() + allowed_s + _GRACE_S
        for process in running:
            process.start(self._root, self._environment(process.name))
        return [process.result(deadline, allowed_s) for process in running]

    def _command(self, section: Section, allowed_s: float, scratch: Path) -> list[str]:
        command = [sys.executable, "-m", "bench.gpu.run_section", section.name, "--device", self._kind]
        command += ["--result", str(scratch / f"{section.name}.json"), "--scratch", str(scratch / section.name)]
        command += ["--beside", str(self._path)]
        return [*command, "--deadline-s", f"{allowed_s:.1f}", "--limits", json.dumps(self._limits)]

    def _environment(self, section: str) -> dict[str, str]:
        environment = dict(os.environ)
        folders = [str(self._root / folder) for folder in ("", "ipc", "kernels", "loadgen")]
        environment["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [environment.get("PYTHONPATH")])])
        environment |= {
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # One run compiles each kernel once, and never finds an old one.
            "TRITON_CACHE_DIR": self._compiled,
        }
        environment |= DEVICE_ENVIRONMENT  # as workers have it
        environment.pop("TRITON_INTERPRET", None)
        if self._kind == "emulated":
            environment |= {
                "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1",
                # Nobody else's memory is counted.
                "SERVERLESSLORA_EMULATED_DEVICE": f"gpu-check-{os.getpid()}-{section}",
            }
        return environment

    def _save(self, seconds: float) -> None:
        document = {
            "bench": "gpu_check",
            "setup": self._setup,
            "seconds": round(seconds, 1),
            "limits": self._limits,
            "sections": msgspec.to_builtins(self._results),
        }
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(draft, self._path)


class SectionProcess:
    def __init__(self, section: Section, command: list[str], scratch: Path) -> None:
        self.name = section.name
        self._command = command
        self._place = scratch / section.name
        self._path, self._log = scratch / f"{section.name}.json", scratch / f"{section.name}.log"

    def start(self, root: Path, environment: dict[str, str]) -> None:
        self._place.mkdir()
        self._began = time.monotonic()
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def result(self, deadline: float, allowed_s: float) -> SectionResult:
        ended = self._wait(deadline)
        try:
            result = msgspec.json.decode(self._path.read_bytes(), type=SectionResult)
        except (OSError, msgspec.DecodeError):
            result = SectionResult(self.name)
            result.seconds = time.monotonic() - self._began
        if ended != "exit 0" and result.ok is not False:
            result.ok, result.reason = False, f"{ended}; it had {allowed_s:.0f} s"
        if result.ok is False:
            result.tail = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        shutil.rmtree(self._place, ignore_errors=True)  # gigabytes of memory, maybe
        return result

    def _wait(self, deadline: float) -> str:
        """How it ended. Whatever it leaves behind ends with it."""
        try:
            status = self._process.wait(max(0.1, deadline - time.monotonic()))
            ended = f"exit {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        except subprocess.TimeoutExpired:
            ended = "it hung and was ended"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return ended


def _setup(root: Path, kind: DeviceKind) -> dict[str, Any]:
    """The machine and the versions, so that a number can be read a year later."""
    setup: dict[str, Any] = {"device": "emulated", "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    if kind == "cuda":
        setup |= _card()
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    setup |= {
        "python": sys.version.split()[0],
        "kernel": os.uname().release,
        "cpu": next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), ""),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "commit": _output("git", "-C", str(root), "describe", "--always", "--dirty") or "unknown",
    }
    return setup


def _card() -> dict[str, str]:
    """As nvidia-smi describes it; where that is missing or knows a field less, as torch names it."""
    values = _output("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader")
    if values is not None:
        parts = [value.strip() for value in values.splitlines()[0].split(",")]
        return {"device": parts[0], **dict(zip(_FIELDS[1:], parts[1:], strict=False))}
    name = _output(sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))", timeout_s=120)
    if name is None:
        raise SystemExit("no GPU: neither nvidia-smi nor torch finds one; without one there is --device emulated")
    return {"device": name}


def _output(*command: str, timeout_s: float = 30) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
