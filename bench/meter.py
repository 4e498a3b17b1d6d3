"""How much memory a process group really holds, sampled from outside: one JSON line per sample on stdout.

    python bench/meter.py --group PGID [--interval 2]

held = private and file pages of every process (proportional: a page that n processes map counts 1/n in each, also those
outside of the group) + every anonymous memory file once, whether anybody maps it or only keeps it open. It is a process
of its own: walking page tables of many large processes takes milliseconds in which a client could not keep its times.
With many of them it samples less often, so that it never takes more than 3 % of a core.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_SHARE = 0.03  # of a core


class Sample(NamedTuple):
    at: float  # `time.monotonic`, one clock for all processes of a machine
    private: int  # bytes, and so are the others
    files: int
    shared: int
    processes: int
    took_s: float

    @property
    def held(self) -> int:
        return self.private + self.files + self.shared


def members(group: int) -> list[int]:
    """Living processes of the group, also those whose parent is gone."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, its_group = Path(entry.path, "stat").read_text().rpartition(") ")[2].split()[:3]
                if int(its_group) == group and state != "Z":
                    found.append(int(entry.name))
    return found


def _memory_files(pid: int) -> dict[tuple[int, int], int]:
    """(device, inode) → bytes allocated of every memfd this process has open, or mapped of one it has only mapped."""
    found: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if " /memfd:" in line:
                addresses, _, _, device, inode, *_ = line.split()
                begin, end = (int(each, 16) for each in addresses.split("-"))
                key = os.makedev(*(int(each, 16) for each in device.split(":"))), int(inode)
                found[key] = max(found.get(key, 0), end - begin)
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith("/memfd:"):
                    facts = os.stat(entry.path)
                    found[facts.st_dev, facts.st_ino] = 512 * facts.st_blocks
    return found


def sample(group: int) -> Sample:
    began = time.monotonic()
    private = files = 0
    memory_files: dict[tuple[int, int], int] = {}
    pids = members(group)
    for pid in pids:
        with contextlib.suppress(OSError):  # it may end while it is looked at
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                kind, _, rest = line.partition(":")
                if kind == "Pss_Anon":
                    private += int(rest.split()[0]) << 10
                elif kind == "Pss_File":
                    files += int(rest.split()[0]) << 10
        for key, size in _memory_files(pid).items():
            memory_files[key] = min(size, memory_files.get(key, size))  # who has it open knows better
    return Sample(began, private, files, sum(memory_files.values()), len(pids), time.monotonic() - began)


class Meter:
    """A meter that runs beside a server; what it has written so far."""

    def __init__(self, written: Path) -> None:
        self._written = written

    def samples(self) -> list[Sample]:
        with self._written.open() as file:
            return [Sample(*json.loads(line)) for line in file if line.endswith("\n")]

    def gb_seconds(self, from_s: float, to_s: float) -> float:
        return gb_seconds(self.samples(), from_s, to_s)

    def peak_gb(self, from_s: float, to_s: float) -> float:
        return max((each.held for each in self.samples() if from_s <= each.at <= to_s), default=0) / 1e9


def gb_seconds(samples: Sequence[Sample], from_s: float, to_s: float) -> float:
    """∫ held dt over [from_s, to_s], GB (1e9 bytes) × seconds: straight lines between samples, level outside."""
    if not samples:
        raise ValueError("the meter has no sample yet")
    inside = [(each.at, each.held) for each in samples if from_s < each.at < to_s]
    points = [(from_s, _held_at(samples, from_s)), *inside, (to_s, _held_at(samples, to_s))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points)) / 1e9


def _held_at(samples: Sequence[Sample], at: float) -> float:
    if at <= samples[0].at:
        return samples[0].held
    for before, after in itertools.pairwise(samples):
        if at <= after.at:
            return before.held + (after.held - before.held) * (at - before.at) / (after.at - before.at)
    return samples[-1].held


@contextlib.contextmanager
def metered(group: int, interval_s: float = 2.0) -> Iterator[Meter]:
    with tempfile.TemporaryDirectory(prefix="serverlesslora-meter-") as scratch:
        meter = Meter(Path(scratch, "samples.jsonl"))
        command = [sys.executable, __file__, "--group", str(group), "--interval", str(interval_s)]
        with Path(scratch, "samples.jsonl").open("w") as file:
            process = subprocess.Popen(command, stdout=file)
        try:
            while not meter.samples():
                if process.poll() is not None:
                    raise SystemExit(f"the meter ended with status {process.returncode}")
                time.sleep(0.01)
            yield meter
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, required=True, help="process group of the server")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between samples, at least [2]")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while members(arguments.group):
        before = time.process_time()
        print(json.dumps(sample(arguments.group)), flush=True)
        time.sleep(max(arguments.interval, (time.process_time() - before) / MAX_SHARE))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
