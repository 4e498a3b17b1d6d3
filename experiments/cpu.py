"""How much of the processors a group of processes has used, those included that have ended."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from serverlesslora_loadgen.lifetimes import members

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(group: int) -> float:
    """Of living members, and of children they have waited for (fields utime to cstime of proc(5) stat).

    What a start costs shows here and nowhere else: importing libraries computes nothing for any request.
    """
    total = 0
    for pid in members(group):
        with contextlib.suppress(OSError):  # it may end while it is looked at
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            total += sum(int(ticks) for ticks in fields[11:15])
    return total / TICKS
