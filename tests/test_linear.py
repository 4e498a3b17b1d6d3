"""The native linear layer against float64 and against what it must not do."""

import pytest
import torch

from serverlesslora_kernels import linear as module
from serverlesslora_kernels import native, reference
from serverlesslora_kernels.linear import MAX_NATIVE_ROWS, linear

needs_native = pytest.mark.skipif(native.load("linear") is None, reason="no native kernels on this machine")

SHAPES = [(1, 1), (3, 31), (4, 32), (5, 33), (17, 100), (64, 128), (130, 896), (70, 4864)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 16, 33, MAX_NATIVE_ROWS, MAX_NATIVE_ROWS + 1]


@pytest.fixture(autouse=True)
def _all_rows_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the kernel, also where torch would be faster for many rows."""
    monkeypatch.setattr(module, "max_native_rows", lambda: MAX_NATIVE_ROWS)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: torch.Tensor, exact: torch.Tensor, k: int) -> None:
    unit = 2.0**-8 if actual.dtype is torch.bfloat16 else 2.0**-22  # half a last place of the result, twice over
    assert actual.isfinite().all()
    assert ((actual.double() - exact).abs() <= unit * exact.abs() + 1e-6 * k**0.5).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_float64(rows: int, n: int, k: int, bias: bool) -> None:
    x, weight, b = random(rows, k), random(n, k, seed=1), random(n, seed=2) if bias else None
    y = linear(x, weight, b)
    assert (y.shape, y.dtype) == ((rows, n), torch.bfloat16)
    assert_near(y, reference.linear(x, weight, b), k)


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_float32_equals_float64(rows: int) -> None:
    x, weight = random(rows, 100, dtype=torch.float32), random(70, 100, dtype=torch.float32, seed=1)
    assert_near(linear(x, weight), reference.linear(x, weight), 100)


@needs_native
def test_a_row_does_not_depend_on_its_batch() -> None:
    x, weight, bias = random(MAX_NATIVE_ROWS, 900), random(77, 900, seed=1), random(77, seed=2)
    alone = torch.cat([linear(x[i : i + 1], weight, bias) for i in range(len(x))])
    for rows in range(1, len(x) + 1):
        assert torch.equal(linear(x[:rows], weight, bias), alone[:rows])


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads: int) -> None:
    x, weight = random(3, 512), random(1000, 512, seed=1)
    before = torch.get_num_threads()
    expected = linear(x, weight)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(linear(x, weight), expected)
    finally:
        torch.set_num_threads(before)


def test_views_leading_dimensions_and_strides() -> None:
    big = random(300, 96, seed=1)
    x = random(2, 3, 64)
    for weight in (big[10:50, :64], big[100:, 32:], big[:1, :64]):  # row slices and padded rows
        assert_near(linear(x, weight), reference.linear(x, weight), 64)
    columns = random(64, 6).T  # not contiguous
    assert_near(linear(columns, big[:40, :64]), reference.linear(columns, big[:40, :64]), 64)
    transposed = random(64, 40, seed=3).T  # unit stride on the wrong axis: torch's
    assert_near(linear(x, transposed), reference.linear(x, transposed), 64)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [64, 70])
def test_nan_and_infinity_come_through(rows: int, value: float, k: int) -> None:
    x, weight = torch.ones(rows, k).bfloat16(), torch.ones(9, k).bfloat16()
    x[rows - 1, k - 1] = value
    y = linear(x, weight)
    assert (y[: rows - 1] == k).all()
    assert torch.equal(y[rows - 1].isnan(), torch.full((9,), value != value))
    assert not y[rows - 1].isfinite().any()
    x[rows - 1, k - 1], weight[4, 0] = 1, value
    y = linear(x, weight)
    assert not y[:, 4].isfinite().any()
    assert y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_what_the_kernel_cannot_do_is_torchs() -> None:
    x, weight = random(2, 8), random(3, 8, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, weight).sum(), weight)
    assert torch.equal(gradient, x.sum(0).expand(3, 8))
    assert linear(x[:0], weight.detach()).shape == (0, 3)
    with pytest.raises(RuntimeError, match="shape"):
        linear(x, random(3, 7))


def test_plain_torch_when_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernel", lambda: None)
    x, weight, bias = random(2, 40), random(9, 40, seed=1), random(9, seed=2)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@needs_native
def test_never_writes_outside_of_its_output() -> None:
    weight = random(11, 50, seed=1)
    around = torch.full((9, 11), 7.0).bfloat16()
    kernel = module._kernel()
    assert kernel is not None
    for rows in range(1, 8):
        around.fill_(7)
        x = random(rows, 50)
        kernel(x.data_ptr(), weight.data_ptr(), None, around[1:].data_ptr(), rows, 11, 50, 50, 2)
        assert torch.equal(around[1 : rows + 1], linear(x, weight))
        assert (around[0] == 7).all()
        assert (around[rows + 1 :] == 7).all()


@pytest.mark.parametrize(("flags", "rows"), [({"avx512f"}, 64), ({"avx512f", "amx_bf16"}, 6)])
def test_tiles_are_left_to_those_who_use_them(monkeypatch: pytest.MonkeyPatch, flags: set[str], rows: int) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
    assert module.max_native_rows.__wrapped__() == rows
