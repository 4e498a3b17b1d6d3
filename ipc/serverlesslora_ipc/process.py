"""What a process tells the kernel about itself: its name, its place in the out-of-memory order, whom it dies with."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterable
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


def _prctl(option: int, value: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Asks for `sig` when the thread that started this process ends. Survives exec, not fork.

    A parent that died earlier is noticed as the end of the channel's stream, so no race is left for the caller.
    """
    _prctl(_PR_SET_PDEATHSIG, int(sig))


def outlive_parent() -> None:
    """Takes `die_with_parent` back."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def take_orphans() -> None:
    """Descendants whose parent dies become children of this process, as they do of process 1. Survives exec."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def gets_orphans() -> bool:
    found = ctypes.c_int(0)
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found))
    return bool(found.value)


def set_name(name: str) -> None:
    """What `ps -o comm` and `top` show; the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def set_oom_score(adjustment: int) -> bool:
    """Moves this process towards (+1000) or away from (-1000) the out-of-memory killer; False where not allowed."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(adjustment))
    except OSError:
        return False
    return True


def leave_signals_to_the_gateway() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group, but requests still run while the gateway drains:
    it alone acts on them, the others follow their channel."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def close_other_fds(keep: Iterable[int]) -> None:
    """Closes every descriptor except stdin, stdout, stderr and `keep`."""
    kept = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:  # the descriptor that listed the folder
                continue


def num_threads() -> int:
    """Threads of this process as the kernel counts them."""
    return len(os.listdir("/proc/self/task"))


def exit_on_hangup(fd: int) -> None:
    """Ends this process at once when the other side of `fd` is gone, whatever the main thread is busy with.

    For a process that has no parent to die with: the thread waits in the kernel for the hang-up alone.
    """
    hangup = select.poll()
    hangup.register(fd, 0)

    def wait() -> None:
        hangup.poll()
        os._exit(0)

    threading.Thread(target=wait, name="hangup", daemon=True).start()
