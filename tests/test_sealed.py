"""Sealed memory: every way of writing to it is refused by the kernel, and nothing of it has a name."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import xxhash

from serverlesslora_ipc import sealed
from serverlesslora_ipc.sealed import Draft, NotSealed

SIZE = 1 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    with Draft("test", SIZE) as draft:
        draft.map[:] = bytes(range(256)) * (SIZE // 256)
        fd = draft.seal()
    yield fd
    os.close(fd)


def digest(fd: int) -> str:
    return xxhash.xxh3_128_hexdigest(os.pread(fd, SIZE, 0))


def test_reading_works(fd: int) -> None:
    sealed.check_sealed(fd)
    with sealed.map_readonly(fd, SIZE) as region:
        assert region[:300] == (bytes(range(256)) * 2)[:300]
    assert not os.get_inheritable(fd)


def test_mapping_for_writing_is_refused(fd: int) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_readonly_map_cannot_become_writable(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(SIZE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() in (errno.EACCES, errno.EPERM)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))


def test_reopening_for_writing_gives_nothing_to_write_with(fd: int) -> None:
    try:
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    except PermissionError:
        return  # newer kernels refuse already here
    try:
        with pytest.raises(PermissionError):
            os.pwrite(writable, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(writable, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(writable, 0)
    finally:
        os.close(writable)


def test_changing_the_size_or_the_seals_is_refused(fd: int) -> None:
    for size in (0, 2 * SIZE):
        with pytest.raises(OSError):
            os.ftruncate(fd, size)
        with pytest.raises(OSError):
            os.truncate(f"/proc/self/fd/{fd}", size)
    with pytest.raises(OSError):
        os.posix_fallocate(fd, 0, 2 * SIZE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    assert os.fstat(fd).st_size == SIZE


def test_a_process_that_writes_dies_alone(fd: int) -> None:
    before = digest(fd)
    writer = (
        "import ctypes, mmap, sys\n"
        "from serverlesslora_ipc import sealed\n"
        "region = sealed.map_readonly(int(sys.argv[1]))\n"
        "with sealed._address(region) as address:\n"
        "    print('writing', flush=True)\n"
        "    ctypes.memset(address, 1, 1)\n"
        "print('written')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", writer, str(fd)],
        pass_fds=[fd],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "writing\n")
    assert digest(fd) == before


def test_sealing_waits_for_the_last_view() -> None:
    with Draft("test", SIZE) as draft:
        view = memoryview(draft.map)
        with pytest.raises(BufferError):
            draft.seal()
        view.release()
        os.close(draft.seal())


def test_what_is_not_sealed_is_told_from_what_is(fd: int) -> None:
    plain = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(NotSealed, match="seals are 0x0"):
        sealed.check_sealed(plain)
    with pytest.raises(NotSealed, match="not a memory file"):
        sealed.check_sealed(null)
    with pytest.raises(NotSealed, match="expected 5"):
        sealed.map_readonly(fd, 5)
    os.close(plain)
    os.close(null)


def test_populate_fills_the_page_tables(fd: int) -> None:
    with sealed.map_readonly(fd) as region:
        if not sealed.populate(region):
            pytest.skip("the kernel has no MADV_POPULATE_READ")
        with open("/proc/self/smaps") as file:
            text = file.read()
    mapping = text[text.index("memfd:test") :]
    resident = next(line for line in mapping.splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) << 10 == SIZE


def test_an_abandoned_draft_leaves_nothing() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with Draft("test", SIZE) as draft:
        draft.map[0] = 1
    assert sorted(os.listdir("/proc/self/fd")) == before
