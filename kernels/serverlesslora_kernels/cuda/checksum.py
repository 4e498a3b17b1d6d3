"""Digest of a region of device memory, slice by slice, to find out while idle whether anybody has written to it.

The region is read as words w_0, w_1, ... of 16 bits (an odd last byte is a word of its own) and

    digest = size + Σ w_i · g^(i+1)  mod 2^64,  with g ≡ 5 (mod 8) made from the seed.

- A change within one word, such as one bit, is always seen: the digest moves by δ · g^(i+1), where 0 < |δ| < 2^16 and
  g^(i+1) is odd, so it cannot vanish mod 2^64.
- Two different words that change places are always seen: it moves by δ · (g^(i+1) - g^(j+1)). For g ≡ 5 (mod 8) the
  second factor holds 2 exactly 2 + v(i - j) times, v(d) being how often d holds it; δ holds it at most 15 times. The
  sum stays below 64 for regions of up to 2^46 words.
- Anything else is missed with a chance of about 2^-64, unless somebody aims at it: this finds accidents and stray
  writes. It is no signature.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# Words at a time: their powers and products, 16 MiB each, stay in the cache of a large device.
_CHUNK_WORDS = 1 << 21


class Checksum:
    """The digest of `region` (contiguous uint8) in steps of `slice_bytes`, which do not show in the result."""

    def __init__(self, region: Tensor, slice_bytes: int = 64 << 20, *, seed: int = 0) -> None:
        if region.dtype != torch.uint8 or region.ndim != 1 or not region.is_contiguous():
            raise ValueError("a region is one contiguous row of bytes")
        self._region = region
        self._slice_bytes = max(2, slice_bytes // 2 * 2)
        self._base = _base_of(seed)
        self._powers = _powers(self._base, min(_CHUNK_WORDS, max(1, region.numel() // 2)), region.device)
        self._products = torch.empty_like(self._powers)
        self._total = torch.zeros((), dtype=torch.long, device=region.device)
        self._position = 0

    @property
    def progress(self) -> float:
        return self._position / max(1, self._region.numel())

    def step(self) -> int | None:
        """Reads one more slice; the digest after the last one, then it starts again. Only that waits for the device."""
        size = self._region.numel()
        end = min(self._position + self._slice_bytes, size)
        even = end // 2 * 2
        for start in range(self._position, even, 2 * _CHUNK_WORDS):
            self._add(self._words(start, min(start + 2 * _CHUNK_WORDS, even)), start)
        if even < end:
            self._add(self._region[even:end], even)
        self._position = end
        if end < size:
            return None
        digest = (int(self._total.item()) + size) & _MASK
        self._total.zero_()
        self._position = 0
        return digest

    def _words(self, start: int, end: int) -> Tensor:
        part = self._region[start:end]
        if part.storage_offset() % 2:
            part = part.clone()
        return part.view(torch.int16)

    def _add(self, words: Tensor, start: int) -> None:
        products = self._products[: words.numel()]
        torch.mul(words, self._powers[: words.numel()], out=products)
        # int64 arithmetic wraps, which is arithmetic mod 2^64; signs of words and sums only shift it by multiples.
        self._total.add_(products.sum(), alpha=_signed(pow(self._base, start // 2 + 1, 1 << 64)))


def digest(region: Tensor, *, seed: int = 0) -> int:
    """Of the whole region at once."""
    answer = Checksum(region, region.numel() + 2, seed=seed).step()
    assert answer is not None
    return answer


def _base_of(seed: int) -> int:
    """Any odd-looking number ≡ 5 (mod 8), a different one for each of 2^61 seeds."""
    return ((0x9E3779B97F4A7C15 * (2 * seed + 1)) & _MASK) >> 3 << 3 | 5


def _powers(base: int, count: int, device: torch.device) -> Tensor:
    """base^0 ... base^(count - 1), by doubling."""
    powers = torch.ones(count, dtype=torch.long, device=device)
    known = 1
    while known < count:
        more = min(known, count - known)
        torch.mul(powers[:more], _signed(pow(base, known, 1 << 64)), out=powers[known : known + more])
        known += more
    return powers


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
