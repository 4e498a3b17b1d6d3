"""What the engine needs from a device: two implementations, `host` and `cuda`, behind the same few protocols.

Everything above (sequences, blocks, scheduling, requests, the walk through the model) is the same on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from serverlesslora.engine.kv_pool import Memory
from serverlesslora_ipc.messages import WorkerLimits
from serverlesslora_kernels.segments import LoraPiece

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serverlesslora.engine.decode_graphs import GraphDevice
    from serverlesslora.engine.lora.batch import Batch
    from serverlesslora.engine.lora.projection import Projection
    from serverlesslora.engine.sampler import Sampled, SampleRow
    from serverlesslora_ipc.cuda.driver import Driver

DeviceKind = Literal["cpu", "cuda", "emulated"]


class Arithmetic(Protocol):
    """The operations of a layer besides attention; meanings as in `serverlesslora_kernels.fused` and `.linear`."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """y += x Wᵀ in place, for 2-d y and x: the residual stream takes a projection without a copy of itself."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor: ...

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


class LayerShape(NamedTuple):
    """What one attention layer keeps per token."""

    kv_heads: int
    dim_k: int
    dim_v: int

    @property
    def width(self) -> int:
        return self.kv_heads * (self.dim_k + self.dim_v)


class ElasticKv(Memory, Protocol):
    blocks_per_chunk: int
    chunk_bytes: int
    reserve_bytes: int  # of the device, never taken for keys and values


class KvStore(Protocol):
    """The paged keys and values of all layers."""

    num_blocks: int
    block_size: int

    @property
    def elastic(self) -> ElasticKv | None:
        """Where memory comes and goes; None: all blocks are there from the start."""

    def plan(self, q_lens: Sequence[int], context_lens: Sequence[int], block_tables: Sequence[Sequence[int]]) -> Any:
        """Where the rows of one step sit; handed back to every `attend` of the step."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: Any, **options: Any) -> Tensor:
        """Store k and v of the new tokens [T, kv_heads, dim], then attend: q [T, q_heads, dim_k] -> [.., .., dim_v].

        `options` are scale, sliding_window, softcap and sinks, as in `serverlesslora_kernels.attention`.
        """

    @property
    def size_bytes(self) -> int:
        """Memory taken now."""

    def close(self) -> None: ...


class LoadedLora(Protocol):
    """One adapter's plain LoRA, in the form the device's kernels read."""

    @property
    def nbytes(self) -> int: ...


class Update(Protocol):
    """What the adapters of one batch add to the output of one projection."""

    def apply(self, y: Tensor, x: Tensor) -> None:
        """y [rows, n] += what the adapters make of x [rows, k], in place."""


class LoraStore(Protocol):
    """Where adapters' plain LoRA weights are kept."""

    def load(self, pieces: Mapping[Projection, Sequence[LoraPiece]], dtype: torch.dtype) -> LoadedLora: ...

    def unload(self, lora: LoadedLora) -> None: ...

    def require(self, loras: Sequence[LoadedLora]) -> None:
        """The next step uses these: they must be where the kernels find them."""

    def warm_up(self, dtype: torch.dtype) -> None:
        """Have ready what `update` may need, so that no request waits for a compiler."""

    def update(self, projection: Projection, entries: Sequence[tuple[int, int, LoadedLora]], batch: Batch) -> Update:
        """For sorted, disjoint row ranges; kept while the same segments return."""


class Choosing(Protocol):
    """One token per row is being chosen."""

    @property
    def tokens(self) -> Tensor | None:
        """int64 [rows] on the device, for the step after; None where the host chooses."""

    def wait(self) -> list[Sampled]: ...


class TokenSampler(Protocol):
    def begin(self, logits: Tensor, rows: Sequence[SampleRow]) -> Choosing: ...

    def is_on_device(self, rows: Sequence[SampleRow]) -> bool:
        """Whether `begin` would choose all of them without the host."""

    def score(self, logits: Tensor, token_ids: Sequence[int], alternatives: int) -> list[Sampled]: ...


class Device(Protocol):
    @property
    def kind(self) -> DeviceKind: ...

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def arithmetic(self) -> Arithmetic: ...

    @property
    def accumulates(self) -> bool:
        """Whether `add_linear` is as fast as `linear`."""

    @property
    def graphs(self) -> GraphDevice | None:
        """How decode steps are captured; None where Python is no burden."""

    def create_lora_store(self, projections: Sequence[Projection]) -> LoraStore: ...

    def create_kv(
        self, model: PreTrainedModel, limits: WorkerLimits, shapes: Callable[[], Sequence[LayerShape]]
    ) -> KvStore:
        """`shapes` runs the model once to see what its layers keep; not called where that is not needed."""

    def create_sampler(self) -> TokenSampler: ...


def open_device(kind: DeviceKind, driver: Driver | None = None) -> Device:
    """The device of this process. A `driver` that was started already is used instead of a new one."""
    if kind == "cpu":
        from serverlesslora.engine.host_device import HOST

        return HOST
    from serverlesslora.engine.cuda.device import CudaDevice

    if driver is None:
        from serverlesslora_ipc.cuda.driver import open_driver

        driver = open_driver(kind)
        driver.start()
    return CudaDevice(kind, driver)
