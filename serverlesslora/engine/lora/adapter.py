"""An adapter in memory: per backbone site what it changes there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from serverlesslora.engine.device import LoadedLora
    from serverlesslora.engine.lora.occasional import OccasionalSite, Part
    from serverlesslora.engine.lora.projection import Projection, ProjectionPart


class Adapter:
    """Identified by its digest; compared by identity, so a re-loaded adapter never meets plans of the old one."""

    def __init__(
        self,
        digest: str,
        *,
        projections: Mapping[Projection, ProjectionPart],
        lora: LoadedLora,
        others: Mapping[OccasionalSite, Part],
        kinds: tuple[str, ...],
        rank: int,
        modules: int,
        vocab_size: int,
    ) -> None:
        self.digest = digest
        self.projections = dict(projections)
        self.lora = lora
        self.others = dict(others)
        self.kinds = kinds
        self.rank = rank
        self.vocab_size = vocab_size
        self.modules = modules
        self._is_plain = not self.others and not any(
            part.before or part.after or part.width > projection.width or projection.is_output
            for projection, part in self.projections.items()
        )
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self._tensors()
        }
        self.size_bytes = sum(storages.values()) + lora.nbytes

    @property
    def is_plain(self) -> bool:
        """Nothing but LoRA factors on linears of the body: what a fixed plan of slots can compute."""
        return self._is_plain

    def _tensors(self) -> Iterator[Tensor]:
        for part in (*self.projections.values(), *self.others.values()):
            for tensor in part.tensors:
                if tensor is not None:
                    yield tensor

    def clear(self) -> None:
        """Give the memory back even while somebody still holds this object."""
        self.projections.clear()
        self.others.clear()

    def __repr__(self) -> str:
        return f"Adapter({self.digest[:12]}, rank={self.rank}, modules={self.modules}, kinds={self.kinds})"
