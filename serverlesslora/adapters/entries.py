"""The store's directory: complete adapters by digest, work under way beside them, and who may touch what.

    <digest>/             an adapter; its time of change says when it was last used
    .incoming-…/          a copy that grows; worthless once its process is gone
    .partial-…/           a transfer that grows; worth going on with for a day
    .leaving-…/           being deleted

Who works in a directory holds a lock on it (flock), which the kernel drops with the process, however it ends: several
servers share one store, and none sweeps away what another one is writing. A lock on the store itself makes looking and
locking one act.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serverlesslora.adapters.quota import Entry

SIZES = ".sizes.json"
PARTIALS_KEPT_S = 24 * 3600.0
_DIGEST = frozenset("0123456789abcdef")


class Entries:
    """Blocking and thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sizes: dict[str, int] = {}  # of entries, which never change: thousands are not measured again and again
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path_of(self, digest: str) -> Path:
        return self.directory / digest

    def has(self, digest: str) -> bool:
        return self.path_of(digest).is_dir()

    def entries(self) -> list[Entry]:
        found = []
        for path in self.directory.iterdir():
            with contextlib.suppress(OSError):  # another server may evict it while we look
                if len(path.name) == 64 and _DIGEST.issuperset(path.name):
                    used_at = path.stat().st_mtime
                    if path.name not in self._sizes:
                        self._sizes[path.name] = size_of(path)
                    found.append(Entry(path.name, self._sizes[path.name], used_at))
        return found

    def used(self, digest: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.path_of(digest))

    def sizes_agree(self, digest: str) -> bool | None:
        """Of the files of an entry with what was written down; None: nothing legible was.

        Raises OSError when it cannot be told now, which says nothing against the entry.
        """
        path = self.path_of(digest)
        try:
            sizes = msgspec.json.decode((path / SIZES).read_bytes(), type=dict[str, int])
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        try:
            return all((path / name).lstat().st_size == size for name, size in sizes.items())
        except FileNotFoundError:
            return False

    # --- work under way

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """A new directory, gone at the end unless it became an entry."""
        with self._exclusive():
            path = Path(tempfile.mkdtemp(prefix=".incoming-", dir=self.directory))
            lock = _locked(path)
        assert lock is not None
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    @contextlib.contextmanager
    def partial(self, key: str) -> Iterator[Path]:
        """The directory of one transfer, with what an earlier one left there; stays if it does not become an entry."""
        with self._exclusive():
            number = 0
            while True:  # another transfer of the same source works in the first one
                path = self.directory / f".partial-{key}-{number}"
                path.mkdir(exist_ok=True, mode=0o700)
                if (lock := _locked(path)) is not None:
                    break
                number += 1
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.rmdir()  # if nothing has arrived
            os.close(lock)

    def commit(self, path: Path, digest: str) -> None:
        """The finished directory becomes the entry of its digest, visible at once and as a whole."""
        sizes = {each.name: each.stat().st_size for each in path.iterdir()}
        with open(path / SIZES, "wb") as out:
            out.write(msgspec.json.encode(sizes))
            out.flush()
            os.fsync(out.fileno())
        _sync(path)
        os.utime(path)
        target = self.path_of(digest)
        try:
            path.rename(target)
        except OSError:
            # Another request stored the same content first: same digest, same bytes.
            if not target.is_dir():
                raise
            shutil.rmtree(path, ignore_errors=True)
            self.used(digest)
        _sync(self.directory)

    def remove(self, digest: str) -> None:
        self.delete(self.hide(digest))

    def hide(self, digest: str) -> Path | None:
        """It is invisible first and deleted then, so that nobody ever sees half of it."""
        leaving = self.directory / f".leaving-{digest[:16]}-{os.getpid()}-{time.monotonic_ns()}"
        self._sizes.pop(digest, None)
        try:
            self.path_of(digest).rename(leaving)
        except FileNotFoundError:  # another server was first
            return None
        return leaving

    def delete(self, hidden: Path | None) -> None:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)

    def sweep(self, *, keep_partials_s: float = PARTIALS_KEPT_S) -> None:
        """Drop what killed processes left; not what a living one works on."""
        with self._exclusive():
            for path in self.directory.glob(".*-*"):
                if path.name.startswith(".partial-") and _age_s(path) < keep_partials_s:
                    continue
                with contextlib.suppress(OSError):  # what cannot be swept keeps nobody from serving
                    lock = _locked(path)
                    if lock is not None:
                        shutil.rmtree(path, ignore_errors=True)
                        os.close(lock)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def size_of(directory: Path) -> int:
    return sum(each.lstat().st_size for each in directory.iterdir())


def _locked(directory: Path) -> int | None:
    """A descriptor that holds the lock; None: somebody works there (or it is gone).

    Raises OSError when nobody can tell: without descriptors every directory would look as if somebody worked there.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def _age_s(directory: Path) -> float:
    """Since anything was written in it."""
    try:
        times = [directory.stat().st_mtime, *(each.stat().st_mtime for each in directory.iterdir())]
    except OSError:
        return 0.0
    return time.time() - max(times)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
