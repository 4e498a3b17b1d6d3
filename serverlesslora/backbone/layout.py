"""Decides which parameters must touch each other in memory, and where everything lies.

Projections that read the same input are put side by side, so that one matrix view covers them all and a fused
multiplication costs no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class TensorShape(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    size: int  # bytes


def runs(parameters: Mapping[str, TensorShape]) -> list[tuple[str, ...]]:
    """The order in memory. Names in one tuple follow each other without a gap.

    A group is fused only where all its siblings exist and agree in type and in every dimension but the first.
    """
    order: list[tuple[str, ...]] = []
    placed: set[str] = set()
    for name in parameters:
        if name not in placed:
            run = _fused(name, parameters)
            order.append(run)
            placed.update(run)
    return order


def offsets(order: Iterable[tuple[str, ...]], sizes: Mapping[str, int], start: int = 0) -> tuple[dict[str, int], int]:
    """Byte offset of every name, and the end of the last. The first of each run is aligned."""
    placed: dict[str, int] = {}
    end = start
    for run in order:
        end = -(-end // ALIGNMENT) * ALIGNMENT
        for name in run:
            placed[name] = end
            end += sizes[name]
    return placed, end


def _fused(name: str, parameters: Mapping[str, TensorShape]) -> tuple[str, ...]:
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            siblings = tuple(f"{parent}.{member}.{kind}" if parent else f"{member}.{kind}" for member in group)
            found = [parameters[sibling] for sibling in siblings if sibling in parameters]
            if len(found) == len(group) and len({(tensor.dtype, tensor.shape[1:]) for tensor in found}) == 1:
                return siblings
    return (name,)
