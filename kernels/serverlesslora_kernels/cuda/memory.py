"""Tensors over memory that torch did not allocate: shared regions, elastic ranges."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


class _Region:
    """What torch asks an array of another library: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface"""

    def __init__(self, address: int, size: int) -> None:
        # torch accepts no read-only arrays; where the mapping is read-only the device refuses writes by itself.
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def bytes_at(address: int, size: int, device: torch.device) -> Tensor:
    """uint8 [size] over mapped memory at `address`, copying nothing.

    The caller keeps the mapping for as long as the tensor or a view of it is used: they do not own it. Parts of an
    elastic range that have no memory may be covered as long as nobody touches them.
    """
    if device.type == "cpu":
        region: Tensor = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    else:
        # With a number torch believes us; without one it asks the driver whose memory this is, which an elastic range
        # that starts with a hole cannot answer.
        numbered = torch.device(device.type, device.index if device.index is not None else 0)
        region = torch.as_tensor(_Region(address, size), device=numbered)
    assert region.data_ptr() == address, "torch has copied the region"
    return region
