"""Where a measurement was made: what anybody needs to know before comparing it with another."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from serverlesslora_loadgen.result import Environment

PACKAGES = ("httptools", "msgspec", "numpy", "uvloop")


def environment() -> Environment:
    return Environment(
        tool=_version("serverlesslora") or "unknown",
        python=platform.python_version(),
        kernel=platform.release(),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        git=commit_of(Path(__file__)),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def commit_of(file: Path) -> str | None:
    """Of the checkout that this file belongs to.

    Lying in one is not enough: what was installed below somebody's project must not be taken for a part of it.
    """
    if _git(file, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    return _git(file, "describe", "--always", "--dirty") or None


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
