"""Lines to stderr without ever waiting for whoever reads them: what nobody takes is lost, and counted.

A terminal that is held, or a collector that has stopped, would otherwise stop the event loop and every stream with it.
The descriptor itself stays as it is, since other processes share it; so a pipe is opened once more for each line, which
keeps nothing that a fork could get wrong. A file is written as ever: only its disk can make that wait.
"""

from __future__ import annotations

import os
import select
import socket
import stat

STDERR = 2
_FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Outlet:
    def __init__(self, fd: int = STDERR) -> None:
        self._fd = fd
        self._is_cut = False  # the last line has no end
        self.lost = 0  # lines since the last one that was taken

    def write(self, line: bytes) -> bool:
        """Whether it was taken; a line has its newline."""
        if self._is_cut:
            line = b"\n" + line
        try:
            num_written = _write_now(self._fd, line)
        except OSError:  # full, or nobody is there any more
            num_written = 0
        if num_written:
            self._is_cut = num_written < len(line)
        if num_written < len(line):
            self.lost += 1
            return False
        return True


def _write_now(fd: int, data: bytes) -> int:
    """Raises OSError."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        try:
            again = os.open(f"/proc/self/fd/{fd}", _FLAGS)
        except OSError:  # not ours to open, as a terminal after `su`; one page fits where there is room at all
            return os.write(fd, data[: select.PIPE_BUF]) if _has_room(fd) else 0
        try:
            return os.write(again, data)
        finally:
            os.close(again)
    return os.write(fd, data)


def _has_room(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))
