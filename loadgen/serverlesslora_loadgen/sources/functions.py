"""Azure Functions: invocations per function and minute (2019), or one row per invocation (2021).

2019: Shahrad et al., "Serverless in the Wild", ATC '20; also as In-Vitro samples it (Ustiugov et al., 2023). 2021:
Zhang et al., "Faster and Cheaper Serverless Computing on Harvested Resources", SOSP '21.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serverlesslora_loadgen.errors import TraceError, WorkloadError
from serverlesslora_loadgen.sources.adapters import Stream, Times, import_streams
from serverlesslora_loadgen.sources.options import Imported, ImportOptions, Progress, require_lengths
from serverlesslora_loadgen.sources.rows import Columns, Row, read_table

MINUTE_S = 60.0


def import_minutes(path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """The layout of 2019. Invocations are placed uniformly at random inside their minute: how they lay is not known."""
    require_lengths(options, str(path))  # before minutes of reading
    found = read_minutes(path, options, progress)
    imported = import_streams(found.streams, options, found.duration_s, source=path.name, kind="function")
    imported.notes.append(
        "the invocations of a minute were placed uniformly at random inside it (seed"
        f" {options.seed}); times count from the file's first minute, {found.first_minute}; rows count from 0"
    )
    if options.trigger is not None:
        imported.notes.append(f"only functions with the trigger {options.trigger}")
    return imported


class Minutes(NamedTuple):
    streams: list[Stream]
    duration_s: float  # of what is taken
    first_minute: int  # that the file has, by its name there


def read_minutes(path: Path, options: ImportOptions, progress: Progress | None = None) -> Minutes:
    """Columns for the function and then one per minute: `minute_1`, … or `1`, …; `Trigger` may be among the former."""
    header, rows = read_table(path, progress)
    columns = Columns(header)
    columns.need(["HashFunction"], "Azure Functions trace of 2019")
    trigger = columns.find("Trigger")
    if options.trigger is not None and trigger is None:
        raise WorkloadError(f"{path} has no triggers to choose {options.trigger!r} from; leave the trigger out")
    first, minutes = _minutes(header)
    begin = min(int(options.start_s // MINUTE_S), minutes)
    end_s = min(options.end_s, minutes * MINUTE_S)
    end = int(-(-end_s // MINUTE_S))
    if begin >= end:
        raise TraceError(
            f"{path} has {minutes} minutes, none of them after {options.start_s / 60:g} min; start earlier"
        )
    whole_from, whole_to = -(-options.start_s // MINUTE_S), end_s // MINUTE_S  # minutes that are taken as a whole
    streams: list[Stream] = []
    triggers: set[str] = set()
    for number, row in enumerate(rows):
        if trigger is not None:
            triggers.add(row.text(trigger))
            if options.trigger is not None and row.text(trigger) != options.trigger:
                continue
        counts = _counts(row, first + begin, first + end)
        at = np.flatnonzero(counts)
        whole = (at + begin >= whole_from) & (at + begin < whole_to)
        streams.append(
            Stream(
                f"row {number}",
                int(counts[at][whole].sum()),
                partial(_placed, at + begin, counts[at], (options.seed, 2, number)),
            )
        )
    if not streams and options.trigger is not None:
        raise WorkloadError(f"{path} has no trigger {options.trigger!r}; there are {', '.join(sorted(triggers))}")
    return Minutes(streams, end_s - options.start_s, int(header.cells[first].strip().removeprefix("minute_")))


def import_invocations(path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """`app,func,end_timestamp,duration` in seconds; an invocation begins at its end less its duration."""
    require_lengths(options, str(path))
    header, rows = read_table(path, progress)
    names = ("app", "func", "end_timestamp", "duration")
    app, function, ended, lasted = Columns(header).need(names, "Azure Functions trace of 2021")
    found: dict[tuple[str, str], list[float]] = {}
    last_s = 0.0
    before = 0
    for row in rows:
        at_s = row.number(ended, names[2]) - row.number(lasted, names[3])
        before += at_s < 0
        last_s = max(last_s, at_s)
        found.setdefault((row.text(app), row.text(function)), []).append(at_s)
    end_s = min(options.end_s, np.nextafter(last_s, np.inf))
    if options.start_s >= end_s:
        raise TraceError(f"{path} ends at {last_s:g} s, which is not after {options.start_s:g} s; start earlier")
    streams = []
    for (_, name), at in found.items():
        times = np.sort(np.array(at))
        taken = int(((times >= options.start_s) & (times < end_s)).sum())
        streams.append(Stream(name[:12], taken, partial(_given, times)))
    imported = import_streams(streams, options, end_s - options.start_s, source=path.name, kind="function")
    imported.notes.append("an invocation was taken to begin at its end_timestamp less its duration")
    if before:
        imported.notes.append(f"{before} invocations that began before the log did were left out")
    return imported


def _minutes(header: Row) -> tuple[int, int]:
    """Where the columns of minutes begin, and how many there are; they stand last and count up by one."""
    numbers = [re.fullmatch(r"(?:minute_)?(\d+)", cell.strip()) for cell in header.cells]
    first = next((place for place, number in enumerate(numbers) if number), None)
    if first is None:
        raise header.mistake("names no minutes: columns minute_1, minute_2, … or 1, 2, … are needed")
    minutes = [int(number[1]) for number in numbers[first:] if number]
    if len(minutes) < len(numbers) - first or minutes != list(range(minutes[0], minutes[0] + len(minutes))):
        raise header.mistake("has a gap between its minutes; they have to stand last and to count up by one")
    return first, len(minutes)


def _counts(row: Row, begin: int, end: int) -> NDArray[np.int64]:
    """An empty cell is 0."""
    if len(row.cells) < end:
        raise row.mistake(f"has {len(row.cells)} cells, and column {end} is asked for")
    cells = row.cells[begin:end]
    try:
        counts = np.array(list(map(int, cells)), dtype=np.int64)
        if counts.min() >= 0:
            return counts
    except ValueError:
        pass  # an empty cell, a fraction or no number at all
    counted = [row.count(begin + at, "a minute") if cell.strip() else 0 for at, cell in enumerate(cells)]
    return np.array(counted, dtype=np.int64)


def _placed(minutes: NDArray[np.int64], counts: NDArray[np.int64], seed: tuple[int, ...]) -> Times:
    within = np.random.default_rng(seed).random(int(counts.sum()))
    return np.sort(MINUTE_S * (np.repeat(minutes, counts) + within))


def _given(times: Times) -> Times:
    return times
