"""How a run is going, as one line that stays in its place on a terminal, or a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from serverlesslora_loadgen.client.drive import Progress

LOG_EVERY_S = 10.0


class RunProgress:
    """`with RunProgress(total) as told: await run(…, told)`."""

    def __init__(self, total: int, what: str = "", *, file: TextIO | None = None) -> None:
        self._total = total
        self._what = what
        self._file = file if file is not None else sys.stderr
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._told_at = self._began = time.monotonic()

    def __enter__(self) -> RunProgress:
        if self._file.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[said]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(file=self._file), transient=True)
            self._task = self._bar.add_task(self._what or "run", total=self._total, said="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, now: Progress) -> None:
        parts = [f"{now.done}/{self._total}", f"{now.in_flight} in flight", f"{now.ok} ok"]
        parts += [f"{count} {name}" for name, count in (("shed", now.shed), ("failed", now.failed)) if count]
        said = ", ".join(parts)
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=now.done, said=said)
        elif time.monotonic() - self._told_at >= LOG_EVERY_S:
            self._told_at = time.monotonic()
            print(f"  {self._told_at - self._began:5.0f} s: {said}", file=self._file, flush=True)
