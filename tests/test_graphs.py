"""The recorded twin of a CUDA graph: it repeats what was launched, with the values of then and the memory of now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serverlesslora.engine.graphs import NotCapturable, RecordedCapture
from serverlesslora_kernels.cuda.launch import launch


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0])


def test_new_values_in_the_same_memory_give_new_results(x: Tensor) -> None:
    graph, y = RecordedCapture()(lambda: (x * 2).cumsum(0)[1:] + 1)
    assert y.tolist() == [7.0, 13.0]
    x.fill_(10.0)
    graph.replay()
    assert y.tolist() == [41.0, 61.0]


def test_values_that_python_computed_are_those_of_the_capture(x: Tensor) -> None:
    factor = 2.0
    graph, y = RecordedCapture()(lambda: x * factor)
    factor = 100.0
    graph.replay()
    assert y.tolist() == [2.0, 4.0, 6.0]


def test_what_is_written_in_place_is_written_again(x: Tensor) -> None:
    memory = torch.zeros(3)

    def function() -> Tensor:
        memory[1:] += x[1:]
        return memory.view(3, 1)

    graph, y = RecordedCapture()(function)
    graph.replay()
    assert memory.tolist() == [0.0, 4.0, 6.0]
    assert y.data_ptr() == memory.data_ptr()


def test_several_results_of_one_operator(x: Tensor) -> None:
    def function() -> Tensor:
        values, indices = x.sort(descending=True)
        return values + indices

    graph, y = RecordedCapture()(function)
    x.copy_(torch.tensor([5.0, 1.0, 9.0]))
    graph.replay()
    assert y.tolist() == [11.0, 5.0, 2.0]


@torch.inference_mode()
def test_operators_made_of_others_are_seen_in_their_parts() -> None:
    # In inference mode they reach a dispatch mode whole: "to" may or may not be a view, "item" hides its wait.
    positions = torch.arange(4)
    graph, y = RecordedCapture()(lambda: (positions.float()[:, None] @ torch.ones(1, 2)).reshape(-1).contiguous())
    positions += 3
    graph.replay()
    assert y.tolist() == [3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0, 6.0]
    with pytest.raises(NotCapturable):
        RecordedCapture()(lambda: positions * positions[0].item())


def test_launches_are_repeated_in_their_place(x: Tensor) -> None:
    class Doubling:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert grid == (1,)
            return self.double

        @staticmethod
        def double(tensor: Tensor, *, times: int) -> None:
            for _ in range(times):
                tensor.mul_(2)

    def function() -> Tensor:
        y = x + 1
        launch(Doubling(), (1,), y, times=2)
        return y - 1

    graph, y = RecordedCapture()(function)
    x.fill_(0.0)
    graph.replay()
    assert y.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * x.max().item(), "_local_scalar_dense"),
        (lambda x: x[x > 1], "by a mask"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense"),
    ],
)
def test_looking_at_the_data_is_refused(function: Callable[[Tensor], Tensor], reason: str, x: Tensor) -> None:
    with pytest.raises(NotCapturable, match=reason):
        RecordedCapture()(lambda: function(x))
