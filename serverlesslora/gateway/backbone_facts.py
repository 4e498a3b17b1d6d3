"""What is known of a backbone from what its processes have said: sizes, limits, and what each kind of start takes."""

from __future__ import annotations

from serverlesslora_ipc.messages import Prepared, Published, Ready


class BackboneFacts:
    """Seconds and bytes, of the last time each was seen; 0 before. They are kept while the backbone rests."""

    def __init__(self) -> None:
        self.published: Published | None = None
        self.prepared: Prepared | None = None  # by a launcher, or by a worker that has none
        self.told: Ready | None = None  # by a worker that serves a domain
        self.prepare_s = 0.0  # a launcher with its libraries, until it could fork
        self.copy_s = 0.0  # a worker's private copy, from memory
        self._load_s = 0.0

    def learn_start(self, ready: Ready, *, is_typical: bool) -> None:
        """`is_typical`: False for one that only looks at an adapter, which captures nothing."""
        self.copy_s = ready.copy_s or self.copy_s
        self._load_s = ready.load_s or self._load_s
        if is_typical:
            self.told = ready

    @property
    def load_s(self) -> float:
        """From disk, in a process with its libraries."""
        return self.published.seconds - self.published.libraries_s if self.published else self._load_s

    @property
    def libraries_s(self) -> float:
        """A fresh launcher or worker, until everything was imported."""
        return self.prepared.libraries_s if self.prepared else 0.0

    @property
    def copy_bytes(self) -> int:
        """What one copy of the weights takes, shared or private."""
        if self.published is not None:
            return self.published.size_bytes
        return self.prepared.size_bytes if self.prepared else 0

    @property
    def context_length(self) -> int | None:
        return self.prepared.context_length if self.prepared else None

    @property
    def kv_bytes_per_token(self) -> int:
        return self.prepared.kv_bytes_per_token if self.prepared else 0
