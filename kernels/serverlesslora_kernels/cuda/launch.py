"""The one place where a Triton program is started, so that a recorder can see it between torch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils._python_dispatch import _get_current_dispatch_mode


@runtime_checkable
class LaunchRecorder(Protocol):
    """A torch dispatch mode that wants to be told of launches as well: they bypass torch's dispatcher."""

    def launch(self, program: Any, grid: Sequence[int], arguments: Sequence[Any], options: dict[str, Any]) -> None: ...


def launch(program: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """`program[grid](*arguments, **options)`; `options` are the program's constexprs, num_warps and num_stages."""
    mode: object = _get_current_dispatch_mode()
    # Asking a protocol takes microseconds, hundreds of times a step; nearly always there is no mode.
    if mode is not None and isinstance(mode, LaunchRecorder):
        mode.launch(program, grid, arguments, options)
    else:
        program[tuple(grid)](*arguments, **options)
