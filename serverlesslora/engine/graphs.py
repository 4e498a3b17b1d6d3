"""Recording a computation once and replaying it without Python: CUDA graphs, and their twin on host memory.

A graph repeats exactly what was launched while it was captured, on the same memory: values that Python computed are
baked in, so everything that changes from one replay to the next must be in a tensor that is overwritten in place. The
twin keeps that rule: it replays the recorded torch operators and Triton launches into the tensors they produced at
capture. What would be stale on a GPU is stale in the twin; and as a GPU's graph keeps nobody else's memory alive,
the twin raises where memory from outside is gone at a replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
# Operators whose result Python waits for, or whose shape depends on data.
_WAITS = {
    _aten._local_scalar_dense,
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index}


class NotCapturable(Exception):
    """The computation looks at its data on the way; the message names the operator."""


class Graph(Protocol):
    def replay(self) -> None: ...


class Captured(NamedTuple):
    graph: Graph
    output: Tensor  # overwritten by every replay


class Capture(Protocol):
    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        """Raises NotCapturable. `function` may run several times; its last run is what is repeated."""


class CudaCapture:
    """CUDA graphs that share one memory pool: they are replayed one at a time, so their temporaries may overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                with _Guard():  # type: ignore[no-untyped-call]
                    function()
                function()  # libraries allocate and choose on their first calls, which a capture would not survive
        except torch.OutOfMemoryError as error:
            raise NotCapturable("the device has no memory left for it") from error
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = function()
        except RuntimeError as error:
            self._abandon(main)
            raise NotCapturable(str(error).splitlines()[0]) from error
        return Captured(graph, output)

    def _abandon(self, main: torch.cuda.Stream) -> None:
        """A capture that broke leaves this thread on its stream and, before torch 2.12, the allocator inside it: the
        next `empty_cache` would be an internal error."""
        torch.cuda.set_stream(main)
        with contextlib.suppress(RuntimeError):  # the allocator has left it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        torch.cuda.synchronize()


class RecordedCapture:
    """The twin: eager on any device, with a graph's semantics."""

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        recorder = _Recorder()
        with recorder:
            output = function()
        return Captured(recorder, output)


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets operators through unless a capture could not contain them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # what is made of other operators is looked at in its parts
            with self:
                return func.decompose(*args, **(kwargs or {}))
        _refuse_waiting(func, args)
        return self._compute(func, args, kwargs or {})

    def _compute(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class _Outside(NamedTuple):
    """A tensor over memory that was there before the capture: found again at a replay, not kept."""

    memory: StorageWeakRef
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Outside:
        memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return cls(memory, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def find(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if storage is None:
            raise RuntimeError("memory that a graph works on was freed since it was captured")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class _Recorder(_Guard):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[Callable[[], None]] = []
        self._own: dict[int, Tensor] = {}  # by storage: what the computation itself made, kept like a graph's pool

    def _remember(self, value: Any) -> Any:
        """Arguments with their tensors in a form that keeps only the graph's own memory alive."""
        own = self._own
        return tree_map_only(Tensor, lambda t: t if t.untyped_storage()._cdata in own else _Outside.of(t), value)

    def _compute(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view: it stays one
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        fresh = [
            out if alias is None and isinstance(out, Tensor) else None
            for out, alias in zip(outputs, aliases, strict=False)
        ]
        remembered = self._remember((args, kwargs))
        for out in fresh:
            if out is not None:
                self._own[out.untyped_storage()._cdata] = out

        def again() -> None:
            found_args, found_kwargs = _find(remembered)
            repeated = func(*found_args, **found_kwargs)
            for place, out in zip(
                fresh, repeated if isinstance(repeated, (tuple, list)) else (repeated,), strict=False
            ):
                if place is not None:
                    place.copy_(out)

        self._steps.append(again)
        return result

    def launch(self, program: Any, grid: Sequence[int], arguments: Sequence[Any], options: dict[str, Any]) -> None:
        """A Triton program, told by `serverlesslora_kernels.cuda.launch`."""

        with _disable_current_modes():  # an interpreter may compute with torch itself
            program[tuple(grid)](*arguments, **options)
        remembered = self._remember(tuple(arguments))
        self._steps.append(lambda: program[tuple(grid)](*_find(remembered), **options))

    def replay(self) -> None:
        with torch.inference_mode():
            for step in self._steps:
                step()


def _find(remembered: Any) -> Any:
    return tree_map_only(
        _Outside, lambda outside: outside.find(), remembered, is_leaf=lambda leaf: isinstance(leaf, _Outside)
    )


def _refuse_waiting(func: Any, args: Sequence[Any]) -> None:
    packet = getattr(func, "overloadpacket", func)
    if packet in _WAITS or str(func) == "aten.repeat_interleave.Tensor":
        raise NotCapturable(f"it waits for the result of {func}")
    if packet in _INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        raise NotCapturable(f"{func} selects by a mask, so the size of its result is data")
    if packet in (_aten._to_copy, _aten.copy_):
        _refuse_host_copy(func, args)


def _refuse_host_copy(func: Any, args: Sequence[Any]) -> None:
    places = {value.device.type for value in args if isinstance(value, Tensor) and value.ndim}
    if len(places) > 1:
        raise NotCapturable(f"{func} copies between host and device")
