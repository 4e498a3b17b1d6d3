"""ServeGen's clients: for each the rate, and the law of the gaps, of every window of ten minutes.

Xiang et al., "ServeGen", NSDI '26. Of a fitted law only the shape is taken; the gaps are scaled to the window's rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from serverlesslora_loadgen.errors import TraceError
from serverlesslora_loadgen.sources.adapters import Stream, Times, import_streams
from serverlesslora_loadgen.sources.options import Imported, ImportOptions, Progress, require_lengths
from serverlesslora_loadgen.sources.rows import Columns, Row, read_rows, read_table

LAWS = ("Gamma", "Weibull")
WINDOW_S = 600.0  # when a file has only one and so does not show it


class Window(NamedTuple):
    start_s: float
    rate_rps: float
    law: str
    shape: float


def import_servegen(path: Path, options: ImportOptions, progress: Progress | None = None) -> Imported:
    """A folder of ServeGen's own `chunk-<client>-trace.csv`, or one table of all with `client` as a column."""
    require_lengths(options, str(path))
    clients = read_clients(path, progress)
    starts = sorted({window.start_s for windows in clients.values() for window in windows})
    window_s = min((b - a for a, b in pairwise(starts)), default=WINDOW_S)
    ends_s = starts[-1] + window_s if starts else 0.0
    end_s = min(options.end_s, ends_s)
    if options.start_s >= end_s:
        raise TraceError(f"{path} ends at {ends_s:g} s, which is not after {options.start_s:g} s; start earlier")
    streams = []
    for client, windows in sorted(clients.items()):
        taken = [each for each in windows if options.start_s < each.start_s + window_s and each.start_s < end_s]
        whole = [each for each in taken if options.start_s <= each.start_s and each.start_s + window_s <= end_s]
        least = sum(requests_in(each, window_s) for each in whole)
        streams.append(Stream(f"client {client}", least, partial(_drawn, taken, window_s, (options.seed, 3, client))))
    imported = import_streams(streams, options, end_s - options.start_s, source=path.name, kind="client")
    imported.notes.append(
        f"the gaps of a client were drawn in every window of {window_s:g} s from the Gamma or Weibull law that ServeGen"
        f" fitted to it, and scaled to the number of requests it had in that window (seed {options.seed})"
    )
    return imported


def read_clients(path: Path, progress: Progress | None = None) -> dict[int, list[Window]]:
    """The windows of every client that it was not silent in, in the order of time."""
    return _read_folder(path, progress) if path.is_dir() else _read_table(path, progress)


def _read_table(path: Path, progress: Progress | None) -> dict[int, list[Window]]:
    header, rows = read_table(path, progress)
    names = ("client", "window_start_s", "rate_rps", "pattern", "p1_shape")
    client, *places = Columns(header).need(names, "table of ServeGen's clients")
    clients: dict[int, list[Window]] = {}
    for row in rows:
        windows = clients.setdefault(row.count(client, names[0]), [])
        windows.extend(_window(row, places))
    return {client: sorted(windows) for client, windows in clients.items()}


def _read_folder(path: Path, progress: Progress | None) -> dict[int, list[Window]]:
    """Columns without a header: start (s), rate, CV, law (none when the client was silent), shape, scale."""
    files = {
        int(match[1]): file for file in path.iterdir() if (match := re.fullmatch(r"chunk-(\d+)-trace\.csv", file.name))
    }
    if not files:
        raise TraceError(
            f"{path} has no chunk-<client>-trace.csv; give a folder such as data/language/m-small of ServeGen"
        )
    clients = {}
    for number, (client, file) in enumerate(sorted(files.items()), 1):
        clients[client] = sorted(window for row in read_rows(file) for window in _window(row, (0, 1, 3, 4)))
        if progress is not None:
            progress(number / len(files))
    return clients


def _window(row: Row, places: Sequence[int]) -> Iterator[Window]:
    """One, or none when the client was silent."""
    start, rate, law, shape = places
    name = row.text(law).strip()
    rate_rps = row.number(rate, "the rate")
    if not name or rate_rps == 0:
        return
    if name not in LAWS:
        raise row.mistake(f"has {name!r} for the law of gaps; there are {' and '.join(LAWS)}")
    window = Window(row.number(start, "the start"), rate_rps, name, row.number(shape, "the shape"))
    if window.rate_rps < 0 or window.shape <= 0 or window.start_s < 0:
        raise row.mistake("has a start or a rate below 0, or a shape that is not above it")
    yield window


def requests_in(window: Window, window_s: float) -> int:
    """A rate is a number of requests over the window's length, which is counted back."""
    return max(1, math.floor(window.rate_rps * window_s + 0.5))


def _drawn(windows: Sequence[Window], window_s: float, seed: tuple[int, ...]) -> Times:
    rng = np.random.default_rng(seed)
    times = [np.empty(0)]
    for window in windows:
        wanted = requests_in(window, window_s)
        draw = rng.standard_gamma if window.law == "Gamma" else rng.weibull
        ends = np.cumsum(draw(window.shape, wanted + 1))  # one more gap than requests: the last leads out of the window
        # All at once when the shape is so small that every gap is too short for a float.
        after = window_s * ends[:-1] / ends[-1] if ends[-1] > 0 else np.zeros(wanted)
        end_s = window.start_s + window_s  # not in the window any more, wherever rounding puts the last
        times.append(np.minimum(window.start_s + after, np.nextafter(end_s, 0)))
    return np.concatenate(times)
