"""The CUDA implementation of `engine.device`; on host memory, with Triton's interpreter, it is the emulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serverlesslora.engine.cuda.kv import DeviceKvStore
from serverlesslora.engine.cuda.lora_store import MAX_ROWS_RANK, DeviceLora, DeviceLoraStore
from serverlesslora.engine.cuda.sampler import DeviceSampler
from serverlesslora.engine.device import Arithmetic, DeviceKind, LayerShape
from serverlesslora.engine.graphs import Capture, CudaCapture, RecordedCapture
from serverlesslora_ipc.cuda.driver import Driver
from serverlesslora_ipc.messages import WorkerLimits
from serverlesslora_kernels.cuda import fused
from serverlesslora_kernels.cuda.attention import DevicePlan
from serverlesslora_kernels.cuda.linear import Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serverlesslora.engine.lora import Adapter
    from serverlesslora.engine.lora.projection import Projection, ProjectionPlan

KV_SHARE = 0.9  # of the device's memory, as the most that one worker's KV may ever take when no limit is given


class CudaArithmetic:
    rms_norm = staticmethod(fused.rms_norm)
    silu_mul = staticmethod(fused.silu_mul)
    gelu_tanh_mul = staticmethod(fused.gelu_tanh_mul)
    rope = staticmethod(fused.rope)

    def __init__(self, products: Linear) -> None:
        self.linear = products.linear
        self.add_linear = products.add_linear


class FixedRows:
    """The inputs of decode graphs of one size: see `engine.decode_graphs`."""

    def __init__(self, rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.plan = DevicePlan.static(rows, max_blocks, block_size, device)
        # One buffer, so that a step costs one copy besides the plan's: tokens, positions, slots.
        self._values = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.token_ids = self._values[0:1]
        self.positions = self._values[1:2]
        self.row_slots = torch.full((rows,), -1, dtype=torch.int32, device=device)

    def fill(
        self,
        token_ids: Sequence[int],
        contexts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        slots: Sequence[int],
        tokens: Tensor | None = None,
    ) -> None:
        count = len(token_ids)
        # Fresh from torch's pinned pool: the copy of the step before may still be under way.
        staging = torch.zeros(self._values.shape, dtype=torch.long, pin_memory=self._values.is_cuda)
        staged = staging.numpy()
        staged[0, :count] = token_ids
        staged[1, :count] = contexts
        staged[1, :count] -= 1
        staged[2] = -1
        staged[2, :count] = slots
        self._values.copy_(staging, non_blocking=True)
        self.row_slots.copy_(self._values[2])
        self.plan.fill(contexts, block_tables)
        if tokens is not None:
            self.token_ids[0, :count].copy_(tokens.clamp(min=0))  # a row without a usable logit ends anyway


class CudaDevice:
    accumulates = True

    def __init__(self, kind: DeviceKind, driver: Driver, products: Linear | None = None) -> None:
        """`driver` has been started by this process."""
        self.kind = kind
        self.driver = driver
        self.torch_device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
        self.arithmetic: Arithmetic = CudaArithmetic(products or Linear())
        self._store: DeviceLoraStore | None = None

    def create_lora_store(self, projections: Sequence[Projection]) -> DeviceLoraStore:
        dtype = projections[0].dtype
        self._store = DeviceLoraStore(projections, self.torch_device, dtype)
        return self._store

    def create_kv(
        self, model: PreTrainedModel, limits: WorkerLimits, shapes: Callable[[], Sequence[LayerShape]]
    ) -> DeviceKvStore:
        return DeviceKvStore(
            self.driver,
            shapes(),
            dtype=model.dtype,
            block_size=limits.block_size,
            capacity_bytes=limits.kv_bytes or int(KV_SHARE * self.driver.memory().total_bytes),
            device=self.torch_device,
        )

    def create_sampler(self) -> DeviceSampler:
        return DeviceSampler()

    # --- graphs

    @property
    def graphs(self) -> CudaDevice:
        return self

    def create_capture(self) -> Capture:
        return CudaCapture(self.torch_device) if self.kind == "cuda" else RecordedCapture()

    def create_rows(self, rows: int, max_blocks: int, block_size: int) -> FixedRows:
        return FixedRows(rows, max_blocks, block_size, self.torch_device)

    def fixed_plans(self, projections: Sequence[Projection], row_slots: Tensor) -> dict[Projection, ProjectionPlan]:
        from serverlesslora.engine.lora.projection import ProjectionPlan

        assert self._store is not None
        scratch = self._store.create_scratch(row_slots.shape[0])
        return {
            projection: ProjectionPlan(
                self._store.rows_update(projection, row_slots, scratch), (), (), projection.width
            )
            for projection in projections
        }

    def slot_of(self, adapter: Adapter) -> int | None:
        lora = adapter.lora
        assert isinstance(lora, DeviceLora)
        return lora.slot if adapter.is_plain and lora.packed.max_total_rank <= MAX_ROWS_RANK else None
