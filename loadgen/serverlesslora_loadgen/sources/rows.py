"""CSV files, packed or not, row by row, with the place of every mistake."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from serverlesslora_loadgen.errors import TraceError
from serverlesslora_loadgen.sources.options import Progress

ROWS_PER_REPORT = 4096
LFS = "version https://git-lfs"


class Row:
    """One row of a file; `line` counts from 1."""

    __slots__ = ("cells", "line", "path")

    def __init__(self, path: Path, line: int, cells: list[str]) -> None:
        self.path, self.line, self.cells = path, line, cells

    def text(self, column: int) -> str:
        try:
            return self.cells[column]
        except IndexError:
            raise self.mistake(f"has {len(self.cells)} cells and no column {column + 1}") from None

    def number(self, column: int, name: str) -> float:
        """Finite. Raises TraceError naming the place."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            raise self.mistake(f"has {text!r} for {name}, which is no number") from None
        if not abs(value) < float("inf"):
            raise self.mistake(f"has {text!r} for {name}, which is no finite number")
        return value

    def count(self, column: int, name: str) -> int:
        """0 or more; `12.0` is 12, as data frames write it. Raises TraceError naming the place."""
        value = self.number(column, name)
        if value < 0 or value != int(value):
            raise self.mistake(f"has {self.text(column)!r} for {name}, which is no count")
        return int(value)

    def mistake(self, what: str) -> TraceError:
        return TraceError(f"{self.path}:{self.line} {what}")


def read_rows(path: Path, progress: Progress | None = None) -> Iterator[Row]:
    """The header too; empty lines left out. Raises TraceError when the file cannot be read."""
    try:
        with path.open("rb") as raw:
            size = max(1, os.fstat(raw.fileno()).st_size)
            data = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw)
            reader = csv.reader(io.TextIOWrapper(data, encoding="utf-8-sig", newline=""))
            for number, cells in enumerate(reader):
                if cells:
                    yield Row(path, reader.line_num, cells)
                if progress is not None and number % ROWS_PER_REPORT == 0:
                    progress(raw.tell() / size)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise TraceError(f"cannot read {path}: {error}") from error
    if progress is not None:
        progress(1.0)


class Columns:
    """Where the columns of a header are. Case, spaces and underscores in names do not matter."""

    def __init__(self, header: Row) -> None:
        self._header = header
        self._places = {_plain(name): place for place, name in reversed(list(enumerate(header.cells)))}

    def find(self, name: str) -> int | None:
        return self._places.get(_plain(name))

    def need(self, names: Sequence[str], what: str) -> list[int]:
        """Raises TraceError naming those that are missing."""
        if missing := [name for name in names if self.find(name) is None]:
            raise TraceError(
                f"{self._header.path} is no {what}: its header has no {', '.join(missing)}{_hint(self._header)}"
            )
        return [self._places[_plain(name)] for name in names]


def read_table(path: Path, progress: Progress | None = None) -> tuple[Row, Iterator[Row]]:
    """The header and the rows below it. Raises TraceError for an empty file."""
    rows = read_rows(path, progress)
    header = next(rows, None)
    if header is None:
        raise TraceError(f"{path} is empty; give a CSV file with a header")
    return header, rows


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "").replace("_", "")


def _hint(header: Row) -> str:
    if header.cells[0].startswith(LFS):
        return "; it is Git LFS's pointer to the data, which `git lfs pull` fetches"
    return f" (it begins with {','.join(header.cells)[:80]!r})"
