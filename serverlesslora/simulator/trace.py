"""Request traces: who was asked for what, when, and how many tokens went in and out.

Read from JSON lines (`timestamp` in ms, `model`, `input_length`, `output_length`; Mooncake's field names) or made from
minute counts of the Azure Functions 2019 trace (Shahrad et al., "Serverless in the Wild", ATC'20). Rates are met by
choosing functions, never by thinning: dropping requests at random turns bursts into a Poisson process.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from serverlesslora.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MINUTE_COLUMN = re.compile(r"(?:minute_)?(\d+)")
MAX_TOKENS = 1 << 20  # of one request; what is longer is a broken row


class Trace(NamedTuple):
    """Requests in order of arrival. All arrays are [num_requests]."""

    times: Floats  # seconds from the beginning of the window
    functions: Ints  # index into `names`
    prompt_tokens: Ints
    output_tokens: Ints
    names: tuple[str, ...]
    duration_s: float  # of the window; requests may go on after it
    day_offset_s: float = 0.0  # the window's beginning, in seconds of the trace's day
    description: str = ""

    @property
    def num_requests(self) -> int:
        return len(self.times)


class Choice(msgspec.Struct, frozen=True):
    """Which part of a trace: functions by how much they are called in all of it, and a window of time."""

    functions: int | None = None  # so many, at random among those that qualify; None: all that qualify
    max_per_day: int | None = None  # functions called more often (counts of a shorter file are scaled) do not qualify
    start_hour: float = 0.0
    hours: float | None = None  # None: to the end
    trigger: str | None = None  # only rows with this Trigger, where the file has the column
    seed: int = 0


class _Row(msgspec.Struct):
    timestamp: float  # ms
    model: str
    input_length: int
    output_length: int


class _Counts(NamedTuple):
    names: list[str]
    per_minute: Ints  # [num_functions, num_minutes]
    first_minute: int


def read_trace(path: str | Path, choice: Choice | None = None, *, lengths: str | None = None) -> Trace:
    """`lengths` is needed by minute counts alone: a file of token counts to draw pairs from, or "IN,OUT".

    Raises ConfigError naming the file, the row and the remedy.
    """
    path, choice = Path(path), choice or Choice()
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".jsonl":
        trace = _window(_read_jsonl(path), choice)
    elif kind == ".csv":
        trace = _from_counts(_read_counts(path, choice.trigger), choice, lengths or "1024,200")
    else:
        raise ConfigError(
            f"{path} is no trace this can read: the name must end in .jsonl, .csv or one of them with .gz"
        )
    if not trace.num_requests:
        raise ConfigError(f"{path} has no request in the chosen window: widen --hours or --max-per-day")
    return trace._replace(description=f"{path.name}: {_describe(trace, choice)}")


def read_lengths(source: str | Path) -> Ints:
    """Pairs of (prompt, output) tokens, [num_pairs, 2]: from "IN,OUT", Azure's LLM trace (csv) or a JSONL trace."""
    if re.fullmatch(r"\d+,\d+", str(source)):
        pairs = [tuple(int(part) for part in str(source).split(","))]
    elif ".jsonl" in Path(source).suffixes:
        trace = _read_jsonl(Path(source))
        return np.stack([trace.prompt_tokens, trace.output_tokens], axis=1)
    else:
        with _open(Path(source)) as file:
            try:
                pairs = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
            except (KeyError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"{source} has no lengths: a csv needs the columns ContextTokens and GeneratedTokens ({error!r})"
                ) from error
    if not pairs:
        raise ConfigError(f"{source} has no lengths in it")
    return np.maximum(1, np.array(pairs, dtype=np.int64))


def _open(path: Path) -> IO[str]:
    try:
        if path.suffix == ".gz":
            return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8")
        return path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as file:
        try:
            yield from file
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error


def _read_jsonl(path: Path) -> Trace:
    decoder = msgspec.json.Decoder(_Row)
    index: dict[str, int] = {}
    rows: list[tuple[float, int, int, int]] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{path}, line {number}: {error}; a row is "
                '{"timestamp": ms, "model": name, "input_length": tokens, "output_length": tokens}'
            ) from error
        if row.timestamp < 0 or not 0 < row.input_length <= MAX_TOKENS or not 0 <= row.output_length <= MAX_TOKENS:
            raise ConfigError(f"{path}, line {number}: negative time or a length outside 1..{MAX_TOKENS}")
        function = index.setdefault(row.model, len(index))
        rows.append((row.timestamp / 1000, function, row.input_length, max(1, row.output_length)))
    rows.sort(key=lambda one: one[0])  # stable: requests of one instant keep their order
    times = np.array([row[0] for row in rows], dtype=np.float64)
    functions, prompts, outputs = (np.array([row[k] for row in rows], dtype=np.int64) for k in (1, 2, 3))
    return Trace(times, functions, prompts, outputs, tuple(index), float(times[-1]) if len(times) else 0.0)


