"""A published backbone as a tensor on this process's device."""

from __future__ import annotations

import torch
from torch import Tensor

from serverlesslora_ipc.cuda import region
from serverlesslora_ipc.cuda.driver import Driver
from serverlesslora_ipc.cuda.region import DeviceRegion
from serverlesslora_ipc.manifest import Manifest
from serverlesslora_ipc.messages import Sharing
from serverlesslora_kernels.cuda.memory import bytes_at


class MappedBackbone:
    """`region` is uint8 [total_bytes]. Nothing on the device may use it or a view of it once it is closed."""

    def __init__(self, mapping: DeviceRegion, device: torch.device) -> None:
        self._mapping = mapping
        self.region: Tensor = bytes_at(mapping.address, mapping.size, device)

    def close(self) -> None:
        """Safe to call twice."""
        self._mapping.close()

    def __enter__(self) -> MappedBackbone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def map_backbone(
    driver: Driver, sharing: Sharing, fd: int | None, handle: bytes, manifest: Manifest, torch_device: torch.device
) -> MappedBackbone:
    """Maps what a host published. The descriptor stays the caller's and may be closed after."""
    mapping = region.attach(driver, sharing, fd, handle, manifest.total_bytes)
    try:
        return MappedBackbone(mapping, torch_device)
    except BaseException:
        mapping.close()
        raise
