"""The KV cache of all layers in one range of device memory whose pages come and go while the engine runs.

Block first: all layers' keys and values of one block lie together, so a run of blocks is a run of bytes and giving
memory back means unmapping it. The addresses never change, so graphs captured over them stay right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serverlesslora.engine.device import LayerShape
from serverlesslora.errors import ConfigError
from serverlesslora_ipc.cuda.driver import Driver
from serverlesslora_ipc.cuda.elastic import ElasticRange
from serverlesslora_kernels.cuda.attention import DeviceKv, DevicePlan, paged_attention, write_kv
from serverlesslora_kernels.cuda.memory import bytes_at

CHUNK_BYTES = 32 << 20  # mapped and unmapped at once: a call to the driver costs some tens of microseconds
# Left to activations, adapters and graphs, ours and other workers'.
RESERVE_SHARE, RESERVE_BYTES = 0.02, 64 << 20
_ALIGNMENT = 256  # bytes between blocks: whole transactions


class DeviceKvStore:
    def __init__(
        self,
        driver: Driver,
        shapes: Sequence[LayerShape],
        *,
        dtype: torch.dtype,
        block_size: int,
        capacity_bytes: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self._driver = driver
        self._device = device
        layout = plan_layout(shapes, dtype.itemsize, block_size, driver.granularity(), capacity_bytes)
        if layout.num_blocks < 1:
            raise ConfigError(f"kv_bytes {capacity_bytes} is less than one KV block ({layout.block_bytes} bytes)")
        self.block_bytes = layout.block_bytes
        self.blocks_per_chunk = layout.blocks_per_chunk
        self.num_blocks = layout.num_blocks
        self.chunk_bytes = layout.chunk_bytes
        self.reserve_bytes = max(RESERVE_BYTES, int(RESERVE_SHARE * driver.memory().total_bytes))
        self._range = ElasticRange(driver, layout.num_chunks * layout.chunk_bytes, layout.chunk_bytes)
        # The first chunk has memory for good. Every view starts in it, and torch and Triton's launcher ask the driver
        # whose memory an address is: about one without memory it may answer that it is none of the device's.
        self._range.map_chunk(0)
        self._bytes = bytes_at(self._range.address, layout.num_chunks * layout.chunk_bytes, device)
        self._layers = _views(self._bytes.view(dtype), shapes, layout, block_size)

    @property
    def elastic(self) -> DeviceKvStore:
        return self

    # --- what the engine computes with

    def plan(
        self, q_lens: Sequence[int], context_lens: Sequence[int], block_tables: Sequence[Sequence[int]]
    ) -> DevicePlan:
        pin = self._device.type == "cuda"
        return DevicePlan.build(q_lens, context_lens, block_tables, self.block_size, self._device, pin=pin)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: DevicePlan, **options: Any) -> Tensor:
        kv = self._layers[layer]
        write_kv(kv, k, v, plan)
        return paged_attention(q, kv, plan, **options)

    # --- physical memory, for the pool

    def map(self, chunk: int) -> None:
        """Raises OutOfDeviceMemory."""
        if chunk:
            self._range.map_chunk(chunk)

    def unmap(self, chunk: int) -> None:
        """Its content is gone for whoever gets the memory next, whatever the driver does about that.

        The device is waited for: a step on its way may still write to blocks that were released since.
        """
        self._synchronize()
        self._bytes[chunk * self.chunk_bytes : (chunk + 1) * self.chunk_bytes].zero_()
        self._synchronize()
        if chunk:
            self._range.unmap_chunk(chunk)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        return self._driver.memory().free_bytes

    @property
    def size_bytes(self) -> int:
        return len(self._range.resident) * self.chunk_bytes

    def close(self) -> None:
        self._layers.clear()
        self._synchronize()  # a step that nobody wanted any more may be on its way still
        self._range.close()


class KvLayout(NamedTuple):
    """Blocks are padded so that a chunk is a whole number of the driver's granules."""

    block_bytes: int
    blocks_per_chunk: int
    num_chunks: int

    @property
    def num_blocks(self) -> int:
        return self.num_chunks * self.blocks_per_chunk

    @property
    def chunk_bytes(self) -> int:
        return self.block_bytes * self.blocks_per_chunk


def plan_layout(
    shapes: Sequence[LayerShape], itemsize: int, block_size: int, granularity: int, capacity_bytes: int
) -> KvLayout:
    """Chunks of about CHUNK_BYTES, smaller where the whole capacity is small; padding is at most a few percent."""
    payload = sum(shape.width for shape in shapes) * itemsize * block_size
    block_bytes = -(-payload // _ALIGNMENT) * _ALIGNMENT
    target = max(granularity, min(CHUNK_BYTES, capacity_bytes // 4))
    # Blocks per chunk in powers of two: as many as fit the target, then blocks padded until the chunk is whole.
    blocks_per_chunk = 1
    while 2 * blocks_per_chunk * block_bytes <= target:
        blocks_per_chunk *= 2
    step = max(_ALIGNMENT, granularity // blocks_per_chunk)
    block_bytes = -(-block_bytes // step) * step
    num_chunks = capacity_bytes // (block_bytes * blocks_per_chunk)
    # Less than a chunk is rounded up to one: the driver gives no less anyway.
    return KvLayout(block_bytes, blocks_per_chunk, num_chunks or int(capacity_bytes >= payload))


def _views(values: Tensor, shapes: Sequence[LayerShape], layout: KvLayout, block_size: int) -> list[DeviceKv]:
    stride = layout.block_bytes // values.element_size()
    layers: list[DeviceKv] = []
    offset = 0
    for heads, dim_k, dim_v in shapes:
        views = []
        for dim in (dim_k, dim_v):
            size, strides = (layout.num_blocks, block_size, heads, dim), (stride, heads * dim, dim, 1)
            views.append(values.as_strided(size, strides, offset))
            offset += block_size * heads * dim
        layers.append(DeviceKv(*views))
    return layers
