"""The adapters of one worker: read, admitted, used by requests, freed when their name and their last request end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from serverlesslora.engine.lora import Adapter, LoraModel
from serverlesslora.engine.prompts import TextCodec
from serverlesslora.errors import AdapterInvalid
from serverlesslora_ipc.messages import LoadAdapter, Loaded, Refused


@dataclass(slots=True)
class LoadedAdapter:
    adapter: Adapter
    text: TextCodec
    num_requests: int = 0
    retired: bool = False  # unloaded by name; freed when the last request on it ends


class AdapterRead(NamedTuple):
    """What `AdapterTable.read` has found; without `loaded` and without a refusal it was there already."""

    message: LoadAdapter
    loaded: LoadedAdapter | None
    refusal: str
    seconds: float


class AdapterTable:
    def __init__(self, lora: LoraModel, text: TextCodec, clock: Callable[[], float]) -> None:
        self._lora = lora
        self._text = text
        self._clock = clock
        self._entries: dict[str, LoadedAdapter] = {}
        self.by_digest: dict[str, Adapter] = {}  # of all entries, as steps want them

    def find(self, digest: str) -> LoadedAdapter | None:
        """What new requests may use."""
        entry = self._entries.get(digest)
        return None if entry is None or entry.retired else entry

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(digest for digest, entry in self._entries.items() if not entry.retired)

    @property
    def size_bytes(self) -> int:
        return sum(adapter.size_bytes for adapter in self.by_digest.values())

    def read(self, message: LoadAdapter) -> AdapterRead:
        """The long part of loading: reading, checking, packing, starting the copy to the device.

        Changes nothing that steps look at, so another thread may do it while they run.
        """
        started = self._clock()
        loaded: LoadedAdapter | None = None
        refusal = ""
        if message.digest not in self._entries:
            try:
                loaded = self._read(Path(message.path), message.digest)
            except AdapterInvalid as error:
                refusal = error.message
        return AdapterRead(message, loaded, refusal, self._clock() - started)

    def admit(self, read: AdapterRead) -> Loaded | Refused:
        """From now on requests may name the adapter."""
        digest = read.message.digest
        entry = self._entries.get(digest)
        if entry is None and read.loaded is None and not read.refusal:
            read = self.read(read.message)  # it was there when it was looked for, and has been freed since
        if read.refusal:
            return Refused(digest, read.refusal)
        if entry is None:
            assert read.loaded is not None
            entry = self._entries[digest] = read.loaded
            self.by_digest[digest] = entry.adapter
            self._lora.admit(entry.adapter)
        elif read.loaded is not None:  # read twice at the same time
            self._lora.discard(read.loaded.adapter)
        entry.retired = False
        adapter = entry.adapter
        return Loaded(
            digest,
            read.seconds,
            adapter.size_bytes,
            rank=adapter.rank,
            modules=adapter.modules,
            kinds=adapter.kinds,
        )

    def retire(self, digest: str) -> None:
        """New requests no longer find it; running ones finish on it, then its memory is freed."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.retired = True
            self._free_if_unused(digest, entry)

    def acquire(self, digest: str) -> None:
        self._entries[digest].num_requests += 1

    def release(self, digest: str) -> None:
        entry = self._entries[digest]
        entry.num_requests -= 1
        self._free_if_unused(digest, entry)

    def _read(self, path: Path, digest: str) -> LoadedAdapter:
        adapter = self._lora.read(path, digest)
        try:
            # An adapter may bring its own tokenizer and chat template, and rows for tokens of its own.
            own_size = adapter.vocab_size if adapter.vocab_size != self._lora.vocab_size else None
            text = TextCodec.from_directory(path, self._text, vocab_size=own_size)
        except AdapterInvalid:
            self._lora.discard(adapter)
            raise
        return LoadedAdapter(adapter, text)

    def _free_if_unused(self, digest: str, entry: LoadedAdapter) -> None:
        if entry.retired and entry.num_requests == 0:
            del self._entries[digest]
            del self.by_digest[digest]
            self._lora.unload(entry.adapter)

    def check(self, used: Collection[str]) -> None:
        """Assert that requests are counted right, given the digest of each open request."""
        assert self.by_digest == {digest: entry.adapter for digest, entry in self._entries.items()}
        for digest, entry in self._entries.items():
            assert entry.num_requests == sum(one == digest for one in used)