def _read_counts(path: Path, trigger: str | None) -> _Counts:
    rows = csv.reader(_lines(path))
    header = next(rows, [])
    minutes = [i for i, name in enumerate(header) if MINUTE_COLUMN.fullmatch(name)]
    if not minutes:
        raise ConfigError(f"{path} has no minute columns (minute_1… or 1…): it is not a table of invocation counts")
    trigger_column = header.index("Trigger") if "Trigger" in header else None
    if trigger is not None and trigger_column is None:
        raise ConfigError(f"{path} has no column Trigger, so --trigger {trigger} cannot choose by it")
    names: list[str] = []
    counts: list[list[int]] = []
    first = minutes[0]
    for number, row in enumerate(rows, 2):
        if trigger is not None and trigger_column is not None and row[trigger_column] != trigger:
            continue
        try:
            counts.append([int(float(cell or 0)) for cell in row[first : minutes[-1] + 1]])
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if len(counts[-1]) != len(minutes) or min(counts[-1]) < 0:
            raise ConfigError(
                f"{path}, line {number}: {len(counts[-1])} counts, some may be negative; {len(minutes)} wanted"
            )
        names.append(f"fn-{number - 2:05d}")  # the hashes of published files repeat; the row does not
    match = MINUTE_COLUMN.fullmatch(header[first])
    assert match is not None
    return _Counts(names, np.array(counts, dtype=np.int64).reshape(len(names), len(minutes)), int(match[1]))


def _from_counts(counts: _Counts, choice: Choice, lengths: str) -> Trace:
    """Invocations lie uniformly inside their minute; lengths are drawn in pairs, so that their relation is kept."""
    random = np.random.default_rng(choice.seed)
    first = round(choice.start_hour * 60)
    chosen = _choose(counts.per_minute.sum(axis=1), counts.per_minute.shape[1] / 1440, choice, random)
    window = counts.per_minute[chosen, first : None if choice.hours is None else first + round(choice.hours * 60)]
    per_function = window.sum(axis=1)
    functions = np.repeat(np.arange(len(chosen)), per_function)
    _, minutes = np.nonzero(window)  # row by row, as `functions`
    times = (np.repeat(minutes, window[window > 0]) + random.random(len(functions))) * 60.0
    order = np.argsort(times, kind="stable")
    pairs = read_lengths(lengths)
    drawn = pairs[random.integers(0, len(pairs), len(functions))]
    return Trace(
        times[order],
        functions[order],
        drawn[:, 0],
        drawn[:, 1],
        tuple(counts.names[row] for row in chosen),
        60.0 * window.shape[1],
        # In-Vitro's files call a day's first minute 1; one with columns 480… begins at eight o'clock.
        60.0 * (first + (counts.first_minute if counts.first_minute > 1 else 0)),
    )


def _window(trace: Trace, choice: Choice) -> Trace:
    begin = 3600.0 * choice.start_hour
    end = trace.duration_s if choice.hours is None else begin + 3600.0 * choice.hours
    inside = (trace.times >= begin) & (trace.times <= end)
    duration = max(min(end, trace.duration_s) - begin, 1e-9)
    counts = np.bincount(trace.functions, minlength=len(trace.names))
    chosen = _choose(counts, max(trace.duration_s, 1e-9) / 86400, choice, np.random.default_rng(choice.seed))
    rename = np.full(len(trace.names), -1, dtype=np.int64)
    rename[chosen] = np.arange(len(chosen))
    inside &= rename[trace.functions] >= 0
    return Trace(
        trace.times[inside] - begin,
        rename[trace.functions[inside]],
        trace.prompt_tokens[inside],
        trace.output_tokens[inside],
        tuple(trace.names[i] for i in chosen),
        duration,
        begin,
    )


def _choose(counts: Ints, days: float, choice: Choice, random: np.random.Generator) -> Ints:
    bound = np.inf if choice.max_per_day is None else choice.max_per_day * days
    candidates = np.flatnonzero((counts > 0) & (counts <= bound))
    if choice.functions is None:
        return candidates
    if choice.functions > len(candidates):
        raise ConfigError(
            f"{choice.functions} functions were asked for and {len(candidates)} qualify: "
            "raise --max-per-day or ask for fewer"
        )
    return np.sort(random.choice(candidates, choice.functions, replace=False))


def _describe(trace: Trace, choice: Choice) -> str:
    bound = "" if choice.max_per_day is None else f", each called at most {choice.max_per_day} times a day"
    rate = trace.num_requests / max(trace.duration_s, 1e-9)
    return (
        f"{len(trace.names)} functions{bound}; {trace.num_requests} requests in {trace.duration_s / 3600:.2f} h "
        f"({rate:.2f}/s); mean {trace.prompt_tokens.mean():.0f} tokens in, {trace.output_tokens.mean():.0f} out; "
        f"seed {choice.seed}"
    )
