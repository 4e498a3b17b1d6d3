"""The device lease: one turn at a time, and a holder that dies gives it back."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from serverlesslora.worker.lease import DeviceLease, create_lease_fd


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_lease_fd()
    yield made
    os.close(made)


def is_taken(fd: int) -> bool:
    """Asked by a stranger with an open file description of its own."""
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(own)
    return False


def test_a_turn_excludes_others_and_ends(fd: int) -> None:
    lease = DeviceLease(fd)
    assert not is_taken(fd)
    with lease.turn():
        assert is_taken(fd)
    assert not is_taken(fd)
    with pytest.raises(ZeroDivisionError), lease.turn():
        _ = 1 / 0
    assert not is_taken(fd)
    lease.close()


def test_a_killed_holder_frees_it(fd: int) -> None:
    code = (
        "import sys\n"
        "from serverlesslora.worker.lease import DeviceLease\n"
        f"with DeviceLease({fd}).turn():\n"
        "    print('holding', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        assert is_taken(fd)
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        assert not is_taken(fd)


def test_a_device_of_ones_own_needs_no_lock() -> None:
    with DeviceLease(None).turn():
        pass
