"""One adapter from far away into a directory: several files at once, continued where an earlier try ended, checked.

A file lies under its own name while it grows, with what it is a part of beside it (`.NAME.part`). A later try goes on
behind the last byte if the source still has the same version, and starts over if not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from serverlesslora.adapters.files import CHUNK, CONFIG, WEIGHTS, check_size, limit_of
from serverlesslora.adapters.remote import Absent, Algorithm, Reading, Remote, RemoteFile, Transient
from serverlesslora.errors import AdapterInvalid, Unavailable

FILES_AT_ONCE = 4
BACKOFF_S = 0.2
BUFFER = 1 << 16  # small, so that a killed transfer has on disk what it had read
MAX_TRIES = 100  # of one step, however much each of them brought
REQUIRED = (CONFIG, WEIGHTS)


class TransferLimits(msgspec.Struct, frozen=True):
    max_bytes: int  # of the weights
    timeout_s: float = 600.0  # for everything together
    tries: int = 5  # without a new byte
    backoff_s: float = BACKOFF_S  # before the second try; doubles


class Part(msgspec.Struct, frozen=True):
    """Of what a growing file is a part."""

    version: str | None
    size: int | None


class Stopped(Exception):
    """Another file failed, or the server shuts down."""


class Transfer:
    def __init__(
        self,
        remote: Remote,
        into: Path,
        limits: TransferLimits,
        *,
        reserve: Callable[[int], None] = lambda size: None,
        on_bytes: Callable[[int], None] = lambda count: None,
        stop: threading.Event | None = None,
    ) -> None:
        """`reserve` is told the whole size where it is known before, and may raise. `on_bytes`: bytes that arrived,
        called from several threads.
        """
        self._remote = remote
        self._into = into
        self._limits = limits
        self._reserve = reserve
        self._on_bytes = on_bytes
        self._stop = stop or threading.Event()
        self._has_failed = threading.Event()
        self._ends_at = time.monotonic() + limits.timeout_s

    def run(self) -> None:
        """Raises AdapterInvalid, NotFound, Unavailable, OSError (of our own disk) or Stopped. Blocks."""
        # What comes a byte at a time never waits long enough for a timeout, and headers have no chunk to look after.
        alarm = threading.Timer(self._limits.timeout_s, self._remote.close)
        alarm.daemon = True
        alarm.start()
        try:
            self._run()
        finally:
            alarm.cancel()

    def _run(self) -> None:
        files = self._patiently(self._remote.files)
        for file in files:
            if file.size is not None:
                check_size(file.name, file.size, self._limits.max_bytes)
        if all(file.size is not None for file in files):
            self._reserve(sum(file.size or 0 for file in files))
        self._drop_all_but({file.name for file in files})
        pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="adapter-file")
        try:
            jobs = [pool.submit(self._fetch, file) for file in files]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            failures = [error for job in done if (error := job.exception()) is not None]
            if failures:
                self._has_failed.set()
                self._remote.close()
                raise next((error for error in failures if not isinstance(error, Stopped)), failures[0])
        finally:
            pool.shutdown(cancel_futures=True)
        for part in self._into.glob(".*.part"):
            part.unlink()

    # --- one file

    def _fetch(self, file: RemoteFile) -> None:
        try:
            resumed = self._patiently(lambda: self._complete(file), file.name)
            if (found := self._failed_check(file)) and resumed:
                self._drop(file.name)  # what lay here already may be to blame
                self._patiently(lambda: self._complete(file), file.name)
                found = self._failed_check(file)
            if found:
                self._drop(file.name)
                raise AdapterInvalid(f"{file.name} is damaged: {found}", param="lora_path")
        except Absent:
            self._drop(file.name)
            if file.name in REQUIRED:
                hint = "this is not a PEFT adapter directory" if file.name == CONFIG else "it holds no safetensors"
                raise AdapterInvalid(f"{file.name} is missing: {hint}", param="lora_path") from None

    def _complete(self, file: RemoteFile) -> bool:
        """One try. True: some of it lay here already."""
        part = self._part(file.name)
        path = self._into / file.name
        have = path.stat().st_size if part is not None and path.exists() else 0
        version = part.version if part is not None else None
        if version is None:
            have = 0
        # The last byte is read once more, because nobody can be asked for nothing.
        offset = max(0, min(have, part.size if part is not None and part.size is not None else have) - 1)
        if file.version is not None and file.version != version:
            offset = 0
        with self._remote.open(file, offset=offset, version=version if offset else None) as reading:
            size = reading.size
            if reading.offset and Part(reading.version, size) != part:  # it went on with something else
                self._drop(file.name)
                raise Transient(f"{file.name} changed while it was read")
            if file.size is not None and size is not None and size != file.size:
                raise AdapterInvalid(
                    f"{file.name} has {size} bytes, and should have {file.size}: the source contradicts itself",
                    param="lora_path",
                )
            if size is not None:
                check_size(file.name, size, self._limits.max_bytes)
            self._note(file.name, Part(reading.version, size))
            self._append(file.name, path, reading)
        return reading.offset > 0

    def _append(self, name: str, path: Path, reading: Reading) -> None:
        limit = limit_of(name, self._limits.max_bytes)
        size = reading.offset
        with open(path, "r+b" if reading.offset else "wb", buffering=BUFFER) as out:
            out.seek(size)
            out.truncate()
            for chunk in reading.chunks:
                self._go_on()
                size += len(chunk)
                if size > limit:
                    raise AdapterInvalid(
                        f"{name} grew past the limit of {limit} bytes while it was read", param="lora_path"
                    )
                out.write(chunk)
                self._on_bytes(len(chunk))
            out.flush()
            os.fsync(out.fileno())
        if reading.size is not None and size != reading.size:
            raise Transient(f"{name} ended after {size} of {reading.size} bytes")

    def _failed_check(self, file: RemoteFile) -> str | None:
        for algorithm, expected in file.checks:
            if (found := hash_of(self._into / file.name, algorithm)) != expected.lower():
                return f"its {algorithm} is {found}, and the source says {expected}"
        return None

    # --- parts

    def _part(self, name: str) -> Part | None:
        try:
            return msgspec.json.decode((self._into / f".{name}.part").read_bytes(), type=Part)
        except (OSError, msgspec.MsgspecError):
            return None

    def _note(self, name: str, part: Part) -> None:
        if part != self._part(name):
            # The file is emptied first: bytes of an older version must never be taken for the new one's.
            (self._into / name).write_bytes(b"")
            (self._into / f".{name}.part").write_bytes(msgspec.json.encode(part))

    def _drop(self, name: str) -> None:
        for path in (self._into / f".{name}.part", self._into / name):
            path.unlink(missing_ok=True)

    def _drop_all_but(self, names: set[str]) -> None:
        for path in self._into.iterdir():
            if path.name.removeprefix(".").removesuffix(".part") not in names and path.name not in names:
                path.unlink()

    # --- trying

    def _patiently(self, act: Callable[[], Any], name: str = "") -> Any:
        """Try again while it may help: a number of times without progress, and never past the time limit."""
        failed, most = 0, self._held_bytes(name)
        for _ in range(MAX_TRIES):
            self._go_on()
            try:
                return act()
            except Transient as error:
                held = self._held_bytes(name)
                failed, most = (1, held) if held > most else (failed + 1, most)
                last = error
                if failed >= self._limits.tries:
                    break
                backoff_s = self._limits.backoff_s * 2 ** (failed - 1) * random.uniform(0.5, 1.0)
                self._stop.wait(min(max(backoff_s, error.after_s), max(0.0, self._ends_at - time.monotonic())))
        raise Unavailable(f"the adapter's source does not answer: {last}", retry_after_s=10) from last

    def _held_bytes(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return (self._into / name).stat().st_size
        return 0

    def _go_on(self) -> None:
        if self._stop.is_set() or self._has_failed.is_set():
            raise Stopped
        if time.monotonic() > self._ends_at:
            raise Unavailable(
                f"the adapter was not fetched within {self._limits.timeout_s:g} s; the next try goes on from there",
                retry_after_s=10,
            )


def hash_of(path: Path, algorithm: Algorithm) -> str:
    if algorithm == "git-sha1":  # what git calls a file's content
        hasher = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        hasher = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()
