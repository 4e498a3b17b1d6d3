"""When one adapter is asked: n times in a span, spread by a law of the gaps between them.

How many requests an adapter has is fixed beforehand, so that a seed changes when, not how many, and the rate is the one
that was asked for. Each law is its renewal process given that number: for Poisson this is exact (n uniform times), the
others are scaled to fit. Scaling time changes no coefficient of variation; leaving requests out would
(CV_thin² = 1 + p (CV² - 1)), which is why nothing here is thinned and every adapter has a process of its own.

Each law also tells its `moments` at a rate, and of how many independent `parts` its times in a span are made: with too
few of them, what came out need not look like the law.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serverlesslora_loadgen.generate.spelling import parse_law

Times = NDArray[np.float64]  # [n] seconds, ascending, in [0, span]
Variation = Annotated[float, Meta(gt=0, le=100)]
Seconds = Annotated[float, Meta(ge=0.001, le=1e9)]


class Moments(NamedTuple):
    """E[g^k] of the gaps g of a law, k = 1 … 4."""

    m1: float
    m2: float
    m3: float
    m4: float

    @property
    def cv(self) -> float:
        return math.sqrt(max(0.0, self.m2 - self.m1**2)) / self.m1

    def cv_error(self, gaps: int) -> float:
        """Standard deviation of a sample's CV over the CV, for that many gaps.

        By the delta method: Var(ĉ)/c² ≈ (c² - γc + (β - 1)/4) / m, γ the skewness and β the kurtosis (Cramér,
        Mathematical Methods of Statistics, section 27.7). For exponential gaps this is 1/m.
        """
        variance = self.m2 - self.m1**2
        if variance <= 1e-12 * self.m2:
            return 0.0
        third = self.m3 - 3 * self.m1 * self.m2 + 2 * self.m1**3
        fourth = self.m4 - 4 * self.m1 * self.m3 + 6 * self.m1**2 * self.m2 - 3 * self.m1**4
        of_one = self.cv**2 - self.cv * third / variance**1.5 + (fourth / variance**2 - 1) / 4
        return math.sqrt(max(0.0, of_one) / gaps)


class Poisson(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="poisson"):
    def times(self, rng: np.random.Generator, n: int, span_s: float) -> Times:
        return np.sort(rng.random(n)) * span_s

    def moments(self, rate: float) -> Moments:
        return Gamma(1.0).moments(rate)

    def parts(self, n: int, span_s: float) -> float:
        return n


class Gamma(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="gamma"):
    """Gaps of shape 1/cv²: as bursty as one likes by one number (S-LoRA has it for all adapters in one process)."""

    cv: Variation

    def times(self, rng: np.random.Generator, n: int, span_s: float) -> Times:
        return _fitted(rng.standard_gamma(self.cv**-2, n + 1), span_s)

    def moments(self, rate: float) -> Moments:
        shape = self.cv**-2
        raw = [math.prod(shape + i for i in range(k)) for k in range(1, 5)]
        return _scaled(raw, rate)

    def parts(self, n: int, span_s: float) -> float:
        return n


class Weibull(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="weibull"):
    """Gaps of shape k: below 1 bursty, 1 Poisson, above 1 regular (ServeGen fits many of its clients by it)."""

    k: Annotated[float, Meta(ge=0.2, le=100)]

    def times(self, rng: np.random.Generator, n: int, span_s: float) -> Times:
        return _fitted(rng.weibull(self.k, n + 1), span_s)

    def moments(self, rate: float) -> Moments:
        return _scaled([math.gamma(1 + i / self.k) for i in range(1, 5)], rate)

    def parts(self, n: int, span_s: float) -> float:
        return n


class OnOff(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="onoff"):
    """Poisson while on, silent while off; both last exponentially long.

    Given `off_s`, or the `cv` to reach by silences as long as the adapter's rate makes it take. Exactly one of them.
    """

    on_s: Seconds  # mean
    off_s: Seconds | None = None  # mean
    cv: Annotated[float, Meta(gt=1, le=100)] | None = None

    def __post_init__(self) -> None:
        if (self.off_s is None) == (self.cv is None):
            raise ValueError("on/off arrivals need either off_s or cv, and not both")

    def silence_s(self, rate: float) -> float:
        """Mean, for `rate` requests per second over all. From CV² = 1 + 2 rate off² / (on + off), solved for off."""
        if self.off_s is not None:
            return self.off_s
        assert self.cv is not None
        excess = self.cv**2 - 1
        return (excess + math.sqrt(excess**2 + 8 * rate * excess * self.on_s)) / (4 * rate)

    def times(self, rng: np.random.Generator, n: int, span_s: float) -> Times:
        if n == 0:
            return np.empty(0)
        off_s = self.silence_s(n / span_s)
        starts, ends = self._on_periods(rng, off_s, span_s)
        if not len(starts):  # silent all the time: but it has requests, so it is on at some time, whichever
            start = rng.random() * span_s
            starts, ends = np.array([start]), np.array([min(start + rng.exponential(self.on_s), span_s)])
        # Uniform over the time that is on: a Poisson process, given that it had n events.
        on = np.concatenate([[0.0], np.cumsum(ends - starts)])
        at = np.sort(rng.random(n)) * float(on[-1])
        period = np.minimum(np.searchsorted(on, at, side="right") - 1, len(starts) - 1)
        times: Times = starts[period] + at - on[period]
        return times

    def _on_periods(self, rng: np.random.Generator, off_s: float, span_s: float) -> tuple[Times, Times]:
        # Begins as it would be found at any time: on by its share of time; exponential periods forget how old they are.
        is_on = bool(rng.random() < self.on_s / (self.on_s + off_s))
        edges = [0.0] if is_on else []
        at = 0.0
        while at < span_s:
            at += rng.exponential(self.on_s if is_on else off_s)
            edges.append(min(at, span_s))
            is_on = not is_on
        if len(edges) % 2:  # begun at the very end
            edges.pop()
        return np.array(edges[::2]), np.array(edges[1::2])

    def moments(self, rate: float) -> Moments:
        """Such a process is a renewal process whose gaps are one of two exponentials (Kuczura, BSTJ 52(3), 1973)."""
        off_s = self.silence_s(rate)
        on_rate = rate * (self.on_s + off_s) / self.on_s
        ends, begins = 1 / self.on_s, 1 / off_s
        half, root = (on_rate + ends + begins) / 2, math.sqrt((on_rate + ends + begins) ** 2 - 4 * on_rate * begins) / 2
        fast, slow = half + root, on_rate * begins / (half + root)
        share = (on_rate - slow) / (fast - slow)
        raw = [math.factorial(i) * (share / fast**i + (1 - share) / slow**i) for i in range(1, 5)]
        return Moments(*raw)

    def parts(self, n: int, span_s: float) -> float:
        """Bursts, whatever the number of requests in them."""
        return span_s / (self.on_s + self.silence_s(n / span_s))


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="constant"):
    """Equal gaps, from a random start: adapters do not march in step."""

    def times(self, rng: np.random.Generator, n: int, span_s: float) -> Times:
        times: Times = (np.arange(n, dtype=np.float64) + rng.random()) * (span_s / max(n, 1))
        return times

    def moments(self, rate: float) -> Moments:
        return _scaled([1.0, 1.0, 1.0, 1.0], rate)

    def parts(self, n: int, span_s: float) -> float:
        return n


Arrivals = Poisson | Gamma | Weibull | OnOff | Constant


def parse_arrivals(text: str) -> Arrivals:
    """`poisson`, `constant`, `gamma:cv=4`, `weibull:0.7`, `onoff:on=30,off=10m`, `onoff:on=30,cv=6`.

    Raises WorkloadError.
    """
    law: Arrivals = parse_law(text, Arrivals, "a law of arrivals")
    return law


def _fitted(gaps: Times, span_s: float) -> Times:
    """n times of n + 1 gaps, which together fill the span."""
    ends = np.cumsum(gaps)
    if ends[-1] == 0:  # every gap too short for a float: all at once
        return np.zeros(len(gaps) - 1)
    times: Times = ends[:-1] * (span_s / float(ends[-1]))
    return times


def _scaled(raw: list[float], rate: float) -> Moments:
    """To a mean of 1/rate."""
    scale = 1 / (rate * raw[0])
    return Moments(*(moment * scale**i for i, moment in enumerate(raw, 1)))
