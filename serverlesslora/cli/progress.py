"""What a server tells while it carries out a change: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from serverlesslora.cli.client import RefusedByServer, plain
from serverlesslora.errors import Unavailable
from serverlesslora.gateway.telling import ChangeEvent

LINE_EVERY_S = 5.0  # of one transfer, where nothing can be overwritten


def follow(events: Iterable[ChangeEvent], *, functions: int, console: Console | None = None) -> ChangeEvent:
    """The last event, with the result. Raises RefusedByServer, or Unavailable when there is none."""
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    shown = _Bars(console, functions) if console.is_terminal else _Lines(console)
    with shown:
        for event in events:
            if event.error is not None:
                raise RefusedByServer(event.error)
            if event.is_last:
                return event
            shown.show(event)
    raise Unavailable("the server ended its answer without a result; look at its log")


class _Lines:
    """Only of transfers: everything else is quick."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told_at: dict[str | None, float] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: ChangeEvent) -> None:
        now = time.monotonic()
        if event.done_bytes is not None and now - self._told_at.get(event.function, -LINE_EVERY_S) >= LINE_EVERY_S:
            self._told_at[event.function] = now
            self._console.print(_line(event), soft_wrap=True)


class _Bars:
    def __init__(self, console: Console, functions: int) -> None:
        # Names come from users, and are no markup.
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
        self._progress = Progress(*columns, console=console, transient=True)
        self._functions = functions
        self._ready = 0
        self._all = self._progress.add_task("functions", total=functions, amount=f"0/{functions}")
        self._transfers: dict[str | None, TaskID] = {}

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, event: ChangeEvent) -> None:
        if event.done_bytes is None:
            if (gone := self._transfers.pop(event.function, None)) is not None:
                self._progress.remove_task(gone)
            self._ready += event.step == "ready"
            amount = f"{self._ready}/{self._functions}"
            self._progress.update(self._all, description=_step(event), completed=self._ready, amount=amount)
            return
        if event.function not in self._transfers:
            self._transfers[event.function] = self._progress.add_task(_step(event), amount="")
        task = self._transfers[event.function]
        self._progress.update(task, completed=event.done_bytes, total=event.total_bytes, amount=_amount(event))


def _step(event: ChangeEvent) -> str:
    return f"{event.step} {plain(event.function or '').plain}"


def _line(event: ChangeEvent) -> str:
    return f"{_step(event)}: {_amount(event)}"


def _amount(event: ChangeEvent) -> str:
    done = f"{(event.done_bytes or 0) / 1e6:.1f}"
    return f"{done} MB" if event.total_bytes is None else f"{done} of {event.total_bytes / 1e6:.1f} MB"
