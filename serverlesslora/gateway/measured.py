"""What this server has measured of itself: times of starts, loads and steps, and sizes; what policies reckon with."""

from __future__ import annotations

import math
import platform
import statistics
from collections import deque
from collections.abc import Iterable

import msgspec

from serverlesslora.scheduler.profile import BackboneProfile, Profile, StepProfile
from serverlesslora_ipc.messages import StepSums

KEPT = 64  # the newest samples of each kind; their median is what is believed

# First guesses, replaced by the first measurement; orders of magnitude of a CPU server.
GUESSES = Profile(
    measured_on="first guesses",
    backbones={},
    libraries_s=3.0,
    worker_s=0.2,
    spare_s=0.05,
    worker_bytes=50 << 20,
    process_bytes=500 << 20,
    adapter_s=0.01,
    adapter_byte_s=1e-9,
)
GUESSED_STEPS = StepProfile(prefill_s=0.03, prefill_token_s=0.002, decode_s=0.04, decode_row_s=0.002, chunk_tokens=256)


class Line(msgspec.Struct, frozen=True):
    """T = base + slope·x by least squares."""

    base: float
    slope: float


def add(sums: Iterable[StepSums]) -> StepSums:
    total = [0.0] * 5
    for each in sums:
        total = [a + b for a, b in zip(total, (each.n, each.sum_x, each.sum_xx, each.sum_t, each.sum_xt), strict=True)]
    return StepSums(int(total[0]), *total[1:])


def fit(sums: StepSums, otherwise: Line) -> Line:
    """Neither base nor slope is below zero; where only one x was seen, the slope is the one believed so far."""
    if sums.n < 2:
        return otherwise
    spread = sums.sum_xx - sums.sum_x**2 / sums.n
    slope = (sums.sum_xt - sums.sum_x * sums.sum_t / sums.n) / spread if spread > 1e-9 else otherwise.slope
    slope = max(0.0, slope)
    base = (sums.sum_t - slope * sums.sum_x) / sums.n
    return Line(base, slope) if base >= 0 else Line(0.0, sums.sum_t / sums.sum_x)


class Samples:
    """The newest values of one quantity."""

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._values: deque[float] = deque(maxlen=KEPT)

    def add(self, value: float) -> None:
        if math.isfinite(value) and value >= 0:
            self._values.append(value)

    @property
    def value(self) -> float:
        return statistics.median(self._values) if self._values else self._guess

    def __len__(self) -> int:
        return len(self._values)


class BackboneMeasured:
    def __init__(self, guess: StepProfile) -> None:
        self.size_bytes = 0
        self.kv_bytes_per_token = 0
        self.load_s = Samples(10.0)
        self.copy_s = Samples(1.0)
        self._guess = guess
        self._past = (StepSums(), StepSums())  # decode and prefill of workers that are gone

    def gone(self, decode: StepSums, prefill: StepSums) -> None:
        self._past = (add((self._past[0], decode)), add((self._past[1], prefill)))

    def profile(self, decode: Iterable[StepSums], prefill: Iterable[StepSums]) -> BackboneProfile:
        """`decode`, `prefill`: of the workers that live."""
        guess = self._guess
        decoding = fit(add((self._past[0], *decode)), Line(guess.decode_s, guess.decode_row_s))
        filling = fit(add((self._past[1], *prefill)), Line(guess.prefill_s, guess.prefill_token_s))
        return BackboneProfile(
            size_bytes=self.size_bytes,
            load_s=self.load_s.value,
            copy_s=self.copy_s.value,
            kv_bytes_per_token=self.kv_bytes_per_token,
            steps=StepProfile(
                prefill_s=filling.base,
                prefill_token_s=filling.slope,
                decode_s=decoding.base,
                decode_row_s=decoding.slope,
                chunk_tokens=guess.chunk_tokens,
            ),
        )


class Measured:
    def __init__(self, backbones: Iterable[str], *, chunk_tokens: int) -> None:
        steps = msgspec.structs.replace(GUESSED_STEPS, chunk_tokens=chunk_tokens)
        self.backbones = {name: BackboneMeasured(steps) for name in backbones}
        self.libraries_s = Samples(GUESSES.libraries_s)
        self.worker_s = Samples(GUESSES.worker_s)  # without a spare
        self.spare_s = Samples(GUESSES.spare_s)
        self.first_step_s = Samples(0.0)  # of a new worker, beyond what the step takes later
        self.worker_bytes = Samples(GUESSES.worker_bytes)
        self.process_bytes = Samples(GUESSES.process_bytes)
        self.adapter_s = Samples(GUESSES.adapter_s)
        self.gateway_s = Samples(GUESSES.gateway_s)

    def profile(self, steps: dict[str, tuple[list[StepSums], list[StepSums]]], *, on: str) -> Profile:
        """`steps`: by backbone, (decode, prefill) sums of its living workers. `on`: the device, for people."""
        return Profile(
            measured_on=f"{on}, {platform.node()}",
            backbones={name: each.profile(*steps.get(name, ([], []))) for name, each in self.backbones.items()},
            libraries_s=self.libraries_s.value,
            worker_s=self.worker_s.value + self.first_step_s.value,
            spare_s=self.spare_s.value + self.first_step_s.value,
            worker_bytes=int(self.worker_bytes.value),
            process_bytes=int(self.process_bytes.value),
            adapter_s=self.adapter_s.value,
            adapter_byte_s=0.0,  # what a load takes beyond its fixed part is not told apart here
            gateway_s=self.gateway_s.value,
        )
