"""What a transfer needs from a place that is not this machine: which files are there, and their bytes from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import msgspec

Algorithm = Literal["sha256", "md5", "git-sha1"]


class Check(NamedTuple):
    """What the source says of a file's content."""

    algorithm: Algorithm
    hexdigest: str


class RemoteFile(msgspec.Struct, frozen=True):
    """`version` changes with the content, if the source says one; unknown facts are None."""

    name: str
    size: int | None = None
    version: str | None = None
    checks: tuple[Check, ...] = ()


class Reading(NamedTuple):
    """Bytes of a file from `offset` on, which is 0 where the source did not go on from where it was asked."""

    offset: int
    size: int | None  # of the whole file
    version: str | None
    chunks: Iterator[bytes]


class Absent(Exception):
    """There is no such file."""


class Transient(Exception):
    """It did not work now; it may if tried again."""

    def __init__(self, message: str, *, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Remote(Protocol):
    """Everything here blocks, and raises Transient or ServerlessLoraError."""

    def files(self) -> list[RemoteFile]:
        """Files that may be there (all that an adapter may have, where a place cannot be listed)."""

    def open(self, file: RemoteFile, *, offset: int, version: str | None) -> AbstractContextManager[Reading]:
        """Go on at `offset` if the file is still of `version`. Raises Absent as well."""

    def close(self) -> None:
        """Also ends what is being read, from any thread."""
