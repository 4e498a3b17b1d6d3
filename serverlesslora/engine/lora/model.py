"""LoraModel: one backbone, wrapped once, serving any number of adapters by segments of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from serverlesslora.engine.device import Device, LoraStore
from serverlesslora.engine.host_device import HOST
from serverlesslora.engine.lora.adapter import Adapter
from serverlesslora.engine.lora.batch import Batch, Segment
from serverlesslora.engine.lora.projection import Projection
from serverlesslora.engine.lora.sites import Sites
from serverlesslora.engine.lora.strict import load_adapter


class LoraModel:
    """The backbone's weights are only read; an adapter's tensors live here until it is unloaded."""

    def __init__(self, model: PreTrainedModel, device: Device = HOST) -> None:
        self._batch = Batch()
        self._sites = Sites(model, self._batch, device)

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's embedding; an adapter may bring more."""
        return self._sites.vocab_size

    def set_segments(self, segments: Sequence[Segment]) -> None:
        """Announce the rows that the next forward (of the body, or of lm_head alone) will see, sorted, no gaps."""
        self._batch.set(segments)

    @property
    def batch(self) -> Batch:
        return self._batch

    @property
    def store(self) -> LoraStore:
        return self._sites.store

    @property
    def projections(self) -> Sequence[Projection]:
        """In the order the model tree has them; the output embedding's is among them if it is a plain linear."""
        return self._sites.projections

    def load(self, path: Path, digest: str) -> Adapter:
        """`read` and `admit` in one."""
        adapter = self.read(path, digest)
        self.admit(adapter)
        return adapter

    def read(self, path: Path, digest: str) -> Adapter:
        """Read a PEFT directory strictly; raises AdapterInvalid with the reason for the adapter's owner.

        Changes nothing that a running step looks at.
        """
        return load_adapter(path, digest, self._sites)

    def admit(self, adapter: Adapter) -> None:
        """Between steps: from the next one on, segments may name it."""
        for site in adapter.others:
            site.retain()

    def discard(self, adapter: Adapter) -> None:
        """Free what was read but not admitted."""
        self._sites.store.unload(adapter.lora)
        adapter.clear()

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter that no running request uses; its memory is free when this returns."""
        if self._batch.uses(adapter):
            self._batch.set(())
        self._batch.forget(adapter)
        for site in adapter.others:
            site.release()
        self.discard(adapter)
