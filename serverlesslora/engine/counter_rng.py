"""Random numbers as a pure function of (seed, position), so that a request continues with the same tokens anywhere.

The mixing function is SplitMix64's (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014;
constants of Stafford's variant 13). Its n-th output is `mix(key + n * GAMMA)`, which makes it a counter-based
generator: there is no state to carry from one token, batch, process or machine to the next.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd: the counter visits every 64-bit value


def mix64(value: int) -> int:
    """A bijection of 64-bit words in which every input bit flips about half of the output bits."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) for the token at `position`; 53 bits, so that every float64 step is reachable."""
    # The seed is mixed before it becomes a key: clients use 1, 2, 3, ... and neighbouring keys would overlap.
    key = mix64(seed + _GAMMA)
    return (mix64(key + (position + 1) * _GAMMA) >> 11) * 2.0**-53


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of `n`; the first choice keeps the request's, so n = 1 equals choice 0 of n > 1."""
    return seed & _MASK if index == 0 else mix64(mix64(seed) ^ mix64(index * _GAMMA))
