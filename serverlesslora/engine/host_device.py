"""The CPU: native kernels over host memory, everything allocated when first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from serverlesslora.engine.device import Arithmetic, DeviceKind, LayerShape, LoadedLora
from serverlesslora.engine.sampler import Sampler
from serverlesslora.errors import ConfigError
from serverlesslora_ipc.messages import WorkerLimits
from serverlesslora_kernels import fused
from serverlesslora_kernels.attention import AttentionPlan, KvCache, allocate_kv, paged_attention, write_kv
from serverlesslora_kernels.linear import linear
from serverlesslora_kernels.segments import LoraPiece, LoraWeights, SegmentTable
from serverlesslora_kernels.sgmv import sgmv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serverlesslora.engine.lora.batch import Batch
    from serverlesslora.engine.lora.projection import Projection


class HostArithmetic:
    linear = staticmethod(linear)
    rms_norm = staticmethod(fused.rms_norm)
    silu_mul = staticmethod(fused.silu_mul)
    gelu_tanh_mul = staticmethod(fused.gelu_tanh_mul)
    rope = staticmethod(fused.rope)

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        y += linear(x, weight)


class HostKv:
    """One cache per layer, made when the layer is first seen; pages nobody wrote to cost no memory."""

    elastic = None

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._device = device
        self._layers: dict[int, KvCache] = {}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)

    def plan(
        self, q_lens: Sequence[int], context_lens: Sequence[int], block_tables: Sequence[Sequence[int]]
    ) -> AttentionPlan:
        return AttentionPlan.build(q_lens, context_lens, block_tables, self.block_size, self._device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, **options: Any) -> Tensor:
        cache = self._layers.get(layer)
        if cache is None:
            cache = self._layers[layer] = allocate_kv(
                self.num_blocks, self.block_size, k.shape[1], k.shape[2], v.shape[2], k.dtype, k.device
            )
        write_kv(*cache, k, v, plan)
        return paged_attention(q, *cache, plan, **options)

    def close(self) -> None:
        self._layers.clear()


class HostLora:
    def __init__(self, weights: dict[Projection, LoraWeights]) -> None:
        self.weights = weights
        self.nbytes = sum(packed.nbytes for packed in weights.values())


class HostUpdate:
    def __init__(self, table: SegmentTable) -> None:
        self._table = table

    def apply(self, y: Tensor, x: Tensor) -> None:
        sgmv(y, x, self._table)


class HostLoraStore:
    def load(self, pieces: Mapping[Projection, Sequence[LoraPiece]], dtype: torch.dtype) -> HostLora:
        return HostLora({projection: LoraWeights.pack(group, dtype) for projection, group in pieces.items()})

    def unload(self, lora: LoadedLora) -> None:
        cast(HostLora, lora).weights.clear()

    def require(self, loras: Sequence[LoadedLora]) -> None:
        """Host memory is where the kernels read."""

    def warm_up(self, dtype: torch.dtype) -> None:
        """The native kernels were compiled when they were loaded."""

    def update(
        self, projection: Projection, entries: Sequence[tuple[int, int, LoadedLora]], batch: Batch
    ) -> HostUpdate:
        return HostUpdate(
            SegmentTable((start, end, cast(HostLora, lora).weights[projection]) for start, end, lora in entries)
        )


class HostDevice:
    kind: DeviceKind = "cpu"
    torch_device = torch.device("cpu")
    graphs = None
    accumulates = False  # a second pass over the output, where the native kernel has none

    def __init__(self) -> None:
        self.arithmetic: Arithmetic = HostArithmetic()

    def create_lora_store(self, projections: Sequence[Projection]) -> HostLoraStore:
        return HostLoraStore()

    def create_kv(
        self, model: PreTrainedModel, limits: WorkerLimits, shapes: Callable[[], Sequence[LayerShape]]
    ) -> HostKv:
        from serverlesslora.engine.attention import bytes_per_token

        block_bytes = bytes_per_token(model.config.get_text_config(), model.dtype) * limits.block_size
        num_blocks = limits.kv_bytes // block_bytes
        if num_blocks < 1:
            raise ConfigError(f"kv_bytes {limits.kv_bytes} is less than one KV block ({block_bytes} bytes)")
        return HostKv(num_blocks, limits.block_size, model.device)

    def create_sampler(self) -> Sampler:
        return Sampler()


HOST = HostDevice()
