"""The device's linear layers against float64, both paths, and the table that chooses between them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import Tensor

from serverlesslora.engine.graphs import CudaCapture, RecordedCapture
from tests.triton_interpreter import DEVICE  # before the programs are imported

from serverlesslora_kernels.cuda import linear as module  # isort: skip
from serverlesslora_kernels.cuda.linear import (  # isort: skip
    Linear,
    LinearChoice,
    Measured,
    always_skinny,
    choose,
    measure,
    skinny,
)

HALVES = [torch.bfloat16, torch.float16]
# n and k: odd ones, one tile, several tiles with a tail, and one that is split.
SHAPES = [(1, 1), (7, 30), (64, 128), (66, 520), (40, 1100)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_rounded_once(actual: Tensor, wanted: Tensor, k: int) -> None:
    """Half a last place of the result, and what a float32 sum over k may lose."""
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[actual.dtype]
    assert actual.isfinite().all()
    assert ((actual.double() - wanted).abs() <= 1.001 * unit * wanted.abs() + 1e-6 * k**0.5).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 16, 32])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_skinny_equals_float64(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    products = Linear(always_skinny())
    assert_rounded_once(products.linear(x, weight), exact(x, weight), k)
    assert_rounded_once(products.linear(x, weight, bias), exact(x, weight, bias), k)
    y = random(rows, n, dtype=dtype, seed=3)
    wanted = exact(x, weight) + y.double()
    products.add_linear(y, x, weight)
    assert_rounded_once(y, wanted, k)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (40, 1100)])
def test_strided_rows_and_nothing_beside_them_is_touched(n: int, k: int, rows: int) -> None:
    wide_x = torch.full((rows, k + 8), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide_w = torch.full((n + 2, k + 16), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide_y = torch.full((rows, n + 24), 7.0, dtype=torch.bfloat16, device=DEVICE)
    x, weight, y = wide_x[:, :k], wide_w[1:-1, 8:-8], wide_y[:, 8:-16]
    x.copy_(random(rows, k, dtype=torch.bfloat16))
    weight.copy_(random(n, k, dtype=torch.bfloat16, seed=1))
    products = Linear(always_skinny())
    wanted = exact(x, weight)
    assert_rounded_once(products.linear(x, weight), wanted, k)
    products.add_linear(y, x, weight)
    assert_rounded_once(y, wanted + 7.0, k)
    assert (wide_y[:, :8] == 7.0).all() and (wide_y[:, -16:] == 7.0).all()


@pytest.mark.parametrize("choices", [None, always_skinny()])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_both_tables_serve_what_a_model_asks(rows: int, dtype: torch.dtype, choices: LinearChoice | None) -> None:
    x, weight, bias = random(rows, 96, dtype=dtype), random(50, 96, dtype=dtype, seed=1), random(50, dtype=dtype)
    products = Linear(choices)
    y = products.linear(x[None], weight, bias)  # packed sequences come as [1, rows, k]
    assert y.shape == (1, rows, 50)
    # One more rounding than needed is the library's right.
    assert torch.allclose(y[0].double(), exact(x, weight, bias), rtol=2.0**-7, atol=1e-2)
    residual = random(rows, 64, dtype=dtype, seed=3)
    before = residual.double()
    products.add_linear(residual[:, :50], x, weight)
    assert torch.allclose(residual[:, :50].double(), before[:, :50] + exact(x, weight), rtol=2.0**-7, atol=1e-1)
    assert torch.equal(residual[:, 50:].double(), before[:, 50:])


@pytest.mark.parametrize(("n", "k"), [(64, 128), (40, 1100)])
def test_a_row_does_not_depend_on_its_neighbours(n: int, k: int) -> None:
    x, weight = random(16, k, dtype=torch.bfloat16), random(n, k, dtype=torch.bfloat16, seed=1)
    products = Linear(always_skinny())
    together = products.linear(x, weight)
    assert torch.equal(products.linear(x[3:7], weight), together[3:7])
    other = x.clone()
    other[5] = float("nan")
    again = products.linear(other, weight)
    assert torch.equal(again[:5], together[:5]) and torch.equal(again[6:], together[6:])


def test_no_rows() -> None:
    x, weight = random(0, 32, dtype=torch.bfloat16), random(8, 32, dtype=torch.bfloat16)
    for choices in (None, always_skinny()):
        assert Linear(choices).linear(x, weight).shape == (0, 8)
        Linear(choices).add_linear(random(0, 8, dtype=torch.bfloat16), x, weight)


def test_the_table_decides() -> None:
    fast, slow = (10.0, 8.0), (10.0, 9.9)  # the second is within what two runs of the same differ by
    choices = LinearChoice(
        (Measured(1, 64, 32, *fast), Measured(8, 64, 32, *slow), Measured(32, 64, 32, *fast), Measured(4, 8, 8, *slow))
    )
    assert [choose(choices, rows, 64, 32) for rows in (0, 1, 2, 8, 9, 32, 33)] == [
        "library", "skinny", "library", "library", "skinny", "skinny", "library",
    ]  # fmt: skip
    assert choose(choices, 1, 8, 8) == choose(choices, 5, 8, 8) == choose(choices, 1, 64, 64) == "library"
    assert choose(LinearChoice(choices.measured, otherwise="skinny"), 5, 8, 8) == "skinny"
    assert choose(always_skinny(), 33, 8, 8) == "library"
    assert choose(LinearChoice(), 1, 64, 32) == "library"


def test_the_table_survives_a_file() -> None:
    choices = LinearChoice((Measured(1, 64, 32, 10.0, 8.0),), device="one")
    assert msgspec.json.decode(msgspec.json.encode(choices), type=LinearChoice) == choices


def test_linear_asks_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, bool]] = []

    def counted(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, add: bool) -> None:
        used.append((x.shape[0], add))
        skinny(y, x, weight, bias, add=add)

    monkeypatch.setattr(module, "skinny", counted)
    weight = random(64, 32, dtype=torch.bfloat16)
    products = Linear(LinearChoice((Measured(1, 64, 32, 10.0, 8.0), Measured(4, 64, 32, 8.0, 10.0))))
    for rows in (1, 3):
        x = random(rows, 32, dtype=torch.bfloat16)
        products.linear(x, weight)
        products.add_linear(random(rows, 64, dtype=torch.bfloat16), x, weight)
        products.linear(x.float(), weight.float())
    assert used == [(1, False), (1, True)]


def test_measuring_tries_both_paths_and_keeps_the_shapes() -> None:
    times = iter(range(1, 100))

    def stopwatch(work: Callable[[int], None], repeats: int) -> float:
        assert repeats == 3
        work(0)
        work(1)
        return float(next(times))

    choices = measure([(48, 32), (16, 64)], [1, 4], 3, device=DEVICE, stopwatch=stopwatch)
    assert [(m.rows, m.n, m.k) for m in choices.measured] == [(1, 48, 32), (4, 48, 32), (1, 16, 64), (4, 16, 64)]
    assert [(m.library_us, m.skinny_us) for m in choices.measured] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    with pytest.raises(ValueError, match="33"):
        measure([(16, 16)], [33], 1, device=DEVICE, stopwatch=stopwatch)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 64, 128), (3, 64, 128), (3, 40, 1100)])
def test_a_graph_can_hold_it(rows: int, n: int, k: int) -> None:
    x, weight, y = (
        random(*shape, dtype=torch.bfloat16, seed=seed) for seed, shape in enumerate([(rows, k), (n, k), (rows, n)])
    )
    products = Linear(always_skinny())

    def step() -> Tensor:
        products.add_linear(y, x, weight)
        return products.linear(x, weight)

    capture = RecordedCapture() if DEVICE.type == "cpu" else CudaCapture(DEVICE)
    with torch.inference_mode():
        captured = capture(step)
        x.copy_(random(rows, k, dtype=torch.bfloat16, seed=7))
        y.zero_()
        captured.graph.replay()
    assert torch.equal(captured.output, products.linear(x, weight))
    assert torch.equal(y, captured.output)
