"""The digest of device memory: what its formula promises, against the same sum in Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serverlesslora_kernels.cuda import checksum
from serverlesslora_kernels.cuda.checksum import Checksum, digest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that regions of a few hundred bytes have several."""
    monkeypatch.setattr(checksum, "_CHUNK_WORDS", 64)


def region_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE) if data else torch.empty(0).byte()


def random_bytes(size: int, seed: int = 0) -> bytes:
    return bytes(torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed)).tolist())


def formula(data: bytes, seed: int = 0) -> int:
    base = checksum._base_of(seed)
    total = len(data)
    for index in range(0, len(data) // 2):
        word = int.from_bytes(data[2 * index : 2 * index + 2], "little", signed=True)
        total += word * pow(base, index + 1, 1 << 64)
    if len(data) % 2:
        total += data[-1] * pow(base, len(data) // 2 + 1, 1 << 64)
    return total % (1 << 64)


@given(st.binary(max_size=700), st.integers(0, 2**61 - 1))
@settings(max_examples=100, deadline=None)
def test_it_is_the_formula(data: bytes, seed: int) -> None:
    assert digest(region_of(data), seed=seed) == formula(data, seed)


@given(st.integers(0, 900), st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_slices_do_not_show(size: int, slice_bytes: int) -> None:
    data = random_bytes(size)
    steps = Checksum(region_of(data), slice_bytes)
    for _ in range(2):  # it starts again by itself
        calls, answer = 1, steps.step()
        while answer is None:
            assert 0 < steps.progress < 1
            calls, answer = calls + 1, steps.step()
        assert calls == max(1, -(-size // max(2, slice_bytes // 2 * 2)))
        assert answer == formula(data)


def test_every_single_bit_is_seen() -> None:
    region = region_of(random_bytes(301))
    whole = digest(region)
    seen = {whole}
    for place in range(301):
        for bit in range(8):
            region[place] ^= 1 << bit
            seen.add(digest(region))
            region[place] ^= 1 << bit
    assert len(seen) == 1 + 301 * 8
    assert digest(region) == whole


@given(st.integers(0, 299), st.integers(0, 299), st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1))
@settings(max_examples=200, deadline=None)
def test_two_words_that_change_places_are_seen(i: int, j: int, first: int, second: int) -> None:
    words = torch.zeros(300, dtype=torch.int16, device=DEVICE)
    words[i], words[j] = first, second
    swapped = words.clone()
    swapped[i], swapped[j] = words[j].item(), words[i].item()
    assert (digest(words.view(torch.uint8)) == digest(swapped.view(torch.uint8))) == torch.equal(words, swapped)


@pytest.mark.parametrize("distance_bits", [0, 1, 7, 20, 40, 45])
def test_far_words_too(distance_bits: int) -> None:
    """The worst case of the argument in the module, for distances no test could allocate."""
    for seed in range(20):
        base = checksum._base_of(seed)
        assert base % 8 == 5
        for odd in (1, 3, 12345):
            factor = pow(base, odd << distance_bits, 1 << 64) - 1
            assert (factor & -factor).bit_length() - 1 == 2 + distance_bits
            assert factor * 2**15 % (1 << 64) != 0


@pytest.mark.parametrize("width", [2, 4, 8, 32])
def test_larger_units_that_change_places_are_seen(width: int) -> None:
    """Also those whose words are only in another order: a plain sum of lanes would not notice."""
    data = bytearray(random_bytes(640, seed=3))
    data[64 : 64 + width] = data[:width][::-1]
    whole = digest(region_of(bytes(data)))
    for other in range(width, 640 - width, width):
        changed = bytearray(data)
        changed[:width], changed[other : other + width] = data[other : other + width], data[:width]
        assert (digest(region_of(bytes(changed))) == whole) == (changed == data)


def test_length_and_seed_belong_to_it() -> None:
    zeros = [digest(region_of(bytes(size))) for size in range(130)]
    assert len(set(zeros)) == 130
    data = region_of(random_bytes(100))
    assert len({digest(data, seed=seed) for seed in range(100)}) == 100


def test_a_region_may_start_anywhere() -> None:
    data = random_bytes(403)
    assert digest(region_of(data)[3:]) == formula(data[3:])
    assert digest(region_of(data)[2:-1]) == formula(data[2:-1])


def test_full_size_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    region = torch.randint(0, 256, (5 * 2**20 + 3,), dtype=torch.uint8, device=DEVICE)
    whole = digest(region)
    steps = Checksum(region, slice_bytes=1 << 20)
    answers = [steps.step() for _ in range(6)]
    assert answers == [None] * 5 + [whole]
    for place in (0, 4 * 2**20, 5 * 2**20 + 2):
        region[place] ^= 128
        assert digest(region) != whole
        region[place] ^= 128


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(2, 2).byte(), torch.zeros(8).byte()[::2]])
def test_only_rows_of_bytes(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="row of bytes"):
        digest(wrong)
